"""Token axes of a program: where tokens live, where they may be removed, and why not."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from torch.fx import Node

from effopt.attention import SDPA
from effopt.axes import Dim, Dims, Size, find_axes, leaves
from effopt.axis_names import axis_names
from effopt.axis_rules import tensors
from effopt.effects import effect
from effopt.errors import PreconditionError
from effopt.picks import find_protected
from effopt.program import Program, module_path, shape, where
from effopt.tokens import Effect, Kind, Range, Tokens


@dataclass(frozen=True)
class Site:
    """A value on the residual stream where tokens may be removed, in a block.

    `node` is what the next sub-layer and the residual read after the attention call `attention`;
    `join` is the sum that it comes from. `places` are the dimensions of the batch, the tokens and
    the channels in it. `refusal` says why tokens cannot be removed here, or is None.
    """

    block: int
    attention: Node
    join: Node
    node: Node
    places: tuple[int, int, int]
    path: str
    refusal: PreconditionError | None


@dataclass(frozen=True)
class TokenAxis:
    """One token axis: its identity, what is protected on it, and its sites in order.

    The first `prefix` and the last `suffix` tokens are never removed: class tokens, registers,
    all that an output picks. `picks` are the places that outputs pick, negative from the end;
    `marks` those that the inputs say, [B] each. `levels` counts, for each node that depends on
    attention over the axis, the operators ahead of it that need every token in its place: all
    usable sites are on one level, and on a higher one the tokens are whole again.
    """

    name: str
    tokens: Tokens
    effects: dict[Node, Effect]
    picks: tuple[int, ...]
    marks: tuple[Node, ...]
    prefix: int
    suffix: int
    levels: dict[Node, int]
    sites: tuple[Site, ...]

    @property
    def size(self) -> Size:
        """The number of tokens."""
        return self.tokens.size

    @cached_property
    def stream(self) -> Site:
        """A usable site: its value has the dims and the layout of the residual stream."""
        return self.usable()[0]

    def usable(self) -> tuple[Site, ...]:
        """Return the sites where tokens may be removed."""
        return tuple(site for site in self.sites if site.refusal is None)

    def is_whole(self, node: Node) -> bool:
        """Tell whether a node needs all tokens, or depends on one behind the sites that does."""
        return self.levels.get(node, 0) > self.levels[self.stream.node]


def find_tokens(program: Program) -> tuple[TokenAxis, ...]:
    """Find every axis over which self-attention attends, in order of first use (an Analysis)."""
    axes = program.get(find_axes)
    calls: dict[Dim, list[Node]] = {}
    blocks: dict[Node, int] = {}
    for node in program.nodes():
        if node.target is not SDPA:
            continue
        blocks[node] = len(blocks)
        q, k = (axes.of(arg) for arg in tensors(node)[:2])
        if q[-2] and q[-2] == k[-2] and not _is_over_channels(q):
            calls.setdefault(q[-2], []).append(node)
    names = axis_names([[module_path(call) for call in found] for found in calls.values()])
    found = []
    for name, (dim, attention) in zip(names, calls.items(), strict=True):
        size = shape(tensors(attention[0])[0])[-2]
        batch = leaves(axes.of(tensors(attention[0])[0])[0])
        own = {call: blocks[call] for call in attention}
        found.append(_token_axis(program, name, Tokens(dim, size, axes, batch), own))
    return tuple(found)


def _is_over_channels(query: Dims) -> bool:
    """Tell whether attention compares channels: those come from weights, tokens from the sample."""
    compared, summed = (all(axis.constant for axis in dim) for dim in (query[-2], query[-1]))
    return compared and not summed


def _token_axis(program: Program, name: str, tokens: Tokens, calls: dict[Node, int]) -> TokenAxis:
    nodes = list(program.nodes())
    effects = {node: found for node in nodes if (found := effect(node, tokens)) is not None}
    after = _downstream(nodes, calls)
    used = {node: found for node, found in effects.items() if node in after}
    kept = find_protected(used, tokens, after)
    levels = _levels(nodes, used, after)
    view = _View(tokens, effects, levels, _blockers(nodes, used, levels), kept.problem)
    sites = _one_run([_site(block, call, view) for call, block in calls.items()], levels)
    ends = (kept.prefix, kept.suffix)
    return TokenAxis(name, tokens, effects, kept.picks, kept.marks, *ends, levels, sites)


def _downstream(nodes: list[Node], starts: Iterable[Node]) -> set[Node]:
    found = set(starts)
    for node in nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


@dataclass(frozen=True)
class _View:
    """What the search for sites reads: one axis, its effects, and what lies behind each node."""

    tokens: Tokens
    effects: dict[Node, Effect]
    levels: dict[Node, int]
    blockers: dict[Node, Node]
    problem: str


def _levels(nodes: list[Node], effects: dict[Node, Effect], after: set[Node]) -> dict[Node, int]:
    """Count the operators that need every token, on the longest way to each node."""
    levels: dict[Node, int] = {}
    for node in nodes:
        if node in after:
            ahead = max((levels.get(source, 0) for source in node.all_input_nodes), default=0)
            levels[node] = ahead + (node in effects and effects[node].kind is Kind.ORDER)
    return levels


def _blockers(
    nodes: list[Node], effects: dict[Node, Effect], levels: dict[Node, int]
) -> dict[Node, Node]:
    """For each node: an operator behind it that needs every token, with no attention between.

    Where attention over the tokens lies between, a reduction pays: it is undone afterwards.
    """
    blocked: dict[Node, Node] = {}
    pays: set[Node] = set()
    for node in reversed(nodes):
        if node in effects and effects[node].kind is Kind.ORDER:
            blocked[node] = node
            continue
        behind = [user for user in node.users if user in blocked]
        if behind:
            blocked[node] = blocked[behind[0]]
        near = [user for user in node.users if levels.get(user) == levels.get(node)]
        attends = (user in effects and effects[user].kind is Kind.ATTEND for user in near)
        if any(attends) or any(user in pays for user in near):
            pays.add(node)
    return {node: found for node, found in blocked.items() if node not in pays}


def _site(block: int, call: Node, view: _View) -> Site:
    """Follow the attention's result to the residual stream: the last value of its form."""
    end = join = found = call
    places = None
    while (reader := _only_reader(end, view)) is not None:
        joins = sum(bool(view.tokens.on(arg)) for arg in tensors(reader)) > 1
        end = reader
        own = _places(end, call, view.tokens)
        if own is not None:
            join, found, places = (end if joins else join), end, own
    placed = places if join is not call else None
    refusal = _refusal(end, found, call, placed, view)
    return Site(block, call, join, found, places or (0, 1, 2), module_path(call), refusal)


def _only_reader(node: Node, view: _View) -> Node | None:
    """Return the one reader of a value, if it maps tokens one by one and yields tokens."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    found = view.effects.get(reader)
    carried = found is not None and found.kind is Kind.MAP and view.tokens.on(reader)
    return reader if carried else None


def _places(node: Node, call: Node, tokens: Tokens) -> tuple[int, int, int] | None:
    """Find batch, tokens and channels among three dimensions."""
    dims = tokens.axes.of(node)
    spots = tokens.on(node)
    batch = leaves(tokens.axes.of(tensors(call)[0])[0])
    rows = [place for place, dim in enumerate(dims) if dim == batch and batch]
    if len(dims) != 3 or len(spots) != 1 or len(rows) != 1:
        return None
    token, spot = next(iter(spots.items()))
    if not isinstance(spot, Range) or not spot.pure or token == rows[0]:
        return None
    return rows[0], token, 3 - rows[0] - token


_LEAVE = "leave this block out (options first, last or sites), or keep the model as it is"


def _refusal(
    end: Node, found: Node, call: Node, places: tuple[int, int, int] | None, view: _View
) -> PreconditionError | None:
    """Say why tokens cannot be removed at the value found, on the way to where readers part."""
    if view.effects[call].kind is Kind.ORDER:
        return PreconditionError(where(call), view.effects[call].reason, _LEAVE)
    if view.problem:
        return PreconditionError(where(call), view.problem, _LEAVE)
    blocker = view.blockers.get(found if places is not None else end)
    if blocker is not None:
        return PreconditionError(where(blocker), view.effects[blocker].reason, _LEAVE)
    if places is None:
        reason = "no [batch, tokens, channels] value of the residual stream follows the attention"
        return PreconditionError(where(call), reason, _LEAVE)
    if len(end.users) < 2:
        reason = "nothing but outputs follows this attention call"
        return PreconditionError(where(call), reason, _LEAVE)
    return None


def _one_run(sites: list[Site], levels: dict[Node, int]) -> tuple[Site, ...]:
    """Keep the level with the most usable sites: between levels all tokens are back."""
    counts = Counter(levels[site.node] for site in sites if site.refusal is None)
    best = max(counts, key=lambda level: counts[level], default=0)
    reason = "all tokens are needed between this block and the run of blocks that is reduced"
    return tuple(
        site
        if site.refusal is not None or levels[site.node] == best
        else replace(site, refusal=PreconditionError(where(site.node), reason, _LEAVE))
        for site in sites
    )
