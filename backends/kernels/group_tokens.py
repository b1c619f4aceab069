"""group_tokens: for each token before a reduction, the place of what stands for it after."""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import arg_dims
from effopt.kernel import Kernel


@torch.library.custom_op("effopt::group_tokens", mutates_args=())
def group_tokens(x: Tensor, kept: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Return group [B, N] int64 in 0..K-1, for the tokens of x [B, N, C].

    kept [B, K], source [B, r], target [B, r] count in 0..N-1; a source has its target's place.
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


KERNEL = Kernel(torch.ops.effopt.group_tokens.default, lowering, axes, samples, 0.0)
