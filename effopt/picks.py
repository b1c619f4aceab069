"""Picks: which tokens outputs take or the model has learned, so that they must stay."""

from dataclasses import dataclass

import torch
from torch.fx import Node

from effopt.axes import Size
from effopt.axis_parts import slice_edges
from effopt.axis_rules import dim_arg, first
from effopt.program import is_tensor, shape, value
from effopt.tokens import Effect, Kind, Range, Tokens

aten = torch.ops.aten


@dataclass(frozen=True)
class Protected:
    """The tokens that must stay: the first `prefix`, the last `suffix`, and those marked.

    `picks` are the places that outputs take, negative from the end. `marks` are places that the
    inputs say, [B] each: that of the end-of-text token, as an output takes it. `problem` says why
    it cannot be told what must stay, or is "".
    """

    picks: tuple[int, ...] = ()
    marks: tuple[Node, ...] = ()
    prefix: int = 0
    suffix: int = 0
    problem: str = ""


def find_protected(effects: dict[Node, Effect], tokens: Tokens, after: set[Node]) -> Protected:
    """Read what must stay off the effects of the nodes `after` the first attention call."""
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
    return Protected(
        tuple(sorted(picks)),
        tuple(mark for node in effects if (mark := _mark(node, tokens)) and mark not in after),
        max(prefix, learned_front),
        max(suffix, learned_back),
        problem,
    )


def _mark(node: Node, tokens: Tokens) -> Node | None:
    """Return the places [B] at which `x[arange(B), places]` takes one token of each sample."""
    if node.target is not aten.index.Tensor or not tokens.on(first(node)):
        return None
    indices = node.args[1]
    assert isinstance(indices, (list, tuple))
    spots = tokens.on(first(node))
    for place, index in enumerate(indices):
        alone = spots.get(place) == Range(0, tokens.size, True)
        if alone and is_tensor(index) and len(shape(index)) == 1:
            return index if _is_batch(index, tokens) else None
    return None


def _is_batch(index: Node, tokens: Tokens) -> bool:
    """Tell whether places are whole numbers, one for each sample."""
    whole = not value(index).is_floating_point() and value(index).dtype != torch.bool
    return whole and tokens.axes.of(index)[0] == tokens.batch


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


def index_of_pick(node: Node, tokens: Tokens) -> tuple[int, bool]:
    """Return the token that a PICK takes: its place, and whether that counts from the end (<0)."""
    spot = tokens.on(first(node))[dim_arg(node, 1)]
    given = node.args[2]
    assert isinstance(spot, Range)
    assert isinstance(given, int)
    place = spot.start + given if given >= 0 else spot.stop + given
    behind = place - tokens.size
    if isinstance(place, int) and (not isinstance(behind, int) or place <= -behind):
        return place, False
    assert isinstance(behind, int) or behind.node.expr.is_Integer
    return int(behind), True
