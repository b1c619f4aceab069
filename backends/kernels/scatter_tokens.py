"""scatter_tokens: tokens go back to the places that they came from."""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import arg_dims
from effopt.kernel import Kernel


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
    """Other places in each sample."""
    draw = torch.Generator().manual_seed(3)
    kept = torch.tensor([[0, 3], [2, 1]])
    base = torch.randn(2, 5, 3, generator=draw)
    return [(base, torch.randn(2, 2, 3, generator=draw), kept)]


KERNEL = Kernel(torch.ops.effopt.scatter_tokens.default, lowering, axes, samples, 0.0)
