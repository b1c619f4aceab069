"""pool_tokens: the mean over tokens, each counted as often as it has originals."""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import Value, arg_dims, op
from effopt.kernel import Kernel
from effopt.plugin import Plugin, Port, call

FLOOR = 1e-6
"""Least total of the sizes: a sample of padding alone has mean 0."""


@torch.library.custom_op("effopt::pool_tokens", mutates_args=())
def pool_tokens(x: Tensor, size: Tensor) -> Tensor:
    """Return Σ s x / max(Σ s, 1e-6) [B, C] in the dtype of x, computed in float32.

    x [B, N, C]; size [B, N] float32, the number of originals that each token stands for.
    """
    return lowering(x, size)


@pool_tokens.register_fake
def _(x: Tensor, size: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2]))


def lowering(x: Tensor, size: Tensor) -> Tensor:
    """Weight, add and divide."""
    wide = size.float().unsqueeze(2)
    total = wide.sum(dim=1).clamp_min(FLOOR)
    return ((x.float() * wide).sum(dim=1) / total).to(x.dtype)


def axes(found: AxisMap, node: Node) -> Dims:
    """Tokens are gone."""
    batch, _, channels = arg_dims(found, node, 0)
    return batch, channels


def samples() -> list[tuple[object, ...]]:
    """Few and many tokens and channels; sizes of 0, and a sample of nothing else."""
    draw = torch.Generator().manual_seed(11)
    few = torch.tensor([[1.0, 2, 0, 3], [0, 0, 0, 0]])
    many = torch.randint(0, 4, (3, 37), generator=draw).float()
    return [
        (torch.randn(2, 4, 5, generator=draw), few),
        (torch.randn(3, 37, 70, generator=draw), many),
        (torch.randn(3, 1, 8, generator=draw), many[:, :1] + 1),
    ]


# --- on a GPU ---------------------------------------------------------------------------------


def body(x: Value, size: Value) -> Value:
    """One product of a row of sizes with the tokens."""
    row = op.Unsqueeze(size, [1])
    total = op.Max(op.ReduceSum(size, [1], keepdims=1), op.CastLike(FLOOR, size))
    pooled = op.Squeeze(op.MatMul(row, op.Cast(x, to=1)), [1])
    return op.CastLike(op.Div(pooled, total), x)


def adapt(x: Tensor, size: Tensor) -> Tensor:
    """Launch as it is."""
    (pooled,) = call(PLUGIN, (x, size))
    return pooled


PLUGIN = Plugin(
    name="PoolTokens",
    stem="pool_tokens",
    inputs=(Port("x", "T", ("B", "N", "C")), Port("size", "float32", ("B", "N"))),
    outputs=(Port("y", "T", ("B", "C")),),
    scalars=("N", "C"),
    grid=("B * cdiv(C, 32)", "1", "1"),
    shared="1056",
    body=body,
    adapt=adapt,
)

KERNEL = Kernel(torch.ops.effopt.pool_tokens.default, lowering, axes, samples, 1e-6, PLUGIN)
