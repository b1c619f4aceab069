"""How much a rewrite changes what a program returns: a share of the energy of its outputs."""

from collections.abc import Iterable, Sequence
from math import inf

import torch
from torch import Tensor

from effopt.calibration import samples_in
from effopt.errors import PreconditionError
from effopt.passes.rounding import TINY
from effopt.program import Program

FEW = 64
"""Samples of a search: batches are taken until there are so many."""

_FLOATS = ("float", "bfloat")

Outputs = Sequence[Tensor]


class Trial:
    """Compares programs with one on the first batches of its calibration data.

    The outputs of the program itself are kept.
    """

    def __init__(self, program: Program) -> None:
        self.batches = list[tuple[Tensor, ...]]()
        self.samples = 0
        for batch in program.calibration or ():
            self.batches.append(batch)
            self.samples += samples_in(program, batch)
            if self.samples >= FEW:
                break
        self.want = [program.run(batch) for batch in self.batches]

    def change(self, other: Program) -> float:
        """Return how much another program of the same signature returns something else."""
        got = (other.run(batch) for batch in self.batches)
        return change(zip(got, self.want, strict=True))


def unmeasured(program: Program) -> PreconditionError | None:
    """Return why a change of outputs cannot be measured: no data, or no output that tells."""
    if program.calibration is None:
        reason = "what the outputs lose is measured on data, and there is none"
        return PreconditionError("model", reason, "pass calibration=, or --calibration FILE")
    if not any(spec.dtype.startswith(_FLOATS) for spec in program.signature.outputs):
        reason = "no output is a floating number, so none tells what it loses"
        return PreconditionError("model", reason, "let the model return its scores, too")
    return None


def change_on_all(program: Program, other: Program) -> float | None:
    """Return the change on all of the calibration data, None where it cannot be measured.

    One batch is held at a time.
    """
    if unmeasured(program):
        return None
    batches = program.calibration or ()
    return change((other.run(batch), program.run(batch)) for batch in batches)


def change(pairs: Iterable[tuple[Outputs, Outputs]]) -> float:
    """Return |got - want|^2 / |want|^2 over all pairs of batches, of the worst floating output.

    Numbers count that are finite in both; inf where they are finite in one alone.
    """
    changes, wholes = dict[int, float](), dict[int, float]()
    for got, want in pairs:
        for place, (a, b) in enumerate(zip(got, want, strict=True)):
            if not b.is_floating_point():
                continue
            if not bool((a.isfinite() == b.isfinite()).all()):
                return inf
            moved, whole = (torch.where(b.isfinite(), x, 0.0).double() for x in (a - b, b))
            changes[place] = changes.get(place, 0.0) + float(moved.square().sum())
            wholes[place] = wholes.get(place, 0.0) + float(whole.square().sum())
    return max((changes[n] / max(wholes[n], TINY) for n in changes), default=0.0)
