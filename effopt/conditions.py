"""Conditions: whether two masks say the same of each token, however each was spelled."""

import torch
from torch.fx import Node
from torch.fx.node import Argument

from effopt.axes import same_size
from effopt.axis_rules import dim_arg
from effopt.constants import number_in
from effopt.program import shape

aten = torch.ops.aten
VIEWS = (
    *(aten.reshape.default, aten.unsqueeze.default, aten.expand.default, aten.squeeze.dim),
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.select.int),
)
NEGATIONS = (aten.logical_not.default, aten.bitwise_not.default)
BOUNDS = (aten.clamp.default, aten.clamp_min.default)

Origin = tuple[Node, tuple[object, ...], bool]
"""What a condition is made of, all that was done to it, and whether it was negated."""


def origin(node: Node) -> Origin:
    """Follow a condition through views, casts and negations to where it comes from."""
    done, negated = list[object](), False
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        if node.target in NEGATIONS or (node.target is aten.eq.Scalar and node.args[1] == 0):
            negated = not negated
        elif (
            node.target in BOUNDS
            or (node.target is aten.ne.Scalar and node.args[1] != 0)
            or (node.target is aten.select.int and not _is_single(node))
        ):
            done.append((node.target, *node.args[1:]))
        elif node.target not in VIEWS and node.target is not aten.ne.Scalar:
            break
        node = node.args[0]
    return node, tuple(done), negated


def _is_single(node: Node) -> bool:
    """Tell whether `select` takes the only place of a dimension."""
    inner = node.args[0]
    assert isinstance(inner, Node)
    return same_size(shape(inner)[dim_arg(node, 1)], 1)


def same_condition(left: Node, right: Node) -> bool | None:
    """Tell whether one condition is the other (True) or its opposite (False); None if neither."""
    (a, done, negated), (b, other, opposite) = origin(left), origin(right)
    return negated == opposite if a is b and done == other else None


def leaves_out(target: object, args: tuple[Argument, ...], seen: Node) -> bool:
    """Tell whether what an operator yields is 0 wherever the condition `seen` does not hold."""
    nodes = [arg for arg in args if isinstance(arg, Node)]
    if target is aten.mul.Tensor:
        return any(same_condition(arg, seen) for arg in nodes)
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return number_in(args[2]) == 0 and same_condition(nodes[1], seen) is False
    if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        holds = same_condition(nodes[0], seen)
        other = {True: args[2], False: args[1]}.get(holds) if holds is not None else None
        return other is not None and number_in(other) == 0
    return False
