"""Prefix: a block runs on the first tokens alone; the others pass it by on the residual stream.

Sound where attention looks back: no token of the prefix sees one behind it, so each gets what it
would get among all tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.node import Argument, map_arg

from effopt.axes import same_size
from effopt.blocks import Block
from effopt.causal import hides_later, own_calls
from effopt.edit import Edit
from effopt.errors import PreconditionError, VerificationError
from effopt.lift import fixed_int
from effopt.mend_rules import END, SIZES
from effopt.program import Program, is_tensor, where
from effopt.sites import TokenAxis, find_tokens
from effopt.state import State
from effopt.tokens import Kind, Range

aten = torch.ops.aten
REMEDY = "leave this pass out"


@dataclass(frozen=True)
class Span:
    """A block that can run on a prefix of its tokens.

    `inside` are the operators between its ends, the last included, in execution order; dimension
    `place` of the stream counts the `size` tokens.
    """

    block: Block
    axis: TokenAxis
    inside: tuple[Node, ...]
    place: int
    size: int


def find_span(program: Program, block: Block) -> Span:
    """Return a block as one that runs on a prefix; PreconditionError says why it cannot."""
    if block.refusal is not None:
        raise PreconditionError(block.refusal.node, block.refusal.reason, REMEDY)
    inside = _between(program, block.before, block.after)
    axis = _axis_of(program, block, inside)
    spots, size = axis.tokens.on(block.before), fixed_int(axis.size)
    if size is None:
        reason = f"the number of {axis.name} is dynamic, and a prefix is a share of it"
        raise _refused(block.after, reason, "leave 'length' out of dynamic")
    for call in own_calls(axis):
        if call in inside and not hides_later(program, call):
            raise _refused(call, "attention sees tokens that come later")
    within = frozenset(inside)
    for node in inside:
        _check(axis, node, within, block.after)
    return Span(block, axis, inside, next(iter(spots)), size)


def _between(program: Program, before: Node, after: Node) -> tuple[Node, ...]:
    """Return what leads from one node to another, with the last and without the first."""
    nodes, reached, wanted = list(program.nodes()), {before}, {after}
    for node in nodes:
        reached.update([node] if any(arg in reached for arg in node.all_input_nodes) else ())
    for node in reversed(nodes):
        wanted.update([node] if any(user in wanted for user in node.users) else ())
    return tuple(node for node in nodes if node in reached & wanted and node is not before)


def _axis_of(program: Program, block: Block, inside: Iterable[Node]) -> TokenAxis:
    """Return the token axis of a stream, over which the block attends."""
    within = set(inside)
    for axis in program.get(find_tokens):
        alone = len(axis.tokens.on(block.before)) == 1 and _is_sliced(axis, block.before)
        if alone and within & set(own_calls(axis)):
            return axis
    raise _refused(block.after, f"block {block.number} does not attend over the stream's tokens")


def _check(axis: TokenAxis, node: Node, inside: frozenset[Node], after: Node) -> None:
    """Raise PreconditionError where an operator of the block does not run on a prefix."""
    effect = axis.effects.get(node)
    if effect is not None and effect.kind not in (Kind.MAP, Kind.ATTEND):
        raise _refused(node, effect.reason or f"all tokens are needed here ({effect.kind.value})")
    spots = axis.tokens.on(node)
    if node is not after and spots and not set(node.users) <= inside:
        raise _refused(node, "what follows the block reads this, too")
    if not all(_covers(axis, spot) for spot in spots.values()):
        raise _refused(node, "it takes the tokens apart")
    for arg in node.all_input_nodes:
        if arg not in inside and not _is_sliced(axis, arg):
            raise _refused(node, f"the tokens of {arg.name} share a dimension, or are cut")


def _is_sliced(axis: TokenAxis, node: Node) -> bool:
    """Tell whether slices take a prefix: each dimension counts all tokens alone, or none."""
    spots = axis.tokens.on(node).values()
    return all(_covers(axis, s) and isinstance(s, Range) and s.pure for s in spots)


def _covers(axis: TokenAxis, spot: Range | str) -> bool:
    """Tell whether a dimension counts all tokens, alone or with other axes."""
    if not isinstance(spot, Range):
        return False
    return same_size(spot.start, 0) and same_size(spot.stop, axis.size)


def _refused(node: Node, reason: str, remedy: str = REMEDY) -> PreconditionError:
    return PreconditionError(where(node), reason, remedy)


def shorten(edit: Edit, spans: Iterable[tuple[Span, int]]) -> None:
    """Let each block run on so many tokens, of one stream, in order.

    Raises PreconditionError, with the program half rewritten, where that turns out to be
    impossible: work on a fork.
    """
    streams = dict[Node, Node]()
    for span, count in spans:
        try:
            stream = streams.get(span.block.before, span.block.before)
            streams[span.block.after] = _Shorter(edit, span, count, stream).run()
        except VerificationError as error:
            raise _refused(span.block.after, f"cannot run on a prefix: {error}") from error


class _Shorter:
    """Rewrites one block, in place, so that it runs on the first `count` tokens."""

    def __init__(self, edit: Edit, span: Span, count: int, stream: Node) -> None:
        self.edit, self.span, self.count, self.stream = edit, span, count, stream
        self.cut = dict[Node, Node]()
        self.state = State(span.axis, None)
        self.state.lengths.append(count)
        self.inside = set(span.inside)

    def run(self) -> Node:
        """Return the stream behind the block, with all tokens."""
        *inner, last = self.span.inside
        for node in inner:
            with self.edit.before(node):
                self.edit.update(node, *self._args(node), **self._kwargs(node))
        with self.edit.before(last):
            done = self.edit.copy(last)
            self.edit.update(done, *self._args(last), **self._kwargs(last))
            rest = self.edit.call(aten.slice.Tensor, self.stream, self.span.place, self.count, END)
            whole = self.edit.call(aten.cat.default, [done, rest], self.span.place)
        self.edit.replace(last, whole)
        return whole

    def _args(self, node: Node) -> tuple[Argument, ...]:
        args = map_arg(node.args, self._short)
        assert isinstance(args, tuple)
        rule = SIZES.get(node.target)
        return args if rule is None else rule(self.edit, self.state, node, args, 1)

    def _kwargs(self, node: Node) -> dict[str, Argument]:
        kwargs = map_arg(node.kwargs, self._short)
        assert isinstance(kwargs, dict)
        return kwargs

    def _short(self, arg: Node) -> Node:
        """Return a value with the tokens of the prefix alone."""
        origin = self.span.block.before if arg is self.stream else arg
        spots = self.span.axis.tokens.on(origin) if is_tensor(origin) else {}
        if arg in self.inside or not spots:
            return arg  # no tokens, or those of the prefix
        if arg not in self.cut:
            made = arg
            for place in spots:
                made = self.edit.call(aten.slice.Tensor, made, place, 0, self.count)
            self.cut[arg] = made
        return self.cut[arg]
