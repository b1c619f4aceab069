"""merge_tokens: the size-weighted average of tokens that merge."""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import arg_dims, rows
from effopt.kernel import Kernel

TINY = 1e-6
"""Least size to divide by: a group of padding alone has size 0, and its value does not matter."""


@torch.library.custom_op("effopt::merge_tokens", mutates_args=())
def merge_tokens(
    x: Tensor, size: Tensor, kept: Tensor, source: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Average each kept token with the sources that merge into it, weighted by size.

    x [B, N, C], size [B, N]; kept [B, K], source [B, r], target [B, r] count in 0..N-1.
    Returns y [B, K, C] in the dtype of x and the summed size [B, K]. Sums are in float32.
    """
    b, n, c = x.shape
    group = torch.arange(n, device=x.device).repeat(b, 1).scatter(1, source, target)
    total = size.new_zeros(b, n, c + 1, dtype=torch.float32)
    weighted = torch.cat([x.float() * size.unsqueeze(-1), size.unsqueeze(-1)], dim=-1)
    total.scatter_add_(1, group.unsqueeze(-1).expand(-1, -1, c + 1), weighted)
    left = total.gather(1, kept.unsqueeze(-1).expand(-1, -1, c + 1))
    return (left[..., :c] / left[..., c:].clamp_min(TINY)).to(x.dtype), left[..., c].clone()


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
    weighted = torch.cat([x.float() * size.unsqueeze(-1), size.unsqueeze(-1)], dim=-1)
    onto = (kept.unsqueeze(2) == target.unsqueeze(1)).to(weighted.dtype)
    total = rows(weighted, kept) + onto @ rows(weighted, source)
    summed = total[..., c:]
    return (total[..., :c] / summed.clamp_min(TINY)).to(x.dtype), summed.squeeze(-1)


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
