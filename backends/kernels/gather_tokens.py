"""gather_tokens: the tokens at given places, along any dimension."""

import math

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import Value, arg_dims, op, rows
from effopt.kernel import Kernel
from effopt.plugin import Plugin, Port, call


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


# --- on a GPU ---------------------------------------------------------------------------------


def body(x: Value, index: Value) -> Value:
    """One flat Gather of rows: those of sample b and outer place o begin at (b O + o) N."""
    outer = op.Shape(x, start=0, end=2)
    count = op.Mul(op.Gather(outer, 0), op.Gather(outer, 1))
    starts = op.Mul(op.Range(0, count, 1), op.Shape(x, start=2, end=3))
    ahead = op.Reshape(starts, op.Concat(outer, [1], axis=0))
    places = op.Add(op.Unsqueeze(index, [1]), ahead)
    wide = op.Concat([-1], op.Shape(x, start=3, end=4), axis=0)
    return op.Gather(op.Reshape(x, wide), places)


def adapt(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Launch for floats with a batch of their own, of any rank, as [B, outer, N, inner]."""
    if not x.is_floating_point() or _is_one(x.shape[0]):
        return lowering(x, index, dim)
    ahead, behind = x.shape[1:dim], x.shape[dim + 1 :]
    flat = x.reshape(x.shape[0], math.prod(ahead), x.shape[dim], math.prod(behind))
    (taken,) = call(PLUGIN, (flat, index))
    return taken.reshape(x.shape[0], *ahead, index.shape[1], *behind)


PLUGIN = Plugin(
    name="GatherTokens",
    stem="gather_tokens",
    inputs=(Port("x", "T", ("B", "O", "N", "I")), Port("index", "int64", ("B", "K"))),
    outputs=(Port("y", "T", ("B", "O", "K", "I")),),
    scalars=("O", "N", "I", "K"),
    grid=("B * cdiv(K * I, 1024)", "O", "1"),
    body=body,
    adapt=adapt,
)
"""Rows of hidden states, and of keys and values in a cache, with O the heads."""

KERNEL = Kernel(torch.ops.effopt.gather_tokens.default, lowering, axes, samples, 0.0, PLUGIN)
