"""select_tokens: the places of the tokens with the highest scores, in their old order."""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import arg_dims, reduced
from effopt.kernel import Kernel
from effopt.program import value

HIGH = 3e38
"""Score of what is always kept: above every score, below infinity."""


@torch.library.custom_op("effopt::select_tokens", mutates_args=())
def select_tokens(score: Tensor, keep: int, prefix: int, suffix: int) -> Tensor:
    """Return kept [B, keep] int64 ascending: the places with the highest scores.

    score [B, N]; the first `prefix` and last `suffix` tokens are kept always and count in `keep`.
    Ties go to the lower place.
    """
    ranked = _guarded(score, prefix, suffix).sort(dim=1, descending=True, stable=True).indices
    return ranked[:, :keep].sort(dim=1).values


@select_tokens.register_fake
def _(score: Tensor, keep: int, prefix: int, suffix: int) -> Tensor:
    return score.new_empty((score.shape[0], keep), dtype=torch.int64)


def lowering(score: Tensor, keep: int, prefix: int, suffix: int) -> Tensor:
    """TopK twice; the second sorts the places, as floats, exact below 2^24."""
    places = _guarded(score, prefix, suffix).topk(keep, dim=1).indices
    return places.float().topk(keep, dim=1, largest=False).values.to(torch.int64)


def _guarded(score: Tensor, prefix: int, suffix: int) -> Tensor:
    n = score.shape[1]
    place = torch.arange(n, device=score.device)
    return torch.where((place < prefix) | (place >= n - suffix), HIGH, score.float())


def axes(found: AxisMap, node: Node) -> Dims:
    """What is left of the tokens."""
    batch, tokens = arg_dims(found, node, 0)
    return batch, reduced(node, tokens, value(node).shape[1])


def samples() -> list[tuple[object, ...]]:
    """With and without protection, keeping one and all."""
    score = torch.rand(3, 9, generator=torch.Generator().manual_seed(5))
    return [(score, 4, 1, 0), (score, 5, 2, 1), (score, 1, 0, 0), (score, 9, 1, 0)]


KERNEL = Kernel(torch.ops.effopt.select_tokens.default, lowering, axes, samples, 0.0)
