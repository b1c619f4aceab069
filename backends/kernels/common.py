"""What several kernels share: rows by index in standard operators, and axes of what is kept."""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import Axis, AxisMap, Dim, Dims, same_size


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Take rows `x [B, N, C]` at `index [B, K]`, as one flat Gather: fast, and legal everywhere."""
    b, n, c = x.shape
    offset = torch.arange(b, device=x.device).unsqueeze(1) * n
    return x.reshape(b * n, c).index_select(0, (index + offset).reshape(-1)).reshape(b, -1, c)


def arg_dims(found: AxisMap, node: Node, place: int) -> Dims:
    """Return the dims of the argument at a place."""
    arg = node.args[place]
    assert isinstance(arg, Node)
    return found.of(arg)


def reduced(node: Node, before: Dim, size: object) -> Dim:
    """Make the axis of the tokens that are left; it must never be taken for the one before."""
    single = same_size(size, 1)
    return () if single else (Axis(f"{node.name}.tokens", size, reduced_from=before),)
