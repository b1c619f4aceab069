"""The table of axis rules: by operator, its family; and the propagation that reads it."""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effopt import axis_parts as parts
from effopt import axis_rules as rules
from effopt.axes import AxisError, AxisMap, MixedError, fresh, fresh_dims
from effopt.axis_rules import Rule
from effopt.kernel import kernels
from effopt.program import is_tensor, value

aten = torch.ops.aten

_BINARY = ("add", "sub", "mul", "div", "remainder", "ge", "gt", "le", "lt", "eq", "ne")
_UNARY = """
    neg abs exp log sqrt rsqrt sin cos tanh sigmoid relu gelu silu erf softplus mish hardswish
    reciprocal isnan isinf clone alias contiguous detach dropout square floor zeros_like
    ones_like full_like clamp clamp_min leaky_relu hardtanh elu logical_not bitwise_not
"""
POINTWISE = (
    *(getattr(getattr(aten, name), kind) for name in _BINARY for kind in ("Tensor", "Scalar")),
    *(getattr(aten, name).default for name in _UNARY.split()),
    *(aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor),
    *(aten.logical_and.default, aten.logical_or.default, aten.maximum.default),
    *(aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.minimum.default),
    *(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.rsub.Scalar),
    *(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar),
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device),
)
"""Operators whose tensors broadcast against each other, element by element."""

FAMILIES: dict[str, tuple[Rule, tuple[Any, ...]]] = {
    "pointwise": (rules.pointwise, POINTWISE),
    "norm": (rules.norm, (aten.layer_norm.default, aten.rms_norm.default)),
    "softmax": (rules.keep, (aten.softmax.int, aten._softmax.default, aten.log_softmax.int)),
    "cast": (rules.keep, (aten.type_as.default,)),
    "scan": (rules.keep, (aten.cumsum.default, aten.flip.default)),
    "linear": (rules.linear, (aten.linear.default,)),
    "matmul": (
        rules.matmul,
        (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.addmm.default),
    ),
    "attention": (rules.attention, (aten.scaled_dot_product_attention.default,)),
    "view": (
        rules.view,
        (
            *(aten.view.default, aten.reshape.default, aten.flatten.using_ints),
            *(aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
            *(aten.squeeze.default, aten._unsafe_view.default),
        ),
    ),
    "permute": (rules.permute, (aten.permute.default,)),
    "transpose": (rules.transpose, (aten.transpose.int, aten.t.default)),
    "expand": (rules.expand, (aten.expand.default,)),
    "reduction": (
        rules.reduction,
        (
            *(aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default),
            *(aten.amax.default, aten.amin.default, aten.max.dim, aten.argmax.default),
            *(aten.any.dim, aten.all.dim, aten.any.default, aten.all.default),
        ),
    ),
    "select": (rules.select, (aten.select.int,)),
    "slice": (parts.slice_, (aten.slice.Tensor,)),
    "join": (parts.join, (aten.cat.default,)),
    "stack": (parts.stack, (aten.stack.default,)),
    "embedding": (rules.embedding, (aten.embedding.default,)),
    "gather": (rules.gather, (aten.gather.default,)),
    "convolution": (
        rules.convolution,
        (
            *(getattr(aten, f"conv{n}d").default for n in (1, 2, 3)),
            *(getattr(aten, f"conv{n}d").padding for n in (1, 2, 3)),
        ),
    ),
    "grid": (
        rules.channelwise,
        (
            *(aten.max_pool2d.default, aten.avg_pool2d.default),
            *(aten.adaptive_avg_pool2d.default, aten.upsample_bilinear2d.default),
            *(aten.upsample_bicubic2d.default, aten.upsample_bilinear2d.vec),
        ),
    ),
    "create": (
        rules.create,
        (
            *(aten.arange.default, aten.arange.start, aten.arange.start_step),
            *(aten.zeros.default, aten.ones.default, aten.full.default),
            *(aten.new_ones.default, aten.new_zeros.default, aten.new_full.default),
        ),
    ),
    "unbind": (parts.unbind, (aten.unbind.int,)),
    "pieces": (
        parts.pieces,
        (aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default),
    ),
    "roll": (parts.roll, (aten.roll.default,)),
    "item": (rules.getitem, (operator.getitem,)),
}
"""Family → its rule and its operators. An operator without a row stops the analysis there."""

RULES = {target: (name, rule) for name, (rule, targets) in FAMILIES.items() for target in targets}


def family(node: Node) -> str:
    """Return the family of a node's operator: "kernel" for ours, "" for one without a rule."""
    if node.target in kernels():
        return "kernel"
    return RULES[node.target][0] if node.target in RULES else ""


def propagate(found: AxisMap, node: Node) -> None:
    """Find the dims of one node from those of its arguments, or say why they are unknown."""
    many = isinstance(value(node), (tuple, list))
    if node.op == "output" or not (many or is_tensor(node)):
        return
    if node.op in ("placeholder", "get_attr"):
        found.dims[node] = fresh_dims(node)
        return
    try:
        found.dims[node] = _rule(node)(found, node)
    except AxisError as error:
        found.unknown[node] = str(error)
        if isinstance(error, MixedError):
            found.mixed[node] = str(error)
        found.dims[node] = _opaque(node)


def _rule(node: Node) -> Rule:
    if node.target in kernels():
        return kernels()[node.target].axes
    if node.target not in RULES:
        raise AxisError(f"no axis rule for {node.target}")
    return RULES[node.target][1]


def _opaque(node: Node) -> Any:
    val = value(node)
    if isinstance(val, Tensor):
        return fresh_dims(node)
    return tuple(
        tuple(fresh(f"{node.name}.{n}.{place}", size) for place, size in enumerate(item.shape))
        for n, item in enumerate(val)
    )
