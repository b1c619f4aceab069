"""merge_tokens: the size-weighted average of tokens that merge."""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import arg_dims, rows
from effopt.kernel import Kernel

TINY = 1e-12
"""Weight of padding, of size 0: beside a real token nothing, among padding alone a plain mean."""

LEAST = 1e-6
"""Least size of a group that is not padding alone."""


@torch.library.custom_op("effopt::merge_tokens", mutates_args=())
def merge_tokens(
    x: Tensor, size: Tensor, kept: Tensor, source: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Average each kept token with the sources that merge into it, weighted by size.

    x [B, N, C], size [B, N], 0 at padding and at least 1e-6 elsewhere; kept [B, K], source
    [B, r], target [B, r] count in 0..N-1. Returns y [B, K, C] in the dtype of x and the summed
    size [B, K]. Sums are in float32. Padding that merges with padding alone is averaged plainly.
    """
    b, n, c = x.shape
    group = torch.arange(n, device=x.device).repeat(b, 1).scatter(1, source, target)
    total = size.new_zeros(b, n, c + 1, dtype=torch.float32)
    weight = size.float().clamp_min(TINY).unsqueeze(-1)
    weighted = torch.cat([x.float() * weight, weight], dim=-1)
    total.scatter_add_(1, group.unsqueeze(-1).expand(-1, -1, c + 1), weighted)
    left = total.gather(1, kept.unsqueeze(-1).expand(-1, -1, c + 1))
    summed = left[..., c:]
    return (left[..., :c] / summed).to(x.dtype), _sizes(summed)


@merge_tokens.register_fake
def _(
    x: Tensor, size: Tensor, kept: Tensor, source: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    b, k = kept.shape
    return x.new_empty(b, k, x.shape[2]), size.new_empty(b, k)


def lowering(
    x: Tensor, size: Tensor, kept: Tensor, source: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Gather rows, and add the sources by a product with a one-hot matrix.

    No scatter: engines reject a scatter that adds. The size rides as one more channel.
    """
    c = x.shape[2]
    weight = size.float().clamp_min(TINY).unsqueeze(-1)
    weighted = torch.cat([x.float() * weight, weight], dim=-1)
    onto = (kept.unsqueeze(2) == target.unsqueeze(1)).to(weighted.dtype)
    total = rows(weighted, kept) + onto @ rows(weighted, source)
    summed = total[..., c:]
    return (total[..., :c] / summed).to(x.dtype), _sizes(summed)


def _sizes(summed: Tensor) -> Tensor:
    """Return the sizes [B, K] of summed weights [B, K, 1]: 0 where they are those of padding."""
    flat = summed.squeeze(-1)
    return torch.where(flat < LEAST, 0.0, flat)


def axes(found: AxisMap, node: Node) -> tuple[Dims, ...]:
    """Tokens become the kept ones, channels stay."""
    x, (batch, kept) = arg_dims(found, node, 0), arg_dims(found, node, 2)
    return (batch, kept, x[2]), (batch, kept)


def samples() -> list[tuple[object, ...]]:
    """Two sources of one target, padding among the pairs, one row and several."""
    draw = torch.Generator().manual_seed(1)
    made: list[tuple[object, ...]] = []
    for b, n, c in ((1, 6, 4), (3, 9, 5)):
        size = torch.rand(b, n, generator=draw) + 0.5
        size[0, 4] = 0.0
        kept = torch.tensor([[1, 3, *range(5, n)]]).repeat(b, 1)
        source, target = torch.tensor([[0, 2, 4]]), torch.tensor([[1, 1, 3]])
        pairs = (source.repeat(b, 1), target.repeat(b, 1))
        made.append((torch.randn(b, n, c, generator=draw), size, kept, *pairs))
    return made


KERNEL = Kernel(torch.ops.effopt.merge_tokens.default, lowering, axes, samples, 1e-6)
