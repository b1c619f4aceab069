"""gather_tokens: the tokens at given places, along any dimension."""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import arg_dims, rows
from effopt.kernel import Kernel


@torch.library.custom_op("effopt::gather_tokens", mutates_args=())
def gather_tokens(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Take, for each sample, the places `index [B, K]` of dimension `dim` of x.

    x has the batch first (or 1, for a value that all samples share) and N places along `dim` >= 1;
    the result has B first and K places there.
    """
    return _gather_tokens(x, index, dim)


@gather_tokens.register_fake
def _(x: Tensor, index: Tensor, dim: int) -> Tensor:
    b, k = index.shape
    return x.new_empty((b, *(k if d == dim else x.shape[d] for d in range(1, x.ndim))))


def lowering(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """One flat Gather of rows; values without channels and shared ones by GatherElements."""
    if x.ndim == 3 and dim == 1 and not _is_one(x.shape[0]):
        return rows(x, index)
    return _gather_tokens(x, index, dim)


def _is_one(size: int) -> bool:
    return isinstance(size, int) and size == 1


def _gather_tokens(x: Tensor, index: Tensor, dim: int) -> Tensor:
    b, k = index.shape
    sizes = (b, *x.shape[1:])
    spread = index.reshape(b, *(k if d == dim else 1 for d in range(1, x.ndim)))
    wanted = (b, *(k if d == dim else x.shape[d] for d in range(1, x.ndim)))
    return x.expand(sizes).gather(dim, spread.expand(wanted))


def axes(found: AxisMap, node: Node) -> Dims:
    """The gathered dimension becomes that of the index."""
    dims, (batch, kept) = list(arg_dims(found, node, 0)), arg_dims(found, node, 1)
    place = node.args[2]
    assert isinstance(place, int)
    dims[0], dims[place] = batch, kept
    return tuple(dims)


def samples() -> list[tuple[object, ...]]:
    """Hidden states, a vector per sample, a shared one, a bias along its last dimension."""
    draw = torch.Generator().manual_seed(2)
    index = torch.tensor([[3, 0, 2], [1, 2, 3]])
    shapes = [((2, 4, 5), 1), ((2, 4), 1), ((1, 4, 5), 1), ((1, 3, 4, 4), 3), ((2, 3, 4, 4), 2)]
    return [(torch.randn(*shape, generator=draw), index, dim) for shape, dim in shapes]


KERNEL = Kernel(torch.ops.effopt.gather_tokens.default, lowering, axes, samples, 0.0)
