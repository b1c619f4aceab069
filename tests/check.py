"""The fluent tester: what a pass does to the graph text, to the numbers, and what it refuses."""

import re
from collections.abc import Sequence
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effopt.capture import capture
from effopt.errors import EffoptError
from effopt.passes.recipes import NORMAL_FORM
from effopt.pipeline import Pass, Pipeline, Step, parse_passes
from effopt.program import Program
from effopt.report import StepRecord

NORMAL = NORMAL_FORM
"""The normal form, which the lossy passes read."""


class Check:
    """A model, captured; each method asserts something and returns the tester.

    >>> Check(model, x).run("merge-tokens{r=2}").after(text).numbers(ulps=16, want=outputs)
    """

    def __init__(
        self, model: nn.Module, inputs: object, dynamic: Sequence[str] = ("batch",)
    ) -> None:
        self.model = model.eval()
        self.original = self.program = capture(model, inputs, dynamic=dynamic)
        self.want = self.program.run(self.program.samples)
        self.records: tuple[StepRecord, ...] = ()

    def before(self, expected: str) -> "Check":
        """Compare the graph's text as it is now; a line indented deeper continues the last."""
        assert text(self.program) == _joined(expected)
        return self

    def run(self, spec: "str | Pass") -> "Check":
        """Run a spec string or one pass."""
        self.program, self.records = Pipeline(_steps(spec)).run(self.program)
        return self

    def normal(self) -> "Check":
        """Bring the graph to its normal form."""
        return self.run(NORMAL)

    def after(self, expected: str) -> "Check":
        """Compare the graph's text; the last run must have changed something."""
        assert text(self.program) == _joined(expected)
        assert any(record.changed for record in self.records), "nothing changed"
        return self

    def kept(self, note: str) -> "Check":
        """Expect that the last run changed nothing and said why."""
        assert not any(record.changed for record in self.records), "something changed"
        assert self.records[-1].notes == (note,)
        return self

    def noted(self, *notes: str) -> "Check":
        """Compare the notes of the last pass."""
        assert self.records[-1].notes == notes
        return self

    def numbers(
        self,
        ulps: float,
        atol: float = 0.0,
        inputs: Sequence[Tensor] = (),
        want: Sequence[Tensor] = (),
    ) -> "Check":
        """Compare each output with `want`: those of the program as captured, if not given."""
        given = tuple(inputs) or self.program.samples
        expected = tuple(want) or self.original.run(given)
        agree(self.program.run(given), expected, ulps, atol)
        return self

    def refuses(self, spec: "str | Pass", message: str) -> "Check":
        """Expect an error with exactly this message, and that nothing was touched."""
        before, weights = text(self.program), _weights(self.model)
        with pytest.raises(EffoptError) as caught:
            Pipeline(_steps(spec)).run(self.program)
        assert said(caught.value) == dedent(message).strip()
        assert text(self.program) == before, "the graph was touched"
        assert weights == _weights(self.model), "the caller's weights were touched"
        return self

    def idempotent(self, spec: "str | Pass") -> "Check":
        """Expect that a second run changes nothing."""
        once, _ = Pipeline(_steps(spec)).run(self.program)
        twice, records = Pipeline(_steps(spec)).run(once)
        assert text(twice) == text(once)
        assert not any(record.changed for record in records), "a second run changed something"
        return self


def agree(got: Sequence[Tensor], want: Sequence[Tensor], ulps: float, atol: float = 0.0) -> None:
    """Compare with |error| <= ulps * eps(dtype of got) * max|want| + atol; never a bare rtol."""
    assert len(got) == len(want)
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape, "a difference would broadcast"
        assert a.isfinite().all(), f"output {place} is not finite"
        scale = b.abs().max().item()
        bound = ulps * torch.finfo(a.dtype).eps * scale + atol
        assert 0 < bound < 0.01 * scale, f"vacuous bound {bound} for values up to {scale}"
        error = (a.to(b.dtype) - b).abs().max().item()
        assert error <= bound, f"output {place} differs by {error} (bound {bound}, up to {scale})"


def text(program: Program) -> str:
    """Write a graph as text, with the names of its dynamic sizes in place of symbols."""
    shown = program.text()
    for symbol, name in program.dynamic.items():
        shown = re.sub(rf"\b{symbol}\b", name, shown)
    return shown


def said(error: Exception) -> str:
    """Return an error's message with places as `file.py`: folders and lines differ by machine."""
    return re.sub(r" at \S*?([\w.-]+\.py):\d+", r" at \1", str(error))


def _joined(expected: str) -> str:
    return re.sub(r"\n +", " ", dedent(expected).strip())


def _steps(spec: "str | Pass") -> list[Step]:
    passes: list[Any] = parse_passes(spec) if isinstance(spec, str) else [spec]
    return [Step(one) for one in passes]


def _weights(model: nn.Module) -> dict[str, bytes]:
    return {name: _bytes(held) for name, held in model.state_dict().items()}


def _bytes(held: Tensor) -> bytes:
    return held.detach().contiguous().view(torch.uint8).numpy().tobytes() if held.numel() else b""
