"""exit_index: which exit each row leaves at."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import alike
from effopt.errors import UsageError
from effopt.kernel import Kernel

FORMS = ("if", "compact", "split")
"""What engines make of exits: a chain of If, the same on the rows that are left, an engine each."""


@torch.library.custom_op("effopt::exit_index", mutates_args=())
def exit_index(scores: list[Tensor], tau: Tensor, form: str) -> Tensor:
    """Return the exits [B] int64, from 1: the first whose score reaches its threshold.

    `scores` are E of [B], finite, in the order of the exits; `tau` [E] the thresholds, of which
    infinity is never reached. A row that reaches none leaves at the end, which is E + 1. `form`
    is one of FORMS: how a backend lowers the graph, whose meaning it is not. Raises UsageError.
    """
    _check(scores, tau, form)
    return lowering(scores, tau, form)


@exit_index.register_fake
def _(scores: list[Tensor], tau: Tensor, form: str) -> Tensor:
    _check(scores, tau, form)
    return scores[0].new_empty(scores[0].shape, dtype=torch.int64)


def lowering(scores: list[Tensor], tau: Tensor, form: str) -> Tensor:
    """Compute what the operator means, from the last exit to the first."""
    left = torch.full_like(scores[0], len(scores) + 1, dtype=torch.int64)
    for place in reversed(range(len(scores))):
        left = torch.where(scores[place] >= tau[place], place + 1, left)
    return left


def _check(scores: Sequence[Tensor], tau: Tensor, form: str) -> None:
    if form not in FORMS:
        raise UsageError(f"exit_index: no form {form!r}", f"give one of {', '.join(FORMS)}")
    if not scores or tau.shape != (len(scores),):
        reason = f"exit_index: {len(scores)} scores and thresholds {list(tau.shape)}"
        raise UsageError(reason, "give one threshold for each exit")


def axes(found: AxisMap, node: Node) -> Dims:
    """The rows."""
    return alike(found, node)


def samples() -> list[tuple[object, ...]]:
    """One exit and three; thresholds that all, some and no rows reach, and one that is met."""
    draw = torch.Generator().manual_seed(9)
    scores = [torch.rand(6, generator=draw) for _ in range(3)]
    met = torch.stack([score[0] for score in scores])
    limits = [torch.tensor([0.5, 0.6, 0.4]), met, torch.full((3,), float("inf"))]
    limits.append(-limits[-1])
    return [*((scores, tau, "if") for tau in limits), (scores[:1], limits[0][:1], "split")]


KERNEL = Kernel(torch.ops.effopt.exit_index.default, lowering, axes, samples, 0.0)
