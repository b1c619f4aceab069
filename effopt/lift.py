"""Lift: bring a value that carries tokens to a later epoch, where it is read."""

import torch
from torch.fx import Node

from effopt.axes import leaves
from effopt.edit import Edit
from effopt.effects import Range
from effopt.errors import PreconditionError
from effopt.kernel import kernel
from effopt.program import shape, value, where
from effopt.sites import TokenAxis
from effopt.state import Length, Reduction, State

aten = torch.ops.aten


def layout(axis: TokenAxis, node: Node) -> int | None:
    """Return the dimension of a value that is the batch, or None for one that all samples share."""
    dims = axis.tokens.axes.of(node)
    rows = batch_dim(axis)
    found = [place for place, dim in enumerate(dims) if dim == rows]
    return found[0] if found and rows else None


def batch_dim(axis: TokenAxis) -> tuple[object, ...]:
    """Return the identity of the batch: the first dimension of the attention's queries."""
    first = axis.sites[0]
    return leaves(axis.tokens.axes.of(first.node)[first.places[0]])


def lengths_of(edit: Edit, x: Node, place: int) -> Length:
    """Return the length of a dimension: the number if it is fixed, else a node."""
    size = shape(x)[place]
    return size if isinstance(size, int) else edit.call(aten.sym_size.int, x, place)


def to_rows(edit: Edit, x: Node, places: tuple[int, int, int]) -> Node:
    """Turn a value of the residual stream into [B, N, C]; `places` are where those are."""
    return x if places == (0, 1, 2) else edit.call(aten.permute.default, x, list(places))


def to_stream(edit: Edit, rows: Node, places: tuple[int, int, int]) -> Node:
    """Turn [B, N, C] back into the layout of the residual stream."""
    back = [places.index(place) for place in range(3)]
    return rows if back == [0, 1, 2] else edit.call(aten.permute.default, rows, back)


class Lift:
    """Reduces values of earlier epochs; what needs no reader's layout is done once."""

    def __init__(self, edit: Edit, state: State) -> None:
        self.edit = edit
        self.state = state

    def __call__(self, node: Node, reader: Node, epoch: int) -> Node:
        """Return a value at an epoch; new nodes go where the edit inserts."""
        known = self.state.latest(node)
        if self.state.has(node, epoch):
            return self.state.at(node, epoch)
        spots = self.state.axis.tokens.on(node)
        if self._protected(spots):
            return self.state.at(node, known)
        shared = layout(self.state.axis, node) is None
        made = self.state.at(node, known)
        for step in range(known, epoch):
            made = self._step(made, node, reader, step, shared and step == known)
        if not shared:
            self.state.keep(node, epoch, made)
        return made

    def part_of(self, whole: Node, spot: Range) -> Node:
        """Cut a [B, K] value (sizes, places) to the tokens of a range."""
        start, stop = edges(spot, self.state.axis)
        if (start, stop) == (0, None):
            return whole
        end = 2**63 - 1 if stop is None else stop
        return self.edit.call(aten.slice.Tensor, whole, 1, start, end)

    def _protected(self, spots: dict[int, Range | str]) -> bool:
        """Tell whether only tokens are concerned that no reduction touches."""
        axis = self.state.axis
        return all(isinstance(s, Range) and not covers(s, axis) for s in spots.values())

    def _step(self, made: Node, node: Node, reader: Node, step: int, shared: bool) -> Node:
        reduction = self.state.reductions[step]
        axis = self.state.axis
        if self._is_residual(node):
            places = axis.sites[0].places
            rows = to_rows(self.edit, made, places)
            return to_stream(self.edit, reduction.combine(self.edit, rows), places)
        spots = axis.tokens.on(node)
        batch, shift = layout(axis, node), 0
        if batch is None:
            batch, shift = self._batch_place(node, reader)
        if shared:
            for _ in range(shift):
                made = self.edit.call(aten.unsqueeze.default, made, 0)
        for place, spot in spots.items():
            made = self._gather(made, place + shift, batch, spot, reduction, reader)
        return made

    def _is_residual(self, node: Node) -> bool:
        """Tell whether a value has the dims of the residual stream: then it is averaged."""
        site = self.state.axis.sites[0]
        dims, own = (self.state.axis.tokens.axes.of(n) for n in (node, site.node))
        return dims == own and bool(value(node).is_floating_point())

    def _batch_place(self, node: Node, reader: Node) -> tuple[int, int]:
        """Find where the batch goes in a shared value: where the reader's result has it."""
        target = layout(self.state.axis, reader)
        if target is None:
            reason = f"{node.name} is read where no dimension is the batch"
            raise PreconditionError(where(reader), reason, "leave the sites ahead of it out")
        missing = len(shape(reader)) - len(shape(node))
        pad = max(missing - target, 0)
        return target - missing + pad, pad

    def _gather(
        self, made: Node, place: int, rows: int, spot: Range | str, done: Reduction, reader: Node
    ) -> Node:
        if not isinstance(spot, Range) or not spot.pure:
            reason = "the tokens share a dimension with another axis in a value it reads"
            raise PreconditionError(where(reader), reason, "leave the sites ahead of it out")
        index = self.part_of(done.kept, spot)
        start, _ = edges(spot, self.state.axis)
        if start:
            index = self.edit.call(aten.sub.Tensor, index, start)
        return gather(self.edit, made, index, place, rows)


def gather(edit: Edit, x: Node, index: Node, place: int, rows: int) -> Node:
    """Take tokens `index` [B, K] along dimension `place` of a value whose batch is at `rows`."""
    op = kernel("gather_tokens").op
    if rows == 0:
        return edit.call(op, x, index, place)
    turned = edit.call(aten.transpose.int, x, 0, rows)
    gathered = edit.call(op, turned, index, place if place else rows)
    return edit.call(aten.transpose.int, gathered, 0, rows)


def covers(spot: Range, axis: TokenAxis) -> bool:
    """Tell whether a range holds the tokens that can be removed."""
    if isinstance(spot.stop, int) and spot.stop <= axis.prefix:
        return False
    behind = axis.size - spot.start
    return not (isinstance(behind, int) and behind <= axis.suffix)


def edges(spot: Range, axis: TokenAxis) -> tuple[int, int | None]:
    """Return start and stop of a range that covers the removable tokens, valid at every epoch.

    The start counts from the front; the stop is None or negative, from the end.
    """
    start = spot.start
    behind = axis.size - spot.stop
    fixed = behind if isinstance(behind, int) else int(behind.node.expr)
    assert isinstance(start, int)
    return start, None if fixed == 0 else -fixed
