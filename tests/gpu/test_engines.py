"""Whole engines on a GPU, where TensorRT or onnxruntime-gpu is installed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import effopt
from effopt.backends import trt_modules
from effopt.backends.cuda_driver import Device
from effopt.backends.ort_providers import CUDA
from effopt.backends.session import Session
from effopt.engine import check, load
from effopt.target import TARGETS
from tests import zoo

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("recipe", ["exact", "merge-tokens{r=2}"])
def test_an_engine_of_tensorrt_computes_what_was_stored(
    gpu: Device, tmp_path: Path, recipe: str
) -> None:
    if trt_modules.installed("trt") is None:
        pytest.skip("tensorrt is not installed")
    name = next((row.name for row in TARGETS.values() if row.arch == gpu.arch), None)
    if name is None:
        pytest.skip(f"no target is of {gpu.arch}")
    model, inputs = zoo.make("vit")
    optimized = effopt.optimize(model, inputs, target=name, recipe=recipe)
    engine = load(optimized.save(tmp_path / "out", measure=False))
    assert engine.note == ""
    for _ in range(4):  # the last through a CUDA graph
        assert all(figure.ok for figure in check(engine))


def test_onnxruntime_runs_on_the_gpu_what_it_runs_on_the_cpu(gpu: Device, tmp_path: Path) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is without CUDA: it takes onnxruntime-gpu")
    model, inputs = zoo.make("vit")
    folder = effopt.optimize(model, inputs, target="onnx", recipe="exact").save(
        tmp_path / "out", measure=False
    )
    signature = load(folder).signature
    on_cpu = Session(folder / "model.onnx", signature)
    on_gpu = Session(folder / "model.onnx", signature, kind="gpu")
    assert on_gpu.providers[0] != "CPUExecutionProvider", on_gpu.note
    arrays = [tensor.numpy() for tensor in inputs.values()]
    for want, got in zip(on_cpu.run(arrays), on_gpu.run(arrays), strict=True):
        # TF32 products have 11 bits, over three layers.
        assert np.abs(want - got).max() <= 1e-2 * np.abs(want).max()
