"""fuse_tokens: one token that stands for all that were dropped (EViT, arXiv 2202.07800)."""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import arg_dims
from effopt.kernel import Kernel


@torch.library.custom_op("effopt::fuse_tokens", mutates_args=())
def fuse_tokens(x: Tensor, score: Tensor, kept: Tensor, normalize: bool) -> Tensor:
    """Return [B, 1, C]: the sum of score·x over the tokens not kept, in the dtype of x.

    x [B, N, C], score [B, N], kept [B, K]. `normalize` divides by the sum of those scores, so
    that the fused token has the norm of a token; the paper, which trains with it, does not.
    """
    dropped = torch.ones_like(score).scatter(1, kept, 0.0)
    return _fused(x, score * dropped, normalize)


@fuse_tokens.register_fake
def _(x: Tensor, score: Tensor, kept: Tensor, normalize: bool) -> Tensor:
    return x.new_empty(x.shape[0], 1, x.shape[2])


def lowering(x: Tensor, score: Tensor, kept: Tensor, normalize: bool) -> Tensor:
    """Find the dropped tokens by comparison: a scatter of a constant is slower."""
    place = torch.arange(x.shape[1], device=x.device)
    held = (kept.unsqueeze(2) == place).any(dim=1)
    return _fused(x, torch.where(held, 0.0, score), normalize)


def _fused(x: Tensor, weight: Tensor, normalize: bool) -> Tensor:
    total = weight.unsqueeze(1) @ x.float()
    if normalize:
        total = total / weight.sum(dim=1).clamp_min(1e-12).reshape(-1, 1, 1)
    return total.to(x.dtype)


def axes(found: AxisMap, node: Node) -> Dims:
    """One token of the same channels."""
    batch, _, channel = arg_dims(found, node, 0)
    return batch, (), channel


def samples() -> list[tuple[object, ...]]:
    """Raw and normalised."""
    draw = torch.Generator().manual_seed(6)
    x, score = torch.randn(2, 6, 4, generator=draw), torch.rand(2, 6, generator=draw)
    kept = torch.tensor([[0, 2, 3], [0, 4, 5]])
    return [(x, score, kept, False), (x, score, kept, True)]


KERNEL = Kernel(torch.ops.effopt.fuse_tokens.default, lowering, axes, samples, 1e-6)
