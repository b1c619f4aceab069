"""What several kernels share: rows by index in standard operators, and axes of what is kept."""

from typing import TYPE_CHECKING, Any

import onnxscript
import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import Axis, AxisMap, Dim, Dims, same_size, unify

if TYPE_CHECKING:
    Value = Any  # operators of onnxscript return what no type describes
else:
    Value = onnxscript.FLOAT
"""Any tensor of a function body: bodies are true for every type that their operators take."""

op: Any = onnxscript.opset20
"""The operators of function bodies; its stubs know eager tensors only."""


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Take rows `x [B, N, C]` at `index [B, K]`, as one flat Gather: fast, and legal everywhere."""
    b, n, c = x.shape
    offset = torch.arange(b, device=x.device).unsqueeze(1) * n
    return x.reshape(b * n, c).index_select(0, (index + offset).reshape(-1)).reshape(b, -1, c)


def alike(found: AxisMap, node: Node) -> Dims:
    """Return the dims that all tensors of the list at the first place share."""
    listed = node.args[0]
    assert isinstance(listed, (list, tuple))
    dims = [found.of(one) for one in listed if isinstance(one, Node)]
    for other in dims[:-1]:
        for one, two in zip(dims[-1], other, strict=True):
            unify(one, two)
    return dims[-1]


def arg_dims(found: AxisMap, node: Node, place: int) -> Dims:
    """Return the dims of the argument at a place."""
    arg = node.args[place]
    assert isinstance(arg, Node)
    return found.of(arg)


def reduced(node: Node, before: Dim, size: object) -> Dim:
    """Make the axis of the tokens that are left; it must never be taken for the one before."""
    single = same_size(size, 1)
    return () if single else (Axis(f"{node.name}.tokens", size, reduced_from=before),)
