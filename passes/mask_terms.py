"""Terms of additive masks: what hides tokens, read as conditions (True = attend)."""

import torch
from torch.fx import Node
from torch.fx.node import Argument

from effopt.constants import LOW, is_low, number_in
from effopt.edit import Edit
from effopt.masks import CHOICES
from effopt.program import is_tensor, value

aten = torch.ops.aten
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout)
MOVED = (
    *(aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.expand.default),
    *(aten.squeeze.dim, aten.transpose.int, aten.permute.default, aten.slice.Tensor),
    *CASTS,
)
"""Changes of shape or type that leave the elements of a mask what they are."""


def as_condition(edit: Edit, mask: Node) -> Node | None:
    """Read `where(c, 0, -inf)` and `masked_fill(zeros, c, -inf)`, through views, as booleans."""
    views: list[Node] = []
    source = mask
    while source.target in MOVED:
        views.append(source)
        assert isinstance(source.args[0], Node)
        source = source.args[0]
    condition = _condition(edit, source)
    if condition is None:
        return None
    for view in reversed(views):
        if view.target in CASTS:
            continue  # a condition has no precision; cast, it would be added as 1 and 0
        with edit.before(view):
            condition = edit.call(view.target, condition, *view.args[1:], **view.kwargs)  # type: ignore[arg-type]
    return condition


def _condition(edit: Edit, source: Node) -> Node | None:
    """Return where an additive mask lets attend, or None for one that is not 0 and -infinity."""
    if source.target in FILLS and number_in(source.args[0]) != 0:
        return None  # a bias that hides as well: `choose` reads it
    with edit.before(source):
        choice = _as_choice(edit, source)
    if choice is None:
        return None
    seen, kept = choice
    return seen if number_in(kept) == 0 else None


def _as_choice(edit: Edit, node: Node) -> tuple[Node, Argument] | None:
    """Read a node as `where(seen, kept, -infinity)`; a condition that it lacks is made."""
    if node.target in CHOICES and is_low(node.args[2]) and isinstance(node.args[0], Node):
        return node.args[0], node.args[1]
    if node.target in FILLS and is_low(node.args[2]):
        kept, hidden = node.args[:2]
        return edit.call(aten.logical_not.default, hidden), kept
    if node.target is aten.mul.Tensor:
        for factor, number in (node.args[:2], node.args[1::-1]):
            size = number_in(number)
            if isinstance(factor, Node) and size is not None and abs(size) >= -LOW:
                seen = _seen_where_zero(edit, factor, size < 0)
                return None if seen is None else (seen, 0.0)
    return None


def _seen_where_zero(edit: Edit, factor: Node, low: bool) -> Node | None:
    """Return the condition under which a factor of +-infinity is 0; None where it may be a share.

    A factor that is a condition as a number is 0 or 1; so is 1 - m for a whole-number mask m. The
    product must be `low`, minus infinity: the number is that, or the factor is m - 1.
    """
    source = factor
    while source.target in CASTS and isinstance(source.args[0], Node):
        source = source.args[0]
    if value(source).dtype == torch.bool:
        return edit.call(aten.logical_not.default, source) if low else None
    rest = aten.rsub.Scalar if low else aten.sub.Tensor
    if source.target is not rest or source.args[1] != 1 or len(source.args) != 2 or source.kwargs:
        return None
    mask = source.args[0]
    whole = mask
    while isinstance(whole, Node) and whole.target in MOVED:
        whole = whole.args[0]
    if not isinstance(whole, Node) or value(whole).is_floating_point():
        return None
    return edit.call(aten.ne.Scalar, mask, 0)


def choose(edit: Edit, mask: Node) -> int:
    """Write each term of a sum that hides tokens as one choice between a bias and -infinity."""
    todo, count = [mask], 0
    while todo:
        node = todo.pop()
        if node.target in (aten.add.Tensor, aten.expand.default):
            todo += [arg for arg in node.args[:2] if is_tensor(arg)]
        elif node.target not in CHOICES and value(node).is_floating_point():
            with edit.before(node):
                choice = _as_choice(edit, node)
                if choice is None:
                    continue
                seen, kept = choice
                made = _choice(edit, seen, kept, node)
            edit.replace(node, made)
            count += 1
    return count


def _choice(edit: Edit, seen: Node, kept: Argument, like: Node) -> Node:
    low = torch.finfo(value(like).dtype).min
    if isinstance(kept, Node):
        return edit.call(aten.where.ScalarOther, seen, kept, low)
    made = edit.call(aten.where.Scalar, seen, kept, low)
    dtype = value(like).dtype
    return made if value(made).dtype == dtype else edit.call(aten.to.dtype, made, dtype)
