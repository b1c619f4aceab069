"""Token axes of a program: where tokens live, where they may be removed, and why not."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from effopt.attention import SDPA
from effopt.axes import Dim, Size, find_axes, leaves
from effopt.axis_parts import slice_edges
from effopt.axis_rules import dim_arg, first, tensors
from effopt.effects import effect, index_of_pick
from effopt.errors import PreconditionError
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
    all that an output picks. `picks` are the places that outputs pick, negative from the end.
    """

    name: str
    tokens: Tokens
    effects: dict[Node, Effect]
    picks: tuple[int, ...]
    prefix: int
    suffix: int
    sites: tuple[Site, ...]

    @property
    def size(self) -> Size:
        """The number of tokens."""
        return self.tokens.size

    @property
    def stream(self) -> Site:
        """A usable site: its value has the dims and the layout of the residual stream."""
        return self.usable()[0]

    def usable(self) -> tuple[Site, ...]:
        """Return the sites where tokens may be removed."""
        return tuple(site for site in self.sites if site.refusal is None)


def find_tokens(program: Program) -> tuple[TokenAxis, ...]:
    """Find every axis over which self-attention attends, in order of first use (an Analysis)."""
    axes = program.get(find_axes)
    calls: dict[Dim, list[Node]] = {}
    blocks: dict[Node, int] = {}
    for node in program.nodes():
        if node.target is not SDPA:
            continue
        blocks[node] = len(blocks)
        q, k = (leaves(axes.of(arg)[-2]) for arg in tensors(node)[:2])
        if q and q == k:
            calls.setdefault(q, []).append(node)
    several = len(calls) > 1
    found = []
    for dim, attention in calls.items():
        size = shape(tensors(attention[0])[0])[-2]
        name = f"{_common_path(attention)}.tokens" if several else "tokens"
        batch = leaves(axes.of(tensors(attention[0])[0])[0])
        own = {call: blocks[call] for call in attention}
        found.append(_token_axis(program, name, Tokens(dim, size, axes, batch), own))
    return tuple(found)


def _common_path(nodes: list[Node]) -> str:
    return module_path(nodes[0]).split(".")[0] or nodes[0].name


def _token_axis(program: Program, name: str, tokens: Tokens, calls: dict[Node, int]) -> TokenAxis:
    nodes = list(program.nodes())
    effects = {node: found for node in nodes if (found := effect(node, tokens)) is not None}
    after = _downstream(nodes, calls)
    used = {node: found for node, found in effects.items() if node in after}
    picks, prefix, suffix, problem = _protected(used, tokens)
    blockers = _first_blockers(nodes, used)
    sites = [
        _site(block, call, tokens, effects, blockers, problem) for call, block in calls.items()
    ]
    return TokenAxis(name, tokens, effects, picks, prefix, suffix, tuple(sites))


def _downstream(nodes: list[Node], starts: Iterable[Node]) -> set[Node]:
    found = set(starts)
    for node in nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _protected(
    effects: dict[Node, Effect], tokens: Tokens
) -> tuple[tuple[int, ...], int, int, str]:
    """Find how many tokens at the front and at the end must stay, or why that cannot be said."""
    picks: set[int] = set()
    prefix = suffix = 0
    for node, found in effects.items():
        if found.kind is Kind.PICK:
            place, from_end = index_of_pick(node, tokens)
            picks.add(place)
            prefix = prefix if from_end else max(prefix, place + 1)
            suffix = max(suffix, -place) if from_end else suffix
        elif found.kind is Kind.RANGE:
            front, back = _ends(node, tokens)
            prefix, suffix = max(prefix, front), max(suffix, back)
    learned_front, learned_back, problem = _learned(tokens)
    return tuple(sorted(picks)), max(prefix, learned_front), max(suffix, learned_back), problem


def _ends(node: Node, tokens: Tokens) -> tuple[int, int]:
    """Return how many tokens at each end a slice holds fixed, by its nearer end."""
    spot = tokens.on(first(node))[dim_arg(node, 1)]
    assert isinstance(spot, Range)
    front = back = 0
    for edge in slice_edges(node, spot.start, spot.stop):
        left = edge if isinstance(edge, int) else None
        behind = tokens.size - edge
        right = int(behind) if _fixed(behind) else None
        if left is not None and (right is None or left <= right):
            front = max(front, left)
        elif right is not None:
            back = max(back, right)
    return front, back


def _fixed(size: Size) -> bool:
    return isinstance(size, int) or size.node.expr.is_Integer


def _learned(tokens: Tokens) -> tuple[int, int, str]:
    """Count the learned tokens (class, registers, detection) at both ends of a joined axis."""
    segments = tokens.dim[0].segments if len(tokens.dim) == 1 else ()
    spans = [(part.start, part.stop, part.learned) for part in segments]
    front = back = 0
    while spans and spans[0][2]:
        front = spans.pop(0)[1]
    while spans and spans[-1][2]:
        back = tokens.size - spans.pop()[0]
    if any(learned for *_, learned in spans):
        return 0, 0, "learned tokens stand between those of the sample"
    if not isinstance(front, int) or not _fixed(back):
        return 0, 0, "the number of learned tokens is not fixed"
    return front, int(back), ""


def _first_blockers(nodes: list[Node], effects: dict[Node, Effect]) -> dict[Node, Node]:
    """For each node, find one that depends on it and cannot be mended, if there is one."""
    blocked: dict[Node, Node] = {}
    for node in reversed(nodes):
        if node in effects and effects[node].kind is Kind.ORDER:
            blocked[node] = node
            continue
        behind = next((blocked[user] for user in node.users if user in blocked), None)
        if behind is not None:
            blocked[node] = behind
    return blocked


def _site(
    block: int,
    call: Node,
    tokens: Tokens,
    effects: dict[Node, Effect],
    blockers: dict[Node, Node],
    problem: str,
) -> Site:
    """Follow the attention's result to the residual stream."""
    node = join = call
    while (reader := _only_reader(node, tokens, effects)) is not None:
        if sum(bool(tokens.on(arg)) for arg in tensors(reader)) > 1:
            join = reader
        node = reader
    places = _places(node, call, tokens)
    path = module_path(call)
    refusal = _refusal(node, join, call, places, tokens, effects, blockers, problem)
    return Site(block, call, join, node, places or (0, 1, 2), path, refusal)


def _only_reader(node: Node, tokens: Tokens, effects: dict[Node, Effect]) -> Node | None:
    """Return the one reader of a value, if it maps tokens one by one and yields tokens."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    found = effects.get(reader)
    carried = found is not None and found.kind is Kind.MAP and tokens.on(reader)
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


def _refusal(
    node: Node,
    join: Node,
    call: Node,
    places: tuple[int, int, int] | None,
    tokens: Tokens,
    effects: dict[Node, Effect],
    blockers: dict[Node, Node],
    problem: str,
) -> PreconditionError | None:
    leave = "leave this block out (options first, last or sites), or keep the model as it is"
    if effects[call].kind is Kind.ORDER:
        return PreconditionError(where(call), effects[call].reason, leave)
    if problem:
        return PreconditionError(where(call), problem, leave)
    if places is None or join is call:
        reason = "no [batch, tokens, channels] value of the residual stream follows the attention"
        return PreconditionError(where(call), reason, leave)
    if node in blockers:
        blocker = blockers[node]
        return PreconditionError(where(blocker), effects[blocker].reason, leave)
    return None
