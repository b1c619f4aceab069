"""Attention in four dimensions: operands, biases and masks brought to [batch, head, n, m]."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from effopt.axes import AxisMap, Size, same_size, same_sizes
from effopt.edit import Edit
from effopt.passes.attention_logits import Bias, Hidden, Logits
from effopt.passes.attention_products import Operand
from effopt.program import shape, value

aten = torch.ops.aten
VIEWS = (aten.reshape.default, aten.view.default)
TURNS = (aten.transpose.int, aten.permute.default)
Lead = tuple[Size, Size]
"""The sizes of batch and head."""


class UnfitError(Exception):
    """An attention that has no form in four dimensions; the message says why."""


def find_lead(out: Node, near: Sequence[Node], axes: AxisMap | None) -> Lead:
    """Find batch and head of a product [..., n, m].

    Three dimensions hold both in one: `near`, the values around the attention, may show them
    apart; the axes of the product tell otherwise.
    """
    sizes = shape(out)
    if len(sizes) == 4:
        return _checked(sizes[0], sizes[1])
    if len(sizes) != 3:
        raise UnfitError(f"its product has {len(sizes)} dimensions")
    for node in near:
        other = shape(node)
        if same_size(other[0] * other[1], sizes[0]):
            return _checked(other[0], other[1])
    return _lead_by_axes(out, axes)


def _checked(batch: Size, heads: Size) -> Lead:
    if not isinstance(heads, int):
        raise UnfitError(f"its number of heads, {heads}, is not fixed")
    return batch, heads


def _lead_by_axes(out: Node, axes: AxisMap | None) -> Lead:
    """Read the leading dimension as a product, with the batch outermost and the heads innermost."""
    dim = axes.of(out)[0] if axes is not None and out in axes.dims else ()
    if (len(dim) > 1 and not isinstance(dim[0].size, int)) or len(dim) == 2:
        batch: Size = math.prod(axis.size for axis in dim[:-1])
        return _checked(batch, dim[-1].size)
    if len(dim) == 1 and not dim[0].segments:
        return dim[0].size, 1
    raise UnfitError("its samples and heads are one dimension that cannot be told apart")


def four(edit: Edit, operand: Operand, lead: Lead) -> Node:
    """Bring an operand [..., n, d] to four dimensions, reading through views where they fit."""
    node, order = operand.node, operand.order
    if len(order) == 4:
        return turned(edit, node, order)
    if order[0] != 0:
        node, order = turned(edit, node, order), (0, 1, 2)
    source, turn = _unturned(node, order)
    inner = source.args[0] if source.target in VIEWS else None
    if isinstance(inner, Node) and turn[0] == 0 and _splits(inner, source, lead):
        return turned(edit, inner, (0, 1, turn[1] + 1, turn[2] + 1))
    return split_lead(edit, turned(edit, node, order), lead[1])


def _splits(inner: Node, outer: Node, lead: Lead) -> bool:
    """Tell whether a view joined [batch, head, x, y] to [batch · head, x, y]."""
    before, after = shape(inner), shape(outer)
    return same_sizes(before, (*lead, *after[1:]))


def _unturned(node: Node, order: tuple[int, ...]) -> tuple[Node, tuple[int, ...]]:
    """Follow transpositions backward to what they read, and the order in which to read it."""
    while node.target in TURNS and order != tuple(range(len(order))):
        inner, moved = node.args[0], _order_of(node)
        assert isinstance(inner, Node)
        node, order = inner, tuple(moved[place] for place in order)
    return node, order


def _order_of(node: Node) -> tuple[int, ...]:
    """Return which dimension of its argument each dimension of a transposition is."""
    rank = len(shape(node))
    if node.target is aten.permute.default:
        given = node.args[1]
        assert isinstance(given, (list, tuple))
        return tuple(place % rank for place in given if isinstance(place, int))
    order = list(range(rank))
    a, b = (place % rank for place in node.args[1:3] if isinstance(place, int))
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def turned(edit: Edit, node: Node, order: tuple[int, ...]) -> Node:
    """Read a tensor in another order, through its own transpositions where they undo it."""
    node, order = _unturned(node, order)
    places = [place for place, source in enumerate(order) if place != source]
    if not places:
        return node
    if len(places) == 2:
        return edit.call(aten.transpose.int, node, *places)
    return edit.call(aten.permute.default, node, [*order])


def split_lead(edit: Edit, node: Node, heads: int) -> Node:
    """[batch · head, n, d] to [batch, head, n, d]."""
    if heads == 1:
        return edit.call(aten.unsqueeze.default, node, 1)
    tail = [_size(edit, node, place) for place in (1, 2)]
    return edit.call(aten.reshape.default, node, [-1, heads, *tail])


def joined(edit: Edit, node: Node, rank: int) -> Node:
    """Join batch and head again where the attention had them as one dimension."""
    if rank == 4:
        return node
    if same_size(shape(node)[1], 1):
        return edit.call(aten.squeeze.dim, node, 1)
    tail = [_size(edit, node, place) for place in (2, 3)]
    return edit.call(aten.reshape.default, node, [-1, *tail])


def around(operands: Sequence[Operand], path: Sequence[Node], out: Node) -> list[Node]:
    """Return the values in four dimensions that an attention in three was or is viewed as."""
    found = [node for node in path if len(shape(node)) == 4]
    for operand in operands:
        node, _ = _unturned(operand.node, operand.order)
        inner = node.args[0] if node.target in VIEWS else None
        if isinstance(inner, Node) and _keeps_tail(inner, node):
            found.append(inner)
    found += [user for user in out.users if user.target in VIEWS and _keeps_tail(user, out)]
    return found


def _keeps_tail(four_: Node, three: Node) -> bool:
    sizes = shape(four_)
    return len(sizes) == 4 and same_sizes(sizes[2:], shape(three)[-2:])


def _size(edit: Edit, node: Node, place: int) -> int | Node:
    """Return a size as an argument: itself, or a node that reads it."""
    place %= len(shape(node))
    size = shape(node)[place]
    return size if isinstance(size, int) else edit.call(aten.sym_size.int, node, place)


def spread(edit: Edit, operands: tuple[Node, ...]) -> tuple[Node, ...]:
    """Repeat batch and head of size 1 as the product would have broadcast them."""
    largest = [
        next((node for node in operands if not same_size(shape(node)[place], 1)), operands[0])
        for place in (0, 1)
    ]
    result = []
    for node in operands:
        sizes = [
            -1 if same_size(shape(node)[place], shape(other)[place]) else _size(edit, other, place)
            for place, other in enumerate(largest)
        ]
        same = sizes == [-1, -1]
        result.append(node if same else edit.call(aten.expand.default, node, [*sizes, -1, -1]))
    return tuple(result)


def mask_for(edit: Edit, logits: Logits, q: Node, lead: Lead) -> Node | None:
    """Make the mask of an attention call: boolean if nothing is added, else all of it added up."""
    seen = [(_condition(edit, term, logits, lead), term.low) for term in logits.hidden]
    total: Node | None = None
    for bias in logits.biases:
        term = bias_for(edit, bias, logits, q, lead)
        total = term if total is None else edit.call(aten.add.Tensor, total, term)
    if total is None:
        mask: Node | None = None
        for condition, _ in seen:
            both = (mask, condition)
            mask = condition if mask is None else edit.call(aten.logical_and.default, *both)
        return mask
    for condition, low in seen:
        least = low if low == -math.inf else max(low, torch.finfo(value(q).dtype).min)
        term = edit.call(aten.where.Scalar, condition, 0.0, least)
        if value(term).dtype != value(q).dtype:
            term = edit.call(aten.to.dtype, term, value(q).dtype)
        total = edit.call(aten.add.Tensor, total, term)
    return total


def bias_for(edit: Edit, bias: Bias, logits: Logits, q: Node, lead: Lead) -> Node:
    """Bring a bias to four dimensions, and scale it as the logits were scaled after it."""
    node = four_mask(edit, bias.node, bias.at, logits.path, lead)
    if bias.factor != 1:
        node = edit.call(aten.mul.Tensor, node, bias.factor)
    return _cast(edit, node, q)


def _cast(edit: Edit, node: Node, q: Node) -> Node:
    """Give what is added the type of the queries; one that would be rounded has no such form."""
    before, after = value(node).dtype, value(q).dtype
    if torch.promote_types(before, after) != after:
        raise UnfitError(f"{node.name}, of {before}, is added to logits of {after}")
    return node if before == after else edit.call(aten.to.dtype, node, after)


def _condition(edit: Edit, term: Hidden, logits: Logits, lead: Lead) -> Node:
    """Bring a condition to four dimensions; True means attend."""
    node = term.node
    if not term.seen:
        inverse = (aten.logical_not.default, aten.bitwise_not.default)
        inner = node.args[0] if node.target in inverse else None
        undone = isinstance(inner, Node) and value(inner).dtype == torch.bool
        node = inner if undone else edit.call(aten.logical_not.default, node)  # type: ignore[assignment]
    return four_mask(edit, node, term.at, logits.path, lead)


def four_mask(edit: Edit, node: Node, at: Node, path: Sequence[Node], lead: Lead) -> Node:
    """Bring what met the logits at `at` to four dimensions, as small as it was."""
    grouped = shape(at)[:-2]
    node = _padded(edit, node, max(len(grouped), 2) + 2 if len(grouped) != 1 else 3)
    if len(grouped) == 2:
        return node
    if len(grouped) == 1:
        if same_size(shape(node)[0], 1):
            return edit.call(aten.unsqueeze.default, node, 1)
        return split_lead(edit, node, lead[1])
    return _join_lead(edit, node, at, path, lead)


def _padded(edit: Edit, node: Node, rank: int) -> Node:
    while len(shape(node)) < rank:
        node = edit.call(aten.unsqueeze.default, node, 0)
    return node


def _join_lead(edit: Edit, node: Node, at: Node, path: Sequence[Node], lead: Lead) -> Node:
    """[batch, window, head, n, m] to [batch · window, head, n, m]; size 1 in both stays 1."""
    sizes, cut = shape(at)[:-2], cut_of(at, lead)
    own, wanted, grouped = shape(node), list[Any](), list[Any]()
    written = _written(at, path)
    for places in (range(cut), range(cut, len(sizes))):
        single = all(same_size(own[place], 1) for place in places)
        grouped.append(1 if single else lead[1] if grouped else -1)
        for place in places:
            full = single or same_size(own[place], sizes[place])
            wanted.append(-1 if full else written[place])
    if None in wanted:
        raise UnfitError(f"{at.name} has a size that no value gives")
    if any(size != -1 for size in wanted):
        node = edit.call(aten.expand.default, node, [*wanted, -1, -1])
    tail = [_size(edit, node, place) for place in (-2, -1)]
    return edit.call(aten.reshape.default, node, [*grouped, *tail])


def cut_of(at: Node, lead: Lead) -> int:
    """Find how many of the leading dimensions of logits make up the batch."""
    sizes = shape(at)[:-2]
    for cut in range(len(sizes) + 1):
        if same_size(math.prod(sizes[:cut]), lead[0]) and same_size(
            math.prod(sizes[cut:]), lead[1]
        ):
            return cut
    raise UnfitError(f"{at.name} groups samples and heads in another way")


def _written(at: Node, path: Sequence[Node]) -> list[Any]:
    """Return the sizes that the model's own view of the logits was written with."""
    views = [node for node in path[: path.index(at) + 1] if node.target in VIEWS]
    given = views[-1].args[1] if views else ()
    assert isinstance(given, (list, tuple))
    return [
        size if isinstance(size, int) else arg if isinstance(arg, Node) else None
        for size, arg in zip(shape(at), given, strict=True)
    ]
