"""Restore: give a value that must name every token its full length back."""

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from effopt.axes import same_size
from effopt.axis_table import family
from effopt.conditions import same_condition
from effopt.edit import Edit
from effopt.errors import PreconditionError
from effopt.kernel import kernel
from effopt.lift import (
    LEAVE_OUT,
    Lift,
    covers,
    edges,
    gather,
    repeated,
    rows_of,
    to_rows,
    to_stream,
)
from effopt.program import shape, where
from effopt.state import State
from effopt.tokens import Kind, Range

aten = torch.ops.aten
REMEDY = "merge or fuse the tokens in place of dropping them: then they are copied back"


class Restore:
    """Gives values their original length back; each is restored once.

    After merging, every token gets a copy of what it merged into. After dropping, the residual
    stream gets the dropped tokens back with the value that they left with. What maps tokens one by
    one between there and a value that is needed whole runs again, on all tokens.
    """

    def __init__(self, edit: Edit, state: State) -> None:
        self.edit = edit
        self.state = state
        self.made: dict[Node, Node] = {}
        self.maps: dict[int, Node] = {}
        self.stream: set[Node] | None = None
        self.marked: dict[Node, bool] = {}

    def __call__(self, out: Node) -> Node:
        """Return a value with all its tokens; new nodes go where the edit inserts."""
        if out not in self.made:
            self.made[out] = self._whole(out, self.state.latest(out))
        return self.made[out]

    def _whole(self, out: Node, epoch: int) -> Node:
        axis, reductions = self.state.axis, self.state.reductions
        while epoch and self.state.places[epoch - 1] is out and reductions[epoch - 1].group is None:
            epoch -= 1  # those that were dropped here left with the value that is asked for
        spots = axis.tokens.on(out).values()
        if not epoch or all(isinstance(s, Range) and not covers(s, axis) for s in spots):
            return self.state.at(out, epoch)
        merged = all(reduction.group for reduction in reductions[:epoch])
        if merged and self._marks_its_own(out):
            return self._rerun(out, merged)
        restored = self._copied(out, epoch) if merged else self._scattered(out, epoch)
        return restored or self._rerun(out, merged)

    def _marks_its_own(self, node: Node) -> bool:
        """Tell whether a head reads the padding mask for a value: each copy reads its own."""
        if node not in self.marked:
            effect = self.state.axis.effects.get(node)
            alone = effect is not None and effect.kind in (Kind.MAP, Kind.RANGE)
            in_head = alone and node not in self.state.feeds_attention
            reads = in_head and node in self.state.originals
            carried = [arg for arg in self.state.operands(node) if self.state.carries(arg)]
            self.marked[node] = reads and any(
                self._marks_its_own(arg) if self.state.latest(arg) else self._is_mask(arg)
                for arg in carried
            )
        return self.marked[node]

    def _is_mask(self, node: Node) -> bool:
        padding = self.state.padding
        return padding is not None and same_condition(node, padding) is not None

    def _copied(self, node: Node, epoch: int) -> Node | None:
        """Copy merged tokens back where they stand by themselves, with the batch."""
        spots, rows = self.state.axis.tokens.on(node), rows_of(self.state.axis, node)
        if rows is None or not all(isinstance(s, Range) and s.pure for s in spots.values()):
            return None
        made = self.state.at(node, epoch)
        for place, spot in spots.items():
            assert isinstance(spot, Range)
            index = repeated(self.edit, self._index(spot, epoch), rows[1])
            made = gather(self.edit, made, index, place, rows[0])
        return made

    def _index(self, spot: Range, epoch: int) -> Node:
        """Return, for each original token of a range, its place in the range at an epoch."""
        if epoch not in self.maps:
            self.maps[epoch] = group_map(self.edit, self.state, epoch)
        index = Lift(self.edit, self.state).part_of(self.maps[epoch], spot)
        start, _ = edges(spot, self.state.axis)
        return self.edit.call(aten.sub.Tensor, index, start) if start else index

    def _scattered(self, node: Node, epoch: int) -> Node | None:
        """Put dropped tokens back if a value is the residual stream."""
        if self.stream is None:
            self.stream = _stream_values(self.state)
        if not {node, *self.state.places[:epoch]} <= self.stream:
            return None
        if not self._fits_frozen(node, epoch):
            return None
        places = self.state.axis.stream.places
        whole = to_rows(self.edit, self.state.at(node, epoch), places)
        for reduction in reversed(self.state.reductions[:epoch]):
            if reduction.group is not None:
                raise PreconditionError(where(node), "tokens of it were fused", REMEDY)
            scatter = kernel("scatter_tokens").op
            whole = self.edit.call(scatter, reduction.frozen, whole, reduction.kept)
        return to_stream(self.edit, whole, places)

    def _fits_frozen(self, node: Node, epoch: int) -> bool:
        """Tell whether a value has the layout of the stream and the channels that were dropped."""
        site, dims = self.state.axis.stream, self.state.axis.tokens.axes.of
        rows, tokens, channels = site.places
        own, stream = dims(node), dims(site.node)
        if len(own) != 3 or (own[rows], own[tokens]) != (stream[rows], stream[tokens]):
            return False
        frozen = (reduction.frozen for reduction in self.state.reductions[:epoch])
        return all(same_size(shape(left)[2], shape(node)[channels]) for left in frozen)

    def _rerun(self, node: Node, merged: bool) -> Node:
        """Call an operator that maps tokens one by one again, on all tokens."""
        effect = self.state.axis.effects.get(node)
        if effect is None or effect.kind not in (Kind.MAP, Kind.RANGE):
            reason = "all tokens are needed of a value that is no function of each token alone"
            raise PreconditionError(where(node), reason, LEAVE_OUT if merged else REMEDY)
        args, kwargs = self.state.originals[node]

        def whole(arg: Node) -> Node:
            return self(arg) if self.state.carries(arg) else arg

        assert callable(node.target)
        new_args, new_kwargs = map_arg(args, whole), map_arg(kwargs, whole)
        return self.edit.call(node.target, *new_args, **new_kwargs)


def group_map(edit: Edit, state: State, epoch: int) -> Node:
    """Compose the maps of the sites: [B, N], the place at the epoch of each original token."""
    index: Node | None = None
    for reduction in state.reductions[:epoch]:
        assert reduction.group is not None
        step = reduction.group(edit)
        index = step if index is None else edit.call(kernel("gather_tokens").op, step, index, 1)
    assert index is not None
    return index


def _stream_values(state: State) -> set[Node]:
    """Find the values that the residual stream reaches from the first reduction by x + f(x).

    What maps all tokens in between (a norm between two stages) ends it: tokens that were dropped
    ahead of it have not been through it.
    """
    site = state.axis.stream
    tail = [node.target for node in _path(state, site.node, site.join)]
    stream = {state.places[0]}
    for node in state.axis.effects:
        if family(node) == "view" and _carried(state, node)[0] in stream:
            stream.add(node)
        elif node.target is aten.add.Tensor and _adds_to_stream(state, node, stream):
            for target in tail:
                node = next((user for user in node.users if user.target is target), node)
            stream.add(node)
    return stream


def _carried(state: State, node: Node) -> list[Node]:
    return [arg for arg in state.operands(node) if state.carries(arg)]


def _adds_to_stream(state: State, node: Node, stream: set[Node]) -> bool:
    """Tell whether a sum is one value of the stream and terms that are computed from it."""
    terms = _carried(state, node)
    while len(terms) > 1:  # of one, the other is added to all tokens alike
        own = [term for term in terms if term in stream]
        rest = [term for term in terms if term not in stream]
        if len(own) == 1 and rest and all(_comes_from(state, t, own[0], stream) for t in rest):
            return True
        sums = [t for t in terms if t.target is aten.add.Tensor and len(_carried(state, t)) == 2]
        if not sums or len(terms) > _TERMS:
            return False
        terms.remove(sums[0])
        terms += _carried(state, sums[0])
    return False


_TERMS = 8
"""Terms that a sum is taken apart into, at most: a parallel block has three."""


def _comes_from(state: State, term: Node, source: Node, stream: set[Node]) -> bool:
    """Tell whether a term reads the source and no other value of the stream.

    Masks and tables inside it do not matter: dropped tokens skip the whole term.
    """
    wanted = _unviewed(state, source)
    todo, known, found = [term], set[Node](), False
    while todo:
        node = todo.pop()
        if node in stream:
            if _unviewed(state, node) is not wanted:
                return False
            found = True
        elif node not in known:
            known.add(node)
            todo += _carried(state, node)
    return found


def _unviewed(state: State, node: Node) -> Node:
    """Return what a value of the stream is a view of."""
    while family(node) == "view":
        node = _carried(state, node)[0]
    return node


def _path(state: State, node: Node, join: Node) -> list[Node]:
    """Return the nodes behind the join up to a site's value."""
    found: list[Node] = []
    while node is not join:
        found.insert(0, node)
        node = next(arg for arg in state.operands(node) if state.carries(arg))
    return found
