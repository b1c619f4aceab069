"""Lift: bring a value that carries tokens to a later epoch, where it is read."""

import torch
from torch.fx import Node

from effopt.axes import Size, size_of
from effopt.conditions import same_condition
from effopt.edit import Edit
from effopt.errors import PreconditionError
from effopt.kernel import kernel
from effopt.program import shape, value, where
from effopt.sites import TokenAxis
from effopt.state import Length, Reduction, State
from effopt.tokens import Range

aten = torch.ops.aten
LEAVE_OUT = "leave the sites ahead of it out (options first, last or sites)"


def layout(axis: TokenAxis, node: Node) -> int | None:
    """Return the dimension of a value that is the batch, or None for one that all samples share."""
    dims = axis.tokens.axes.of(node)
    rows = axis.tokens.batch
    found = [place for place, dim in enumerate(dims) if dim == rows]
    return found[0] if found and rows else None


def rows_of(axis: TokenAxis, node: Node) -> tuple[int, int] | None:
    """Return the dimension whose outer factor is the batch, and the size of what is inside it.

    Heads or windows often share a dimension with the batch: each sample has several rows there.
    """
    rows, dims = axis.tokens.batch, axis.tokens.axes.of(node)
    for place, dim in enumerate(dims):
        if rows and dim[: len(rows)] == rows:
            inner = size_of(dim[len(rows) :])
            if isinstance(inner, int):
                return place, inner
    if any(factor in rows for dim in dims for factor in dim):
        reason = "the samples are laid out inside of another dimension"
        raise PreconditionError(where(node), reason, LEAVE_OUT)
    return None


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
        self.made: dict[tuple[Node, int, int, int, int], Node] = {}
        self.averages: dict[tuple[Node, int], Node] = {}
        self.places: dict[tuple[int, int], Node] = {}

    def __call__(self, node: Node, reader: Node, epoch: int) -> Node:
        """Return a value at an epoch; new nodes go where the edit inserts."""
        known = self.state.latest(node)
        if known == epoch:
            return self.state.at(node, epoch)
        spots = self.state.axis.tokens.on(node)
        if self._protected(spots):
            return self.state.at(node, known)
        if self._is_averaged(node, reader):
            # Kept apart from what is gathered: the same value can be read in both ways.
            if (node, epoch) not in self.averages:
                made = self.state.at(node, known)
                for step in range(known, epoch):
                    made = self._averaged(made, node, reader, self.state.reductions[step])
                self.averages[node, epoch] = made
            return self.averages[node, epoch]
        return self._gathered(node, reader, known, epoch)

    def part_of(self, whole: Node, spot: Range, place: int = 1) -> Node:
        """Cut a value (sizes and places [B, K]) to the tokens of a range along a dimension."""
        start, stop = edges(spot, self.state.axis)
        if (start, stop) == (0, None):
            return whole
        end = 2**63 - 1 if stop is None else stop
        return self.edit.call(aten.slice.Tensor, whole, place, start, end)

    def _protected(self, spots: dict[int, Range | str]) -> bool:
        """Tell whether only tokens are concerned that no reduction touches."""
        axis = self.state.axis
        return all(isinstance(s, Range) and not covers(s, axis) for s in spots.values())

    def _is_averaged(self, node: Node, reader: Node) -> bool:
        """Tell whether merging averages a value: the residual stream, or weights in the head.

        What an attention call still reads (positions, types) is taken at the token that stays.
        """
        if self._is_residual(node):
            return True
        merging = self.state.sizes[self.state.latest(node) + 1] is not None
        if not merging or reader in self.state.feeds_attention:
            return False
        if bool(value(node).is_floating_point()):
            return True
        if self.state.padding is None or same_condition(node, self.state.padding) is None:
            reason = f"{node.name} marks tokens one by one, and merged ones have no mark"
            raise PreconditionError(where(reader), reason, LEAVE_OUT)
        return False

    def _averaged(self, made: Node, node: Node, reader: Node, done: Reduction) -> Node:
        """Average a value over the groups of a reduction, weighted by size."""
        places, rank = self.state.axis.stream.places, len(shape(made))
        if self._is_residual(node):
            stream = to_rows(self.edit, made, places)
            return to_stream(self.edit, done.combine(self.edit, stream), places)
        spots = list(self.state.axis.tokens.on(node).items())
        rows = rows_of(self.state.axis, node)
        place, spot = spots[0]
        plain = isinstance(spot, Range) and spot.pure and edges(spot, self.state.axis) == (0, None)
        if (
            len(spots) > 1
            or not plain
            or place != rank - 2 + (rank == 2)
            or rows not in ((0, 1), None)
        ):
            reason = f"{node.name} weighs tokens in a layout that has no merged form"
            raise PreconditionError(where(reader), reason, LEAVE_OUT)
        if rows is None:
            made = self._spread(made, rank, done)
        flat = made if len(shape(made)) == 3 else self.edit.call(aten.unsqueeze.default, made, 2)
        merged = done.combine(self.edit, flat)
        return merged if flat is made else self.edit.call(aten.squeeze.dim, merged, 2)

    def _spread(self, made: Node, rank: int, done: Reduction) -> Node:
        """Give [N, C] or [1, N, C] that all samples share a row for each of them."""
        if rank == 2:
            made = self.edit.call(aten.unsqueeze.default, made, 0)
        rows = lengths_of(self.edit, done.kept, 0)
        return self.edit.call(aten.expand.default, made, [rows, -1, -1])

    def _gathered(self, node: Node, reader: Node, known: int, epoch: int) -> Node:
        """Take a value at the tokens that stand for those of an epoch."""
        axis, spots = self.state.axis, self.state.axis.tokens.on(node)
        rows, shift = rows_of(axis, node), 0
        if rows is None:
            rows, shift = self._batch_place(node, reader)
        batch, inner = rows
        key = (node, epoch, *rows, shift)
        if key not in self.made:
            made = self.state.at(node, known)
            for _ in range(shift):
                made = self.edit.call(aten.unsqueeze.default, made, 0)
            index = repeated(self.edit, self._places(known, epoch), inner)
            for place, spot in spots.items():
                made = self._gather(made, place + shift, batch, spot, index, reader)
            self.made[key] = made
        return self.made[key]

    def _places(self, known: int, epoch: int) -> Node:
        """Compose the places of the tokens kept since an epoch: [B, K], counted in its tokens."""
        if (known, epoch) not in self.places:
            last = self.state.reductions[epoch - 1].kept
            if epoch > known + 1:
                before = self._places(known, epoch - 1)
                last = self.edit.call(kernel("gather_tokens").op, before, last, 1)
            self.places[known, epoch] = last
        return self.places[known, epoch]

    def _is_residual(self, node: Node) -> bool:
        """Tell whether a value has the dims of the residual stream: then it is averaged."""
        site = self.state.axis.stream
        dims, own = (self.state.axis.tokens.axes.of(n) for n in (node, site.node))
        return dims == own and bool(value(node).is_floating_point())

    def _batch_place(self, node: Node, reader: Node) -> tuple[tuple[int, int], int]:
        """Find where the batch goes in a shared value: where the reader's result has it."""
        found = rows_of(self.state.axis, reader)
        if found is None:
            reason = f"{node.name} is read where no dimension is the batch"
            raise PreconditionError(where(reader), reason, LEAVE_OUT)
        target, inner = found
        missing = len(shape(reader)) - len(shape(node))
        pad = max(missing - target, 0)
        return (target - missing + pad, inner), pad

    def _gather(
        self, made: Node, place: int, rows: int, spot: Range | str, index: Node, reader: Node
    ) -> Node:
        if not isinstance(spot, Range) or not spot.pure:
            reason = "the tokens share a dimension with another axis in a value it reads"
            raise PreconditionError(where(reader), reason, LEAVE_OUT)
        index = self.part_of(index, spot)
        start, _ = edges(spot, self.state.axis)
        if start:
            index = self.edit.call(aten.sub.Tensor, index, start)
        return gather(self.edit, made, index, place, rows)


def repeated(edit: Edit, index: Node, times: int) -> Node:
    """Repeat each row of an index [B, K] for the rows that a sample has: [B * times, K]."""
    return index if times == 1 else edit.call(aten.repeat_interleave.self_int, index, times, 0)


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
    behind = fixed_int(axis.size - spot.start)
    return behind is None or behind > axis.suffix


def edges(spot: Range, axis: TokenAxis) -> tuple[int, int | None]:
    """Return start and stop of a range that covers the removable tokens, valid at every epoch.

    The start counts from the front; the stop is None or negative, from the end.
    """
    start, behind = fixed_int(spot.start), fixed_int(axis.size - spot.stop)
    if start is None or behind is None:
        reason = f"a range of {axis.name} has ends that depend on the length"
        raise PreconditionError(axis.name, reason, "leave 'length' out of dynamic")
    return start, None if behind == 0 else -behind


def fixed_int(size: Size) -> int | None:
    """Return a size that is the same for every input, None for another."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_Integer else None
