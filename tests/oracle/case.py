"""A case: one model, captured, in normal form and reduced; and inputs of other sizes for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effopt.capture import capture
from effopt.pipeline import Pipeline, Step, parse_passes
from effopt.program import Program
from effopt.sites import TokenAxis, find_tokens
from effopt.verify import verify
from tests.check import NORMAL

Inputs = tuple[Tensor, ...]
Draw = Callable[[int, int | None], Inputs]
"""Makes flat inputs for a batch and a length (None: as captured)."""


@dataclass(frozen=True)
class Case:
    """A model as captured, in normal form, and after token passes; `axis` is the normal form's.

    `draw` makes inputs of other sizes; `padding` is the place of the attention mask among the
    inputs, where the model has one.
    """

    original: Program
    normal: Program
    reduced: Program
    axis: TokenAxis
    draw: Draw
    padding: int | None = None

    @property
    def free_length(self) -> bool:
        """Tell whether the number of tokens is dynamic."""
        return "length" in self.original.ranges


def apply(program: Program, spec: str) -> tuple[Program, str]:
    """Run a spec string of token passes; return the program and the name of the reduced axis."""
    reduced, records = Pipeline([Step(step) for step in parse_passes(spec)]).run(program)
    return reduced, next((record.facts["axis"] for record in records if record.facts), "tokens")


def captured(
    model: nn.Module, inputs: object, dynamic: Sequence[str] = ("batch",)
) -> tuple[Program, Program]:
    """Capture a model; return the program and its normal form."""
    original = capture(model.eval(), inputs, dynamic=dynamic)
    return original, _normal(original)


def _normal(program: Program) -> Program:
    """Bring a program to its normal form; unlike a pipeline, verify but the result: it is slow."""
    fork = program.fork()
    for step in parse_passes(NORMAL):
        if refusals := step.check(fork):
            raise refusals[0]
        step.run(fork)
    verify(fork, "the normal form")
    return fork


def make_case(original: Program, normal: Program, spec: str, draw: Draw | None = None) -> Case:
    """Reduce a program in normal form; EffoptError where that is refused."""
    reduced, name = apply(normal, spec)
    axes = normal.get(find_tokens)
    axis = next((axis for axis in axes if axis.name == name), axes[0])
    return Case(original, normal, reduced, axis, draw or redraw(original), mask_input(original))


def mask_input(program: Program) -> int | None:
    """Find the attention mask among the inputs by its name."""
    names = [item.name for item in program.signature.inputs]
    return next((place for place, name in enumerate(names) if "mask" in name), None)


def redraw(program: Program) -> Draw:
    """Make inputs of other sizes from the samples: rows repeat with their tokens turned."""

    def draw(batch: int, length: int | None) -> Inputs:
        return tuple(
            _resized(x, item.shape, batch, length)
            for x, item in zip(program.samples, program.signature.inputs, strict=True)
        )

    return draw


def _resized(x: Tensor, shape: tuple[int | str, ...], batch: int, length: int | None) -> Tensor:
    if "batch" in shape:
        rows = [x[row % len(x)] for row in range(batch)]
        turned = [_turned(row, turn // len(x)) for turn, row in enumerate(rows)]
        x = torch.stack(turned)
    if length is not None and "length" in shape:
        place = torch.arange(length) % x.shape[1]
        x = x[:, place]
    return x


def _turned(row: Tensor, turn: int) -> Tensor:
    """Make another row of the same kind; a mask (two values at most) stays as it is.

    Whole numbers turn along the tokens: the four of a box belong together.
    """
    if not turn or (not row.is_floating_point() and len(row.unique()) <= 2):
        return row
    return row.roll(turn, -1 if row.is_floating_point() else 0)
