"""What the attention masks of a token axis hide and add, and if sizes can replace them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from effopt.attention import is_causal, mask_of
from effopt.axes import same_size
from effopt.axis_rules import tensors
from effopt.axis_table import family
from effopt.conditions import origin, same_condition
from effopt.constants import constant_value, is_low, number_in
from effopt.errors import PreconditionError
from effopt.kernel import kernel
from effopt.program import is_tensor, shape, value, where
from effopt.sites import TokenAxis
from effopt.tokens import Kind

aten = torch.ops.aten
AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
CHOICES = (aten.where.self, aten.where.ScalarOther, aten.where.Scalar)
ACTIVATIONS = ("linear", "matmul", "embedding", "convolution", "norm", "attention")
"""Families whose results are learned features: no mask value comes out of them."""


@dataclass(frozen=True)
class MaskParts:
    """A mask as conditions, all of which must hold, and biases that add up.

    A condition is boolean (True = attend) or a whole number (0 = do not attend).
    """

    seen: tuple[Node, ...] = ()
    added: tuple[Node, ...] = ()


def parts_of(mask: Node | None) -> MaskParts:
    """Take a mask apart at its conjunctions, sums and choices between a bias and -infinity."""
    seen, added = list[Node](), list[Node]()
    todo = [] if mask is None else [(mask, value(mask).dtype == torch.bool)]
    while todo:
        part, is_condition = todo.pop()
        inner = [arg for arg in part.args[:2] if is_tensor(arg)]
        if _keeps_rank(part) or (is_condition and _is_conjunction(part)):
            todo += [(arg, is_condition) for arg in reversed(inner)]
        elif is_condition:
            seen.append(part)
        elif _is_sum(part):
            todo += [(arg, False) for arg in reversed(inner)]
        elif part.target in CHOICES and is_low(part.args[2]):
            pair = zip(part.args[:2], (True, False), strict=True)
            todo += [(arg, kind) for arg, kind in pair if is_tensor(arg)]
        elif number_in(part) != 0:
            added.append(part)
    return MaskParts(tuple(dict.fromkeys(seen)), tuple(added))


def _is_conjunction(part: Node) -> bool:
    """Tell whether a condition holds where all its arguments do: `and`, a product, a cast."""
    if part.target in AND:
        return True
    inner = part.args[0] if part.args else None
    if not is_tensor(inner) or value(inner).is_floating_point():
        return False
    return part.target in (aten.mul.Tensor, aten.to.dtype)


def _keeps_rank(part: Node) -> bool:
    """Tell whether a node only repeats dimensions of size 1, which broadcasting does as well."""
    inner = part.args[0] if part.args else None
    spreads = part.target is aten.expand.default and is_tensor(inner)
    return spreads and len(shape(inner)) == len(shape(part))  # type: ignore[arg-type]


def _is_sum(part: Node) -> bool:
    return part.target is aten.add.Tensor and not part.kwargs


HIDES = -50.0
"""A bias at or below this hides a token: e^-50 is nothing beside any other."""

ONE_PASS = "merge at all sites in one pass: name them in its option sites"


@dataclass(frozen=True)
class Padding:
    """The [B, 1, 1, N] condition to attend of all attention calls over an axis, or none.

    `refusal` says why the calls' masks cannot be told from a padding mask; `blind` that padding
    attends to nothing as well.
    """

    mask: Node | None = None
    refusal: PreconditionError | None = None
    blind: bool = False


def find_padding(axis: TokenAxis) -> Padding:
    """Find the padding mask that all attention calls over the axis share."""
    calls = [node for node, found in axis.effects.items() if found.kind is Kind.ATTEND]
    own = [call for call in calls if _keys_on(axis, call)]
    if any(
        node.target is kernel("merge_tokens").op and axis.tokens.on(node)
        for node in axis.tokens.axes.dims
    ):
        reason = "these tokens were merged before, and a second pass does not know their sizes"
        return Padding(refusal=PreconditionError(where(own[0]), reason, ONE_PASS))
    vectors, blind = list[Node | None](), False
    for call in own:
        parts = parts_of(mask_of(call))
        if reason := _unmergeable(axis, call, parts):
            return Padding(refusal=_refuse(call, reason))
        blind = blind or any(_is_twin(axis, part, parts.seen) for part in parts.seen)
        vectors.append(next((part for part in parts.seen if _is_vector(axis, part)), None))
    if len({vector and origin(vector) for vector in vectors}) > 1:
        reason = "the attention calls over these tokens do not share one padding mask"
        return Padding(refusal=_refuse(own[0], reason))
    return Padding(next(iter(vectors), None), blind=blind)


def _refuse(call: Node, reason: str) -> PreconditionError:
    remedy = "drop tokens in place of merging them, or pass a boolean padding mask"
    return PreconditionError(where(call), reason, remedy)


def _keys_on(axis: TokenAxis, call: Node) -> bool:
    keys = tensors(call)[1]
    return len(shape(keys)) - 2 in axis.tokens.on(keys)


def _unmergeable(axis: TokenAxis, call: Node, parts: MaskParts) -> str:
    """Say why merged tokens cannot be given a place in a mask, or ""."""
    if is_causal(call):
        return "attention is causal, and a merged token would show what comes later"
    for part in parts.seen:
        if _is_twin(axis, part, parts.seen):
            continue
        if len(axis.tokens.on(part)) > 1:
            return "a mask that differs from query to query has no merged form"
        if not _is_vector(axis, part):
            return "a boolean mask that is not [batch, 1, 1, tokens] has no merged form"
    if len({origin(part) for part in parts.seen}) > 1:
        return "two masks hide tokens, and one size cannot stand for both"
    return next((reason for part in parts.added if (reason := _may_hide(part))), "")


def _is_vector(axis: TokenAxis, mask: Node) -> bool:
    """Tell whether a condition is [B, 1, 1, N]: it hides keys alone, the same for all heads."""
    sizes = shape(mask)
    if set(axis.tokens.on(mask)) != {len(sizes) - 1} or len(sizes) != 4:
        return False
    return not same_size(sizes[0], 1) and all(same_size(size, 1) for size in sizes[1:3])


def _is_twin(axis: TokenAxis, part: Node, seen: tuple[Node, ...]) -> bool:
    """Tell whether a condition hides, of the queries, just those that another hides of the keys."""
    if set(axis.tokens.on(part)) != {len(shape(part)) - 2}:
        return False
    others = (other for other in seen if other is not part and _is_vector(axis, other))
    return any(same_condition(part, other) for other in others)


def _may_hide(bias: Node) -> str:
    """Say why a bias may hide tokens in place of weighing them, or ""."""
    if value(bias).dtype == torch.bool or _is_cast(bias):
        return ""  # it counts as 0 and 1
    fixed = constant_value(bias)
    if fixed is not None:
        hides = _least(fixed) <= HIDES
        return "an additive mask hides tokens, which sizes cannot show" if hides else ""
    for node in _mask_like(bias):
        if node.op == "placeholder":
            return "an additive mask made from inputs may hide tokens, which sizes cannot show"
        table = _table(node)
        held = None if table is None else constant_value(table)
        numbers = [arg for arg in node.args if isinstance(arg, (int, float))]
        if min(numbers, default=0) <= HIDES or (held is not None and _least(held) <= HIDES):
            return "an additive mask of unknown values may hide tokens, which sizes cannot show"
    return ""


def _is_cast(bias: Node) -> bool:
    """Tell whether a bias is a condition as a number."""
    inner = bias.args[0] if bias.target is aten.to.dtype else None
    return is_tensor(inner) and value(inner).dtype == torch.bool


def _table(node: Node) -> Node | None:
    """Return a weight, or the one that an embedding reads."""
    table = node.args[0] if family(node) == "embedding" else node
    return table if isinstance(table, Node) and table.op == "get_attr" else None


def _least(held: torch.Tensor) -> float:
    return float(held.min()) if held.numel() and not held.is_complex() else 0.0


def _mask_like(bias: Node) -> Iterator[Node]:
    """Iterate over what a bias is made of, up to learned features."""
    todo, known = [bias], set[Node]()
    while todo:
        node = todo.pop()
        if node in known or not is_tensor(node):
            continue
        known.add(node)
        yield node
        if family(node) not in ACTIVATIONS:
            todo += node.all_input_nodes
