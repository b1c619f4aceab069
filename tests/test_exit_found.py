"""Faults of early exit that were found, by name."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from effopt.calibration import read_calibration
from effopt.capture import capture
from effopt.errors import PreconditionError
from effopt.exits import set_thresholds
from effopt.passes.exit_calibration import _guarded
from effopt.pipeline import Pipeline
from effopt.program import Program
from effopt.recipe import steps_of
from effopt.stored import ROWS, stored_samples
from tests import zoo
from tests.test_exit_calibration import promise_of, usual


class Mixing(nn.Module):
    """A ViT whose rows see each other, by an operation named in words."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.inner, self.mode = zoo.make("vit")[0], mode

    def forward(self, x: Tensor) -> Tensor:
        """Take images [B, 3, 32, 32]."""
        logits: Tensor = self.inner(x).logits
        ways = {
            "mean": lambda: logits - logits.mean(0, keepdim=True),
            "softmax": lambda: logits * logits.softmax(0),
            "product": lambda: logits @ logits.T @ logits,
            "running sum": lambda: logits.cumsum(0),
        }
        return ways[self.mode]()


@pytest.mark.parametrize("mode", ["mean", "softmax", "product", "running sum"])
def test_rows_that_see_each_other_are_refused(mode: str) -> None:
    """Which rows have left would change the answers of the others."""
    data = [torch.randn(20, 3, 32, 32) for _ in range(20)]
    program, _ = Pipeline(steps_of("exact")).run(capture(Mixing(mode).eval(), data[0]))
    program.calibration = read_calibration(data, program)
    with pytest.raises(PreconditionError, match="rows of a batch see each other here"):
        Pipeline(steps_of("exit-early{cuts=1,epsilon=0.1}")).run(program)


@pytest.mark.parametrize(
    ("score", "given", "want"),
    [
        ("patience", 2.0, 2.0),
        ("max", 1.0, 1.0),
        ("max", 0.5, 0.50005),
        ("entropy", 0.99999, 1.0),
        ("margin", 10.0, 10.001),
        ("margin", np.inf, np.inf),
    ],
)
def test_a_guard_does_not_lift_a_threshold_above_every_score(
    score: str, given: float, want: float
) -> None:
    assert _guarded(np.array([given]), score) == pytest.approx([want], abs=1e-7)


def test_thresholds_that_were_changed_have_no_promise(tmp_path: object) -> None:
    optimized = usual()
    program, before = optimized.program, promise_of(optimized).tau
    set_thresholds(program, [-1e9])
    try:
        with pytest.raises(PreconditionError, match="thresholds were changed after"):
            optimized.save(f"{tmp_path}/out")
    finally:
        set_thresholds(program, before)


def test_a_confidence_is_not_rounded_to_certainty() -> None:
    words = replace(promise_of(usual()), delta=0.001, epsilon=0.0001).words()
    assert "with 99.9% confidence" in words
    assert "at most 0.01%" in words


def test_stored_samples_keep_no_more_of_a_batch_than_they_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """32 whole batches were kept to take 32 rows."""
    model, inputs = zoo.make("vit")
    program = capture(model, inputs)
    program.calibration = read_calibration(
        [{"pixel_values": torch.full((50, 3, 32, 32), float(n))} for n in range(4)], program
    )
    sizes = list[int]()
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda x, dim=0: (sizes.append(len(x[0])), cat(x, dim))[1])
    (kept,) = stored_samples(usual().program, program)
    assert kept.shape[0] == ROWS
    assert max(sizes) <= ROWS
    assert bool((kept == 3).all())


class Thresholded(nn.Module):
    """A model with an input of the name of the thresholds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.make("vit")[0]

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        """Take images and a scale [B, 1]."""
        made: Tensor = self.inner(x).logits * tau
        return made


def refusal(model: nn.Module, batch: object, options: str, dynamic: tuple[str, ...]) -> str:
    program: Program = capture(model.eval(), batch, dynamic=dynamic)
    program, _ = Pipeline(steps_of("exact")).run(program)
    program.calibration = read_calibration([batch] * 20, program)
    with pytest.raises(PreconditionError) as found:
        Pipeline(steps_of(f"exit-early{{cuts=1,epsilon=0.1{options}}}")).run(program)
    return str(found.value)


def test_what_saving_would_refuse_is_refused_ahead_of_the_work() -> None:
    images = torch.randn(20, 3, 32, 32)
    named = refusal(Thresholded(), (images, torch.ones(20, 1)), "", ("batch",))
    assert "the model has an input 'tau'" in named
    fixed = refusal(zoo.make("vit")[0], {"pixel_values": images}, ",lower=split", ())
    assert "lower=split lets rows leave the batch, which is fixed" in fixed
