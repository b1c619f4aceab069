"""Mend: the one forward walk that removes tokens and repairs all that depended on them.

A pass says at which sites, and chooses the tokens there (a `Reducer`). The walk then visits what
depends on the tokens, once, in execution order. Every value that carries tokens has an epoch: the
number of reductions that it has been through. An operator runs at the latest epoch among its
operands; operands of an earlier one are reduced where they are read, at the last moment.
"""

from collections.abc import Callable, Mapping

import torch
from torch.fx import Node
from torch.fx.node import Argument, map_arg

from effopt.attention import is_causal, mask_of, qkv_of, scale_of, with_mask
from effopt.axis_rules import dims_arg, tensors
from effopt.conditions import leaves_out
from effopt.counts import Counts
from effopt.edit import Edit
from effopt.errors import PreconditionError, VerificationError
from effopt.lift import LEAVE_OUT, Lift, covers, layout, lengths_of, to_rows, to_stream
from effopt.masks import find_padding, parts_of
from effopt.mend_rules import SIZES, pick_args, pool, slice_args
from effopt.program import shape, value, where
from effopt.restore import Restore
from effopt.sites import Site, TokenAxis
from effopt.state import Point, Reducer, State
from effopt.tokens import Kind, Range

aten = torch.ops.aten
LOWEST = -1e30
"""Log size of padding in place of -infinity: no logit comes near, and a row of pads is no NaN."""


def reduce_tokens(edit: Edit, axis: TokenAxis, reducers: Mapping[Site, Reducer]) -> set[Node]:
    """Remove tokens at sites of one axis and mend everything downstream.

    Returns the values of the sites at which tokens leave; not those where all that follows takes
    them back as they were. Raises PreconditionError, with the program half rewritten, where the
    mending turns out to be impossible, or where no token leaves anywhere: work on a fork.
    """
    walk = _Walk(edit, axis, reducers)
    for node in list(edit.graph.nodes):
        try:
            walk.visit(node)
        except VerificationError as error:
            raise PreconditionError(where(node), f"cannot be mended: {error}", LEAVE_OUT) from error
    read, state = _behind(next(reversed(edit.graph.nodes))), walk.state
    real = {site for epoch, site in enumerate(state.places, 1) if state.at(site, epoch) in read}
    if state.places and not real:
        reason = "all that follows needs the tokens that leave here, as they were"
        raise PreconditionError(
            where(state.places[0]), reason, "name earlier sites, or leave it out"
        )
    return real


def _behind(node: Node) -> set[Node]:
    """Return all that a node is computed from."""
    found, todo = set[Node](), [node]
    while todo:
        for arg in todo.pop().all_input_nodes:
            if arg not in found:
                found.add(arg)
                todo.append(arg)
    return found


EXTREMES = (aten.amax.default, aten.amin.default)


class _Walk:
    """The walk: its state, and how each effect is mended."""

    def __init__(self, edit: Edit, axis: TokenAxis, reducers: Mapping[Site, Reducer]) -> None:
        self.edit = edit
        self.axis = axis
        self.sites = {site.node: (site, reducer) for site, reducer in reducers.items()}
        self.padding = find_padding(axis)
        self.state = State(axis, self.padding.mask)
        self.lift = Lift(edit, self.state)
        self.restored = Restore(edit, self.state)
        self.counts = Counts(edit, self.state)

    def visit(self, node: Node) -> None:
        """Mend one node if an operand has been reduced; then reduce here if this is a site."""
        epoch = self.state.epoch_of_operands(node)
        if epoch:
            self.state.remember(node)
            with self.edit.before(node):
                self._mend(node, epoch)
        if node in self.sites:
            self._reduce(*self.sites[node])

    def _mend(self, node: Node, epoch: int) -> None:
        """Rewrite an operator in place, at its operands' epoch, or give it all tokens back."""
        kind = self.axis.effects[node].kind
        if self.axis.is_whole(node) or kind is Kind.EMIT:
            self._restore(node)
            return
        try:
            MENDS[kind](self, node, epoch)
        except PreconditionError:
            # In a head, where no attention follows, tokens can be back early.
            if kind is not Kind.MAP or node in self.state.feeds_attention:
                raise
            self._restore(node)

    def _restore(self, node: Node) -> None:
        """Give an operator, or the outputs, every token back: what follows is as it was."""

        def whole(arg: Node) -> Node:
            reduced = self.state.carries(arg) and self.state.latest(arg)
            return self.restored(arg) if reduced else arg

        args, kwargs = map_arg(node.args, whole), map_arg(node.kwargs, whole)
        if node.op != "output":
            self.edit.update(node, *args, **kwargs)
            return
        node.args = args
        self.edit.count += 1

    def _operands(self, node: Node, epoch: int) -> tuple[tuple[Argument, ...], dict[str, Argument]]:
        """Return the arguments with every value that carries tokens at the epoch."""

        def at_epoch(arg: Node) -> Node:
            return self.lift(arg, node, epoch) if self.state.carries(arg) else arg

        args = map_arg(node.args, at_epoch)
        kwargs = map_arg(node.kwargs, at_epoch)
        assert isinstance(args, tuple)
        assert isinstance(kwargs, dict)
        return args, kwargs

    def _map(self, node: Node, epoch: int) -> None:
        args, kwargs = self._operands(node, epoch)
        if node.target in SIZES:
            args = SIZES[node.target](self.edit, self.state, node, args, epoch)
        self.edit.update(node, *args, **kwargs)
        self.state.put(node, epoch, node)

    def _attend(self, node: Node, epoch: int) -> None:
        on_tokens = (arg for arg in qkv_of(node) if len(shape(arg)) - 2 in self.axis.tokens.on(arg))
        if len({self.state.latest(arg) for arg in on_tokens}) > 1:
            # Two sequences of one length and one mask have one axis, and different tokens on it.
            reason = "it attends between tokens that were reduced and others that were not"
            raise PreconditionError(where(node), reason, LEAVE_OUT)
        qkv = tuple(
            self.lift(arg, node, epoch) if self.state.carries(arg) else arg for arg in qkv_of(node)
        )
        args, kwargs = with_mask(node, qkv, self._bias(node, mask_of(node), epoch))
        self.edit.update(node, *args, **kwargs)
        self.state.put(node, epoch, node)
        queries = qkv_of(node)[0]
        if self.padding.blind and len(shape(queries)) - 2 in self.axis.tokens.on(queries):
            self._blind(node, epoch)

    def _blind(self, node: Node, epoch: int) -> None:
        """Let padding attend to nothing, as it did before sizes hid it from the keys alone."""
        size = self.state.sizes[epoch]
        if size is None:
            return
        with self.edit.after(node):
            real = self.edit.call(aten.gt.Scalar, size, 0)
            wide = self.edit.call(aten.unsqueeze.default, real, 1)
            wide = self.edit.call(aten.unsqueeze.default, wide, 3)
            as_number = self.edit.call(aten.to.dtype, wide, value(node).dtype)
            self.state.put(node, epoch, self.edit.call(aten.mul.Tensor, node, as_number))

    def _bias(self, node: Node, mask: Node | None, epoch: int) -> Node | None:
        """Return log size of the keys plus the model's own bias; sizes include its padding mask."""
        keys = tensors(node)[1]
        on_keys = self.state.carries(keys) and len(shape(keys)) - 2 in self.axis.tokens.on(keys)
        size = self.state.sizes[epoch] if on_keys else None
        if size is None:
            return self._lifted(mask, node, epoch) if mask is not None else None
        bias = self._log_size(size, epoch, value(keys).dtype)
        spot = self.axis.tokens.on(keys)[len(shape(keys)) - 2] if on_keys else None
        if bias is not None and isinstance(spot, Range):
            bias = self.lift.part_of(bias, spot, 3)
        for part in parts_of(mask).added:
            own = self._lifted(part, node, epoch)
            bias = own if bias is None else self.edit.call(aten.add.Tensor, own, bias)
        return bias

    def _lifted(self, mask: Node, node: Node, epoch: int) -> Node:
        return self.lift(mask, node, epoch) if self.state.carries(mask) else mask

    def _log_size(self, size: Node, epoch: int, dtype: torch.dtype) -> Node | None:
        """Return log size [B, 1, 1, K], made once an epoch; without sizes it only hides padding."""
        proportional = self.state.reductions[epoch - 1].proportional
        if not proportional and self.state.padding is None:
            return None
        if epoch not in self.state.log_sizes:
            if not proportional:
                size = self.edit.call(aten.clamp.default, size, None, 1.0)
            flat = self.edit.call(aten.log.default, size)
            if self.state.padding is not None:
                low = max(LOWEST, torch.finfo(dtype).min / 2)
                flat = self.edit.call(aten.clamp_min.default, flat, low)
            wide = self.edit.call(aten.unsqueeze.default, flat, 1)
            bias = self.edit.call(aten.unsqueeze.default, wide, 2, name=f"log_size_{epoch}")
            if value(bias).dtype != dtype:
                bias = self.edit.call(aten.to.dtype, bias, dtype)
            self.state.log_sizes[epoch] = bias
        return self.state.log_sizes[epoch]

    def _pool(self, node: Node, epoch: int) -> None:
        source = tensors(node)[0]
        place = dims_arg(node, 1)[0]
        spot = self.axis.tokens.on(source)[place]
        assert isinstance(spot, Range)
        x = self.lift(source, node, epoch)
        size = self.state.sizes[epoch]
        plain = node.target in EXTREMES or not covers(spot, self.axis)
        if not plain and size is None and node.target is aten.sum.dim_IntList:
            self._restore(node)  # a sum over the tokens that are left would be another sum
            return
        if not plain and size is not None and (reason := self._uncountable(node)):
            raise PreconditionError(where(node), reason, LEAVE_OUT)
        if plain or size is None:
            self.edit.update(node, x, *node.args[1:], **node.kwargs)
            return
        rows = layout(self.axis, source)
        if rows is None:
            reason = "it pools tokens where no dimension is the batch alone"
            raise PreconditionError(where(node), reason, LEAVE_OUT)
        weights = self.lift.part_of(size, spot)
        self.edit.replace(node, pool(self.edit, node, x, weights, place, rows))

    def _uncountable(self, node: Node) -> str:
        """Say why a mean or a sum weighted by sizes is not that over all tokens, or ""."""
        total = node.target is aten.sum.dim_IntList
        padding = self.state.padding
        if padding is None:
            return ""
        summand = tensors(node)[0]
        args, _ = self.state.originals.get(summand, (summand.args, {}))
        hidden = leaves_out(summand.target, args, padding)
        return "" if total and hidden else "a mean over tokens counts padding, which has no size"

    def _pick(self, node: Node, epoch: int) -> None:
        x = self.lift(tensors(node)[0], node, epoch)
        self.edit.update(node, x, *pick_args(node, self.axis))

    def _range(self, node: Node, epoch: int) -> None:
        x = self.lift(tensors(node)[0], node, epoch)
        self.edit.update(node, x, *slice_args(node, self.axis))
        self.state.put(node, epoch, node)

    def _reduce(self, site: Site, reducer: Reducer) -> None:
        """Let the pass choose tokens at a site, and note the new value of the residual stream."""
        count = len(self.state.reductions)
        if self.state.latest(site.node) != count:
            reason = "it does not follow the site before it on one residual stream"
            raise PreconditionError(where(site.node), reason, "name fewer sites")
        with self.edit.after(site.node):
            point = self._point(site, count)
            reduction = reducer(point)
            if reduction is None:
                return
            rows = reduction.combine(self.edit, point.x)
            x = to_stream(self.edit, rows, site.places)
            self.state.add(reduction, lengths_of(self.edit, rows, 1), site.node)
            self.counts.add(reduction)
            self.state.put(site.node, count + 1, x)

    def _point(self, site: Site, count: int) -> Point:
        x = to_rows(self.edit, self.state.at(site.node, count), site.places)
        size, marked = self.counts.at(count, x)
        query, key, _ = qkv_of(site.attention)
        return Point(
            edit=self.edit,
            x=x,
            query=query,
            key=key,
            bias=mask_of(site.attention),
            scale=scale_of(site.attention),
            causal=is_causal(site.attention),
            size=size,
            length=shape(x)[1],
            prefix=self.axis.prefix,
            suffix=self.axis.suffix,
            picks=self.axis.picks,
            marked=marked,
            ordered=self.state.padding is not None,
        )


MENDS: dict[Kind, Callable[[_Walk, Node, int], None]] = {
    Kind.MAP: _Walk._map,
    Kind.ATTEND: _Walk._attend,
    Kind.POOL: _Walk._pool,
    Kind.PICK: _Walk._pick,
    Kind.RANGE: _Walk._range,
}
"""How an operator is mended, by its effect along the tokens."""
