"""choose_exit: for each row the answer of the exit that it leaves at."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import alike
from effopt.errors import UsageError
from effopt.kernel import Kernel


@torch.library.custom_op("effopt::choose_exit", mutates_args=())
def choose_exit(answers: list[Tensor], index: Tensor) -> Tensor:
    """Return [B, ...]: row b of `answers[index[b] - 1]`.

    `answers` are of one shape [B, ...] and dtype, the last of them that of the whole model;
    `index` [B] int64 as of `exit_index`. Raises UsageError for answers that differ in either.
    """
    _check(answers)
    return lowering(answers, index)


@choose_exit.register_fake
def _(answers: list[Tensor], index: Tensor) -> Tensor:
    _check(answers)
    return answers[-1].new_empty(answers[-1].shape)


def lowering(answers: list[Tensor], index: Tensor) -> Tensor:
    """Compute what the operator means."""
    left = answers[-1].clone(memory_format=torch.contiguous_format)
    at = index.reshape(-1, *[1] * (left.ndim - 1))
    for place in reversed(range(len(answers) - 1)):
        left = torch.where(at == place + 1, answers[place], left)
    return left


def _check(answers: Sequence[Tensor]) -> None:
    kinds = {(answer.ndim, answer.dtype) for answer in answers}
    if len(answers) < 2 or len(kinds) > 1 or not answers[-1].ndim:
        reason = f"choose_exit: answers of {sorted(map(str, kinds))}"
        raise UsageError(reason, "give one of the same shape and dtype for each exit, and the end")


def axes(found: AxisMap, node: Node) -> Dims:
    """Those of every answer."""
    return alike(found, node)


def samples() -> list[tuple[object, ...]]:
    """Rows that leave at every exit; positions too, and whole numbers."""
    draw = torch.Generator().manual_seed(10)
    index = torch.tensor([1, 3, 2, 3])
    flat = [torch.randn(4, 5, generator=draw) for _ in range(3)]
    deep = [torch.randint(0, 9, (4, 2, 3), generator=draw) for _ in range(3)]
    return [(flat, index), (deep, index), (flat[:2], torch.tensor([2, 2, 1, 1]))]


KERNEL = Kernel(torch.ops.effopt.choose_exit.default, lowering, axes, samples, 0.0)
