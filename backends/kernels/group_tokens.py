"""group_tokens: for each token before a reduction, the place of what stands for it after."""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import Value, arg_dims, op
from effopt.kernel import Kernel
from effopt.plugin import Plugin, Port, call


@torch.library.custom_op("effopt::group_tokens", mutates_args=())
def group_tokens(x: Tensor, kept: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Return group [B, N] int64 in 0..K-1, for the tokens of x [B, N, C].

    kept [B, K], source [B, r], target [B, r] count in 0..N-1; a source has the place of its
    target, which is kept.
    """
    return _group_tokens(x, kept, source, target)


@group_tokens.register_fake
def _(x: Tensor, kept: Tensor, source: Tensor, target: Tensor) -> Tensor:
    return kept.new_empty(x.shape[:2])


def lowering(x: Tensor, kept: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Same: both scatters write each place once, so no order or addition is needed."""
    return _group_tokens(x, kept, source, target)


def _group_tokens(x: Tensor, kept: Tensor, source: Tensor, target: Tensor) -> Tensor:
    b, n = x.shape[:2]
    place = torch.arange(n, device=x.device).repeat(b, 1)
    spots = torch.arange(kept.shape[1], device=x.device).expand_as(kept)
    spot = torch.zeros_like(place).scatter(1, kept, spots)
    return spot.gather(1, place.scatter(1, source, target))


def axes(found: AxisMap, node: Node) -> Dims:
    """One place for each token of x."""
    return arg_dims(found, node, 0)[:2]


def samples() -> list[tuple[object, ...]]:
    """Kept out of order, two sources of one target."""
    pairs = (torch.tensor([[0, 2], [2, 4]]), torch.tensor([[1, 1], [3, 1]]))
    return [(torch.zeros(2, 5, 3), torch.tensor([[4, 1, 3], [0, 1, 3]]), *pairs)]


# --- on a GPU ---------------------------------------------------------------------------------


def body(x: Value, kept: Value, source: Value, target: Value) -> Value:
    """Both scatters write each place once; x is there for its number of tokens."""
    shape = op.Shape(x, start=0, end=2)
    place = op.Expand(op.Range(0, op.Squeeze(op.Shape(x, start=1, end=2)), 1), shape)
    spots = op.Range(0, op.Squeeze(op.Shape(kept, start=1, end=2)), 1)
    spot = op.ScatterElements(place * 0, kept, op.Expand(spots, op.Shape(kept)), axis=1)
    home = op.ScatterElements(place, source, target, axis=1)
    return op.GatherElements(spot, home, axis=1)


def adapt(x: Tensor, kept: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Launch beside floats: their type names the entry, their values are not read."""
    if not x.is_floating_point():
        return lowering(x, kept, source, target)
    (group,) = call(PLUGIN, (x, kept, source, target))
    return group


PLUGIN = Plugin(
    name="GroupTokens",
    stem="group_tokens",
    inputs=(
        Port("x", "T", ("B", "N", "C")),
        Port("kept", "int64", ("B", "K")),
        Port("source", "int64", ("B", "R")),
        Port("target", "int64", ("B", "R")),
    ),
    outputs=(Port("group", "int64", ("B", "N")),),
    scalars=("N", "K", "R"),
    grid=("B", "1", "1"),
    body=body,
    adapt=adapt,
)
"""With GatherTokens by its result, merging is undone in two launches."""

KERNEL = Kernel(torch.ops.effopt.group_tokens.default, lowering, axes, samples, 0.0, PLUGIN)
