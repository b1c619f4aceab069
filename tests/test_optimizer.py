"""optimize and save: what is refused before the work, and what a second save tells."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import export

import effopt
from effopt.apart import time_folders
from effopt.backend import Support
from effopt.backends.ort import Ort
from effopt.bench import agreement_of
from effopt.errors import EffoptError, MissingError, PreconditionError

X = torch.randn(2, 4)


class Tiny(nn.Module):
    """A linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.up(x)
        return found


def test_bfloat16_on_a_cpu_is_refused_before_the_passes() -> None:
    with pytest.raises(PreconditionError) as caught:
        effopt.optimize(Tiny().bfloat16(), X.bfloat16(), recipe="merge-tokens{r=8}")
    assert caught.value.node == "model"
    assert caught.value.reason.endswith("is bfloat16, which onnxruntime cannot run on a CPU")
    assert caught.value.remedy == "convert the model with .float()"


def test_a_bfloat16_model_is_refused_for_a_gpu_before_the_passes() -> None:
    """It failed at its end, as numpy has no such type; the scheme bf16 takes a float32 model."""
    with pytest.raises(PreconditionError) as caught:
        effopt.optimize(Tiny().bfloat16(), X.bfloat16(), target="a100", recipe="exact")
    assert "is bfloat16, and arrays of the engine have no such type" in caught.value.reason
    assert "quantize{scheme=bf16}" in caught.value.remedy


def test_a_missing_runtime_is_told_early_for_the_cpu_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = Support(False, "onnxruntime is not installed: pip install 'effopt[ort]'")
    monkeypatch.setattr(Ort, "available", lambda self: said)
    with pytest.raises(MissingError) as caught:
        effopt.optimize(Tiny(), X)
    assert caught.value.exit_code == 6
    assert caught.value.remedy == "pip install 'effopt[ort]'"
    assert effopt.optimize(Tiny(), X, target="a100", recipe="exact").target.name == "a100"


def test_an_exported_program_that_fixes_its_batch_is_noted() -> None:
    note = "the exported program fixes its batch"
    exported = export(Tiny(), (X,))
    assert note in effopt.optimize(exported, recipe="exact").report.notes
    assert note not in effopt.optimize(exported, recipe="exact", dynamic=()).report.notes
    assert note not in effopt.optimize(Tiny(), X, recipe="exact").report.notes


def test_a_second_save_tells_its_own_stages_and_the_recipe_as_asked(tmp_path: Path) -> None:
    optimized = effopt.optimize(Tiny(), X, recipe="exact")
    for name in ("one", "two"):
        folder = optimized.save(tmp_path / name, measure=False)
        stages = [stage.name for stage in optimized.report.stages]
        assert stages.count("build") == stages.count("check") == stages.count("capture") == 1
        manifest = effopt.load(folder).manifest
        assert manifest["facts"]["recipe"] == "exact"
        assert manifest["tools"]["onnxruntime"]


def test_timing_that_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hangs(*words: Any, timeout: float, **more: Any) -> None:
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(EffoptError, match="did not answer within 640 s"):
        time_folders({"effopt": tmp_path}, 4.0)


def metrics(**outputs: tuple[int, ...]) -> list[str]:
    draw = np.random.default_rng(0)
    want = {name: draw.standard_normal(shape, np.float32) for name, shape in outputs.items()}
    return [row.metric for row in agreement_of(want, want, "")]


def test_top_1_agreement_is_of_logits_or_of_the_only_table() -> None:
    assert metrics(output=(4, 3)) == ["cosine of output", "top-1 agreement of output"]
    assert metrics(output=(4, 1)) == ["cosine of output"]
    assert metrics(output=(4, 5, 3)) == ["cosine of output"]
    assert metrics(a=(4, 3), b=(4, 3)) == ["cosine of a", "cosine of b"]
    assert "top-1 agreement of logits" in metrics(logits=(4, 3), b=(4, 3))


def test_outputs_of_two_shapes_are_said_not_to_be_compared() -> None:
    (row,) = agreement_of({"y": np.zeros((2, 3))}, {"y": np.zeros((2, 4))}, "data")
    assert row.value is None
    assert row.data == "not compared: the shapes are [2, 3], [2, 4]"
