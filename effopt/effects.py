"""What each operator does along a token axis: the table from operator family to effect."""

import functools
from collections.abc import Callable

from torch.fx import Node

from effopt import effect_rules as rules
from effopt.axis_index import picked
from effopt.axis_parts import margins
from effopt.axis_rules import Places, dim_arg, first, named_dims
from effopt.axis_table import family
from effopt.effect_rules import Along, Always, order
from effopt.kernel import kernel
from effopt.program import is_tensor, shape, value
from effopt.tokens import BROKEN, Effect, Kind, Range, Tokens


def effect(node: Node, tokens: Tokens) -> Effect | None:
    """Say what a node does along the tokens; None where no operand carries them."""
    operands = [arg for arg in node.all_input_nodes if tokens.on(arg)]
    if not operands:
        return None
    if node.op == "output" or node.target in _of_exits():
        return Effect(Kind.EMIT)
    if node in tokens.axes.unknown:
        return order(tokens.axes.unknown[node])
    kind = family(node)
    if kind not in EFFECTS:
        return order(_no_row(node))
    if kind != "view" and any(BROKEN in tokens.on(arg).values() for arg in operands):
        return order("the tokens are laid out as a grid or mixed with another axis")
    if reason := _mixes(node, kind, tokens):
        return order(reason)
    return EFFECTS[kind](node, tokens)


@functools.cache
def _of_exits() -> frozenset[object]:
    """Return the operators that read answers of exits, each reduced otherwise: all are made whole.

    As an output does; so no exit waits for what later blocks reduce.
    """
    return frozenset(kernel(name).op for name in ("exit_score", "choose_exit"))


def _no_row(node: Node) -> str:
    """Say why a family without a row stops here."""
    if is_tensor(node) or isinstance(value(node), (tuple, list)):
        return f"{node.target} has no rule along tokens"
    return f"{node.target} computes a number from the tokens"


def acts_along(node: Node, kind: str) -> tuple[int, ...]:
    """Return the dimensions along which an operator works: reduces, picks, orders or attends."""
    row = EFFECTS[kind]
    if isinstance(row, Along):
        return row.places(node)
    return ACTS_ALONG[kind](node) if kind in ACTS_ALONG else ()


def _mixes(node: Node, kind: str, tokens: Tokens) -> str:
    """Say why an operator compares what each sample keeps by itself, or cuts it in the middle."""
    places = acts_along(node, kind)
    if not places or not tokens.on(first(node)):
        return ""
    x = first(node)
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


def _along(reason: str, places: Places) -> Along:
    """Make the rule of operators that are MAP unless they work along the tokens."""
    return Along(reason, places)


ACTS_ALONG: dict[str, Places] = {
    "reduction": named_dims,
    "select": lambda node: (dim_arg(node, 1),),
    "slice": lambda node: (dim_arg(node, 1),),
    "index": picked,
    "gather": named_dims,
    "scatter": named_dims,
    "index-select": named_dims,
    "write": named_dims,
    "attention": lambda node: (len(shape(first(node))) - 2,),
}
"""The dimensions along which a family works, if its rule says more than MAP unless along them."""

EffectRule = Callable[[Node, Tokens], Effect]
EFFECTS: dict[str, EffectRule] = {
    **dict.fromkeys(("pointwise", "cast", "permute", "transpose", "reverse"), rules.each_token),
    **dict.fromkeys(("movedim", "expand", "expand-like", "stack", "item"), rules.each_token),
    "one-hot": rules.each_token,
    "norm": _along("a norm runs over the tokens", rules.normalised),
    "channel-norm": _along("every token has weights of its own", rules.weighted_channels),
    "place-norm": _along("a norm runs over the tokens", lambda n: rules.all_places(n)[1:]),
    "weight-norm": Always("the tokens are taken as weights"),
    "softmax": _along("a softmax over the tokens outside of an attention call", named_dims),
    "scan": _along("it depends on the order of the tokens", named_dims),
    "triangle": _along("it depends on the order of the tokens", rules.last_places(2)),
    "linear": rules.linear,
    "matmul": rules.matmul,
    "einsum": rules.einsum,
    "outer": Always("a table is made of the tokens"),
    "distance": rules.distance,
    "attention": rules.attention,
    "view": rules.view,
    "view-like": rules.view,
    "shuffle": _along("the tokens are laid out as another grid", rules.last_places(3)),
    "pairs": _along("the tokens are taken as pairs", rules.last_places(1)),
    "repeat": _along("the tokens are repeated", rules.repeated),
    "copies": _along("the tokens are repeated", named_dims),
    "reduction": rules.reduction,
    "select": rules.select,
    "slice": rules.slice_,
    "narrow": _along("a range of the tokens is taken by its length", named_dims),
    "join": rules.join,
    "pad": _along("the tokens are padded", lambda n: tuple(margins(n))),
    "write": rules.write,
    "windows": _along("the tokens are cut into windows", lambda n: (dim_arg(n, 1),)),
    "patches": _along("the tokens are cut into patches", rules.last_places(2)),
    "unbind": _along("the tokens are taken apart", named_dims),
    "pieces": _along("the tokens are split", named_dims),
    "embedding": rules.embedding,
    "gather": rules.gather,
    "index": rules.index,
    "index-select": rules.index_select,
    "index-copy": Always("tokens are written at the places of an index"),
    "index-put": rules.index_put,
    "scatter": rules.scatter,
    "masked-scatter": Always("tokens take their places by a mask"),
    "buckets": rules.buckets,
    "convolution": _along("a convolution or pooling runs over the tokens", rules.convolved),
    "transposed": _along(
        "a convolution or pooling runs over the tokens", lambda n: rules.all_places(n)[1:]
    ),
    "grid": _along("a convolution or pooling runs over the tokens", rules.pooled),
    "renewed": _along("the tokens are sorted, compared or transformed", named_dims),
    "halve": _along("the tokens are halved", named_dims),
    "roll": _along("the tokens are shifted", lambda n: named_dims(n, "dims")),
    "size": rules.size,
    "create": Always("a new tensor is made with sizes of its own"),
    "meshgrid": Always("a grid is made of the tokens"),
    "kernel": Always("the tokens are reduced already by an earlier pass"),
}
"""Family → what it does along the tokens. A family without a row blocks every site before it."""
