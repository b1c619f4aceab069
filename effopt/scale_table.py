"""The table of scale rules: by operator, its rule."""

from operator import getitem
from typing import Any

import torch
from torch.fx import Node

from effopt import scale_rules as rules
from effopt.axis_table import family
from effopt.scale_rules import SHAPED, Rule

aten = torch.ops.aten
STRUCTURAL = SHAPED | {
    *("permute", "transpose", "reverse", "movedim", "shuffle", "copies", "select", "slice"),
    *("narrow", "join", "stack", "unbind", "pieces", "roll", "windows", "triangle", "write"),
}
"""Families that move elements and compute none: they run on labels as they are."""

_ROWS: tuple[tuple[Rule, tuple[Any, ...]], ...] = (
    (rules.linear, (aten.linear.default, aten.addmm.default)),
    (rules.norm, (aten.layer_norm.default, aten.rms_norm.default)),
    (rules.embedding, (aten.embedding.default,)),
    (rules.add, (aten.add.Tensor, aten.sub.Tensor, aten.subtract.Tensor, aten.where.self)),
    (rules.multiply, (aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor)),
    (rules.divide, (aten.div.Tensor, aten.div.Scalar)),
    (rules.matmul, (aten.matmul.default, aten.bmm.default, aten.mm.default)),
    (rules.attention, (aten.scaled_dot_product_attention.default,)),
    (rules.reduction, (aten.mean.dim, aten.sum.dim_IntList)),
    (rules.reduction, (aten.amax.default, aten.amin.default)),
    (rules.masked, (aten.masked_fill.Scalar,)),
    (rules.pad, (aten.constant_pad_nd.default, aten.pad.default)),
    (rules.zeros, (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)),
    (rules.places, (aten.index.Tensor, aten.index_select.default, aten.gather.default)),
    (rules.item, (getitem,)),
    (rules.same, (aten.neg.default, aten.relu.default, aten.leaky_relu.default, aten.abs.default)),
    (rules.same, (aten.clone.default, aten.contiguous.default, aten.alias.default)),
    (rules.same, (aten.detach.default, aten.dropout.default, aten.type_as.default)),
    (rules.same, (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other)),
    (rules.same, (aten._to_copy.default,)),
    (rules.shape_only, (aten.sym_size.int, aten.ones_like.default, aten.full_like.default)),
    (rules.shape_only, (aten.new_ones.default, aten.new_full.default, aten.new_empty.default)),
)

RULES: dict[Any, Rule] = {target: rule for rule, targets in _ROWS for target in targets}

ORIGINS = frozenset((rules.opaque, rules.linear, rules.norm, rules.embedding, rules.shape_only))
"""Rules that are themselves to blame for a result that cannot be scaled; others pass it on."""


def rule_of(node: Node) -> Rule:
    """Return the rule of a node's operator."""
    if node.target in RULES:
        return RULES[node.target]
    known = family(node)
    if known in STRUCTURAL:
        return rules.structural
    return rules.tokens if known == "kernel" else rules.opaque
