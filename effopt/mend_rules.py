"""What mending changes in the arguments of single operators: sizes, picks, slices, means."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import Argument

from effopt.axes import same_size
from effopt.axis_parts import slice_edges
from effopt.axis_rules import dim_arg, first
from effopt.edit import Edit
from effopt.errors import PreconditionError
from effopt.lift import covers, fixed_int
from effopt.program import shape, value
from effopt.sites import TokenAxis
from effopt.state import Length, State
from effopt.tokens import Range

aten = torch.ops.aten
END = 2**63 - 1
"""What `slice` takes for "to the end"."""

SizeRule = Callable[[Edit, State, Node, tuple[Argument, ...], int], tuple[Argument, ...]]


def _sizes(place: int, first_dim: Callable[[Node], int]) -> SizeRule:
    """Make the rule of an operator whose argument `place` lists sizes of its result."""

    def rule(
        edit: Edit, state: State, node: Node, args: tuple[Argument, ...], epoch: int
    ) -> tuple[Argument, ...]:
        given = args[place]
        assert isinstance(given, (list, tuple))
        start, entries = first_dim(node), list(given)
        for spot_place, spot in state.axis.tokens.on(node).items():
            entry = spot_place - start
            if 0 <= entry < len(entries) and entries[entry] != -1:
                assert isinstance(spot, Range)
                entries[entry] = _entry(edit, state, node, spot_place, spot, epoch)
        return (*args[:place], entries, *args[place + 1 :])

    return rule


def _entry(edit: Edit, state: State, node: Node, place: int, spot: Range, epoch: int) -> Length:
    """Compute the size of a dimension that counts tokens, possibly times other axes."""
    length = length_of(edit, state, spot, epoch)
    if spot.pure:
        return length
    tokens = state.axis.tokens
    fixed, rest = 1, list[Any]()
    for axis in tokens.axes.of(node)[place]:
        if axis in tokens.dim:
            continue
        if isinstance(axis.size, int):
            fixed *= axis.size
        else:
            rest.append(axis.size)
    total: Length = (
        edit.call(operator.mul, length, fixed) if isinstance(length, Node) else length * fixed
    )
    for size in rest:
        total = edit.call(operator.mul, total, size_node(edit, size))
    return total


def length_of(edit: Edit, state: State, spot: Range, epoch: int) -> Length:
    """Return how many tokens of a range are left at an epoch."""
    axis, now = state.axis, state.lengths[epoch]
    if not covers(spot, axis):
        return int(spot.stop - spot.start)
    fixed = fixed_int(axis.size - (spot.stop - spot.start))
    if fixed is None:
        reason = f"a range of {axis.name} has a length of its own"
        raise PreconditionError(axis.name, reason, "leave 'length' out of dynamic")
    if isinstance(now, int):
        return now - fixed
    return edit.call(operator.sub, now, fixed) if fixed else now


def size_node(edit: Edit, size: Any) -> Node:
    """Find or make a node that yields a symbolic size of an input."""
    for node in edit.graph.nodes:
        sizes = shape(node) if node.op == "placeholder" else ()
        for place, own in enumerate(sizes):
            if not isinstance(own, int) and same_size(own, size):
                return edit.call(aten.sym_size.int, node, place)
    reason = f"the size {size} is computed by the model, and no input has it"
    raise PreconditionError("model", reason, "leave the sites ahead of it out")


SIZES: dict[Any, SizeRule] = {
    aten.reshape.default: _sizes(1, lambda node: 0),
    aten.expand.default: _sizes(1, lambda node: 0),
    aten.broadcast_to.default: _sizes(1, lambda node: 0),
    aten.unflatten.int: _sizes(2, lambda node: dim_arg(node, 1)),
}
"""Operators that name the sizes of their result."""


def pick_args(node: Node, axis: TokenAxis) -> tuple[int, int]:
    """Return dimension and index of a `select` after a reduction: both ends stay where they are."""
    place = dim_arg(node, 1)
    spot, index = axis.tokens.on(first(node))[place], node.args[2]
    assert isinstance(spot, Range)
    assert isinstance(index, int)
    if index < 0 or (isinstance(spot.start, int) and spot.start + index < axis.prefix):
        return place, index
    return place, int(index - (spot.stop - spot.start))


def slice_args(node: Node, axis: TokenAxis) -> tuple[int, int, int]:
    """Return dimension, start and stop of a slice after a reduction."""
    place = dim_arg(node, 1)
    spot = axis.tokens.on(first(node))[place]
    assert isinstance(spot, Range)
    start, stop = slice_edges(node, spot.start, spot.stop)
    low, high = (_edge(edge, spot, axis) for edge in (start, stop))
    return place, low, END if high == 0 and not same_size(stop, spot.start) else high


def _edge(edge: Any, spot: Range, axis: TokenAxis) -> int:
    """Count an edge from the front where that is protected, else from the end (negative or 0)."""
    if isinstance(edge, int) and edge <= axis.prefix:
        return int(edge - spot.start)
    behind = fixed_int(spot.stop - edge)
    if behind is None:
        reason = f"a slice of {axis.name} ends at a place that depends on the length"
        raise PreconditionError(axis.name, reason, "leave 'length' out of dynamic")
    return -behind


def pool(edit: Edit, node: Node, x: Node, weights: Node, place: int, rows: int) -> Node:
    """Average or sum over tokens weighted by size: Σ s x / Σ s, the mean over the originals."""
    rank = len(shape(x))
    ahead, behind = sorted((rows, place))
    wide = weights if rows < place else edit.call(aten.transpose.int, weights, 0, 1)
    for spot in range(rank):
        if spot not in (ahead, behind):
            wide = edit.call(aten.unsqueeze.default, wide, spot)
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    product = edit.call(aten.mul.Tensor, x, wide)
    pooled = edit.call(aten.sum.dim_IntList, product, [place], keep)
    if node.target is not aten.sum.dim_IntList:
        count = edit.call(aten.sum.dim_IntList, wide, [place], keep)
        floor = edit.call(aten.clamp_min.default, count, 1e-6)
        pooled = edit.call(aten.div.Tensor, pooled, floor)
    dtype = value(node).dtype
    if value(pooled).dtype == dtype:
        return pooled
    if not dtype.is_floating_point:
        pooled = edit.call(aten.round.default, pooled)
    return edit.call(aten.to.dtype, pooled, dtype)
