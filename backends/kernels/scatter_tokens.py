"""scatter_tokens: tokens go back to the places that they came from."""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import Value, arg_dims, op
from effopt.kernel import Kernel
from effopt.plugin import Plugin, Port, call


@torch.library.custom_op("effopt::scatter_tokens", mutates_args=())
def scatter_tokens(base: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    """Return base [B, N, C] with the rows x [B, K, C] at the places kept [B, K]."""
    return base.scatter(1, kept.unsqueeze(-1).expand_as(x), x)


@scatter_tokens.register_fake
def _(base: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    return torch.empty_like(base)


def lowering(base: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    """Same: each place is written once."""
    return base.scatter(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[2]), x)


def axes(found: AxisMap, node: Node) -> Dims:
    """The dims of the base."""
    return arg_dims(found, node, 0)


def samples() -> list[tuple[object, ...]]:
    """Other places in each sample, of odd and even width."""
    draw = torch.Generator().manual_seed(3)
    kept = torch.tensor([[0, 3], [2, 1]])
    made: list[tuple[object, ...]] = []
    for width in (3, 16):
        base, x = (torch.randn(2, n, width, generator=draw) for n in (5, 2))
        made.append((base, x, kept))
    return made


# --- on a GPU ---------------------------------------------------------------------------------

TOKENS = 12000
"""The most tokens whose rows one block can list in its shared memory."""


def body(base: Value, x: Value, kept: Value) -> Value:
    """One scatter of rows, to places (sample, token)."""
    sample = op.Range(0, op.Squeeze(op.Shape(kept, start=0, end=1)), 1)
    wide = op.Expand(op.Unsqueeze(sample, [1]), op.Shape(kept))
    return op.ScatterND(
        base, op.Concat(op.Unsqueeze(wide, [2]), op.Unsqueeze(kept, [2]), axis=2), x
    )


def adapt(base: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    """Launch for floats, of a fixed number of tokens that is not too large."""
    tokens = base.shape[1]
    if not base.is_floating_point() or not isinstance(tokens, int) or tokens > TOKENS:
        return lowering(base, x, kept)
    (whole,) = call(PLUGIN, (base, x, kept))
    return whole


PLUGIN = Plugin(
    name="ScatterTokens",
    stem="scatter_tokens",
    inputs=(
        Port("base", "T", ("B", "N", "C")),
        Port("x", "T", ("B", "K", "C")),
        Port("kept", "int64", ("B", "K")),
    ),
    outputs=(Port("y", "T", ("B", "N", "C")),),
    scalars=("N", "C", "K", "cdiv(N * C, 16384)"),
    grid=("B", "cdiv(N * C, 16384)", "1"),
    shared="4 * N",
    body=body,
    adapt=adapt,
)
"""A block for some rows of a sample; each lists anew which of them are kept."""

KERNEL = Kernel(torch.ops.effopt.scatter_tokens.default, lowering, axes, samples, 0.0, PLUGIN)
