"""What each operator does along a token axis: the table from operator family to effect."""

from collections.abc import Callable

import torch
from torch.fx import Node

from effopt.attention import is_causal
from effopt.axis_parts import dim_arg_of_list, slice_range
from effopt.axis_rules import dim_arg, dims_arg, first, tensors
from effopt.axis_table import family
from effopt.program import is_tensor, shape
from effopt.tokens import BROKEN, MAP, Effect, Kind, Range, Tokens

aten = torch.ops.aten


def effect(node: Node, tokens: Tokens) -> Effect | None:
    """Say what a node does along the tokens; None where no operand carries them."""
    operands = [arg for arg in node.all_input_nodes if tokens.on(arg)]
    if not operands:
        return None
    if node.op == "output":
        return Effect(Kind.EMIT)
    if node in tokens.axes.unknown:
        return Effect(Kind.ORDER, tokens.axes.unknown[node])
    kind = family(node)
    if kind not in EFFECTS:
        return Effect(Kind.ORDER, f"{node.target} has no rule along tokens")
    if kind != "view" and any(BROKEN in tokens.on(arg).values() for arg in operands):
        return Effect(Kind.ORDER, "the tokens are laid out as a grid or mixed with another axis")
    if reason := _mixes(node, kind, tokens):
        return Effect(Kind.ORDER, reason)
    return EFFECTS[kind](node, tokens)


def _mixes(node: Node, kind: str, tokens: Tokens) -> str:
    """Say why an operator compares what each sample keeps by itself, or cuts it in the middle."""
    if kind not in ACTS_ALONG:
        return ""
    x, places = first(node), ACTS_ALONG[kind](node)
    if not is_tensor(x) or not tokens.on(x):
        return ""
    spots, dims = tokens.on(x), tokens.axes.of(x)
    rows = {n for n, dim in enumerate(dims) if set(dim) & set(tokens.batch)} - set(spots)
    if set(places) & rows:
        return "tokens of different samples would be compared, and each sample keeps others"
    acted = [spots[place] for place in places if place in spots]
    if any(isinstance(spot, Range) and not spot.pure for spot in acted):
        return "the tokens share the dimension with another axis"
    if acted and len(spots) > 1:
        return "it takes tokens out of a table of token pairs"
    return ""


def _map(node: Node, tokens: Tokens) -> Effect:
    return MAP


def _along(reason: str, places: Callable[[Node], tuple[int, ...]]) -> "EffectRule":
    """Make the rule of operators that are MAP unless they work along the tokens."""

    def rule(node: Node, tokens: Tokens) -> Effect:
        spots = tokens.on(first(node))
        return Effect(Kind.ORDER, reason) if set(places(node)) & set(spots) else MAP

    return rule


def _normalised(node: Node) -> tuple[int, ...]:
    rank, given = len(shape(node)), node.args[1]
    assert isinstance(given, (list, tuple))
    return tuple(range(rank - len(given), rank))


def _linear(node: Node, tokens: Tokens) -> Effect:
    x, weight = tensors(node)[:2]
    mixes = len(shape(x)) - 1 in tokens.on(x) or tokens.on(weight)
    return Effect(Kind.ORDER, "a linear layer mixes the tokens") if mixes else MAP


def _matmul(node: Node, tokens: Tokens) -> Effect:
    left, right = tensors(node)[-2:]
    inner = len(shape(left)) - 1 in tokens.on(left) or len(shape(right)) - 2 in tokens.on(right)
    reason = "a product mixes the tokens outside of an attention call"
    return Effect(Kind.ORDER, reason) if inner else MAP


def _attention(node: Node, tokens: Tokens) -> Effect:
    q, k = tensors(node)[:2]
    place = len(shape(q)) - 2
    if is_causal(node):
        return Effect(Kind.ORDER, "causal attention depends on the order of the tokens")
    if place in tokens.on(q) or place in tokens.on(k):
        return Effect(Kind.ATTEND)
    return MAP


def _view(node: Node, tokens: Tokens) -> Effect:
    after = tokens.on(node)
    if BROKEN in after.values() or not after:
        return Effect(Kind.ORDER, "a view cuts the tokens into a grid or windows")
    return MAP


def _reduction(node: Node, tokens: Tokens) -> Effect:
    gone, spots = dims_arg(node, 1), tokens.on(first(node))
    if not set(gone) & set(spots):
        return MAP
    pools = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
    if node.target in pools and len(gone) == 1:
        return Effect(Kind.POOL)
    return Effect(Kind.ORDER, f"{node.target} over the tokens has no weighted form")


def _select(node: Node, tokens: Tokens) -> Effect:
    return Effect(Kind.PICK) if dim_arg(node, 1) in tokens.on(first(node)) else MAP


def _slice(node: Node, tokens: Tokens) -> Effect:
    if dim_arg(node, 1) not in tokens.on(first(node)):
        return MAP
    if slice_range(node)[2] != 1:
        return Effect(Kind.ORDER, "every other token is taken")
    return Effect(Kind.RANGE)


def _join(node: Node, tokens: Tokens) -> Effect:
    place = dim_arg_of_list(node)
    if any(place in tokens.on(part) for part in tensors(node)):
        return Effect(Kind.ORDER, "the tokens are joined with others")
    return MAP


def _embedding(node: Node, tokens: Tokens) -> Effect:
    table = tensors(node)[0]
    return Effect(Kind.ORDER, "a table is read by token place") if tokens.on(table) else MAP


def _spatial(node: Node, tokens: Tokens) -> Effect:
    beyond = set(tokens.on(first(node))) - {0}
    return Effect(Kind.ORDER, "a convolution or pooling runs over the tokens") if beyond else MAP


def _kernel(node: Node, tokens: Tokens) -> Effect:
    return Effect(Kind.ORDER, "the tokens are reduced already by an earlier pass")


def _create(node: Node, tokens: Tokens) -> Effect:
    return Effect(Kind.ORDER, "a new tensor is made with sizes of its own")


def _gather(node: Node, tokens: Tokens) -> Effect:
    return Effect(Kind.ORDER, "tokens are gathered by an index")


ACTS_ALONG: dict[str, Callable[[Node], tuple[int, ...]]] = {
    "softmax": lambda node: (dim_arg(node, 1),),
    "scan": lambda node: dims_arg(node, 1),
    "reduction": lambda node: dims_arg(node, 1),
    "select": lambda node: (dim_arg(node, 1),),
    "slice": lambda node: (dim_arg(node, 1),),
    "unbind": lambda node: (dim_arg(node, 1),),
    "pieces": lambda node: (dim_arg(node, 2),),
    "roll": lambda node: dims_arg(node, 2),
    "attention": lambda node: (len(shape(first(node))) - 2,),
}
"""The dimensions along which a family works: reduces, picks, orders or attends."""

EffectRule = Callable[[Node, Tokens], Effect]
EFFECTS: dict[str, EffectRule] = {
    **dict.fromkeys(("pointwise", "cast", "permute", "transpose", "expand", "stack", "item"), _map),
    "norm": _along("a norm runs over the tokens", _normalised),
    "softmax": _along(
        "a softmax over the tokens outside of an attention call", lambda n: (dim_arg(n, 1),)
    ),
    "scan": _along("it depends on the order of the tokens", lambda n: dims_arg(n, 1)),
    "unbind": _along("the tokens are taken apart", lambda n: (dim_arg(n, 1),)),
    "pieces": _along("the tokens are split", lambda n: (dim_arg(n, 2),)),
    "roll": _along("the tokens are shifted", lambda n: dims_arg(n, 2)),
    "linear": _linear,
    "matmul": _matmul,
    "attention": _attention,
    "view": _view,
    "reduction": _reduction,
    "select": _select,
    "slice": _slice,
    "join": _join,
    "embedding": _embedding,
    "gather": _gather,
    "convolution": _spatial,
    "grid": _spatial,
    "kernel": _kernel,
    "create": _create,
}
"""Family → what it does along the tokens. A family without a row blocks every site before it."""


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
