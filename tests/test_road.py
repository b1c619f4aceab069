"""The whole road: model → capture → passes → ONNX → engine folder → load, for every zoo model."""

import functools
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils import _pytree as pytree

import effopt
from effopt.engine import check
from tests import zoo

NEUTRAL = ("merge-tokens{r=0}", "prune-tokens{keep=1}")
LOSSY = {
    "vit": "prune-tokens{keep=0.6,fuse=true}",
    "deit": "prune-tokens{keep=0.6}",
    "dinov2": "merge-tokens{r=3}",
    "clip_vision": "prune-tokens{keep=0.6}",
    "bert": "merge-tokens{r=3}",
    "bert_tokens": "merge-tokens{r=3,sites=[0,2]}",
    "roberta": "prune-tokens{keep=0.7,sites=[0]},merge-tokens{r=2,sites=[1]}",
    "encoder": "merge-tokens{r=3}",
    "encoder_padded": "merge-tokens{r=2,first=1}",
}


def _rows(inputs: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """Take rows in turn, each a little different."""
    picked = {name: x[torch.arange(rows) % len(x)] for name, x in inputs.items()}
    drawn = torch.Generator().manual_seed(rows)
    return {
        name: x + 0.1 * torch.randn(x.shape, generator=drawn) if x.is_floating_point() else x
        for name, x in picked.items()
    }


def _flat(result: object) -> list[np.ndarray[Any, Any]]:
    leaves = [leaf for leaf in pytree.tree_leaves(result) if leaf is not None]
    return [leaf.numpy() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


@functools.cache
def _plain_export(name: str, folder: str) -> Path:
    """Export as a user without effopt does."""
    model, inputs = zoo.make(name)
    path = Path(folder) / f"{name}.onnx"
    batch = torch.export.Dim("batch", min=1)
    shapes = {key: {0: batch} for key in inputs}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (), str(path), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    return path


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("plain"))


def few(names: Iterable[str], kept: str) -> list[Any]:
    """Mark all models but one as slow; the others are of the same kinds."""
    slow = pytest.mark.slow
    return [name if name == kept else pytest.param(name, marks=slow) for name in names]


@pytest.mark.parametrize("name", few(zoo.MODELS, "vit"))
def test_removing_nothing_equals_the_plain_export(
    name: str, tmp_path: Path, plain_folder: str
) -> None:
    """Measured: at most 3e-6 on outputs of up to 6; the promise is 1e-5."""
    model, inputs = zoo.make(name)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    path = _plain_export(name, plain_folder)
    plain = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    recipe = ",".join(NEUTRAL)
    saved = effopt.optimize(model, inputs, recipe=recipe).save(tmp_path / "out", measure=False)
    engine = effopt.load(saved)
    for rows in (1, 2, 7):
        feed = {key: x.numpy() for key, x in _rows(inputs, rows).items()}
        want = plain.run(None, {item.name: feed[item.name] for item in plain.get_inputs()})
        for got, expected in zip(_flat(engine(**feed)), want, strict=True):
            assert got.shape == expected.shape
            assert np.abs(got - expected).max() <= 1e-5


@pytest.mark.parametrize("name", few(LOSSY, "bert"))
def test_the_engine_computes_what_the_rewritten_graph_does(name: str, tmp_path: Path) -> None:
    """Measured: at most 3e-6 on outputs of up to 6, matching and ranking included."""
    model, inputs = zoo.make(name)
    optimized = effopt.optimize(model, inputs, recipe=LOSSY[name])
    engine = effopt.load(optimized.save(tmp_path / "out", measure=False))
    assert all(figure.ok for figure in check(engine))
    for rows in (1, 5):
        feed = _rows(inputs, rows)
        got = engine(**{key: x.numpy() for key, x in feed.items()})
        want = optimized(**feed)
        if isinstance(got, dict):
            assert list(got) == [key for key, value in want.items() if value is not None]
        for a, b in zip(_flat(got), _flat(want), strict=True):
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= 1e-5


ANY_LENGTH = {"bert": "{r=3,sites=[1]}", "bert_tokens": "{r=3}", "roberta": "{r=3}"}
"""Sizes after several sites are long to trace: one is for the default set."""


@pytest.mark.parametrize("name", few(ANY_LENGTH, "bert"))
def test_a_text_of_any_length_runs_in_one_engine(name: str, tmp_path: Path) -> None:
    model, inputs = zoo.make(name)
    dynamic = ("batch", "length")
    recipe = f"merge-tokens{ANY_LENGTH[name]}"
    optimized = effopt.optimize(model, inputs, recipe=recipe, dynamic=dynamic)
    engine = effopt.load(optimized.save(tmp_path / "out", measure=False))
    assert engine.signature.inputs[0].shape == dynamic
    for rows, length in ((1, 2), (2, 3), (3, 9), (2, 16)):
        feed = {key: x[:, :length] for key, x in _rows(inputs, rows).items()}
        got = engine(**{key: x.numpy() for key, x in feed.items()})
        for a, b in zip(_flat(got), _flat(optimized(**feed)), strict=True):
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= 1e-5


def test_a_gpu_target_writes_the_portable_file_and_says_what_is_pending(tmp_path: Path) -> None:
    model, inputs = zoo.make("vit")
    optimized = effopt.optimize(model, inputs, target="a100", recipe="merge-tokens{r=3}")
    engine = effopt.load(optimized.save(tmp_path / "out"))
    assert engine.manifest["pending"] == "engine: to be built on sm_80 with effopt build"
    assert optimized.report.pending == engine.manifest["pending"]
    assert optimized.report.latency == (), "what has not run has no time"
    assert all(figure.ok for figure in check(engine)), "the portable file is right on the CPU"


def test_the_report_is_in_the_folder_and_says_where_the_time_went(tmp_path: Path) -> None:
    model, inputs = zoo.make("vit")
    optimized = effopt.optimize(model, inputs, recipe="merge-tokens{r=3}")
    folder = optimized.save(tmp_path / "out")
    assert {"report.json", "report.html", "reference.npz", "model.onnx"} <= {
        path.name for path in folder.iterdir()
    }
    stages = [stage.name for stage in optimized.report.stages]
    for name in ("capture", "merge-tokens{r=3}", "quality", "build", "check", "measure"):
        assert name in stages
    assert {row.batch for row in optimized.report.latency} == {1, 8}
    assert {row.variant for row in optimized.report.latency} == {"exact export", "effopt"}
    assert optimized.report.macs_after < optimized.report.macs_before
