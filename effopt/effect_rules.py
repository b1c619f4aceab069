"""Rules of effects: what the operators of a family do along a token axis."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from effopt.attention import is_causal
from effopt.axes import Dim, leaves
from effopt.axis_index import indices, looked_up
from effopt.axis_parts import dim_arg_of_list, rejoined, slice_range
from effopt.axis_products import letters
from effopt.axis_rules import (
    Places,
    argument,
    dim_arg,
    first,
    grid_rank,
    is_pointwise,
    named_dims,
    tensors,
)
from effopt.axis_views import repeats
from effopt.program import shape, value
from effopt.tokens import BROKEN, MAP, Effect, Kind, Range, Tokens

aten = torch.ops.aten


@dataclass(frozen=True)
class Along:
    """The rule of operators that are MAP unless they work along the tokens: then, why not."""

    reason: str
    places: Places

    def __call__(self, node: Node, tokens: Tokens) -> Effect:
        """Compare the dimensions along which it works with those that count tokens."""
        spots = tokens.on(first(node))
        return order(self.reason) if set(self.places(node)) & set(spots) else MAP


def order(reason: str) -> Effect:
    """Say that tokens cannot be missing or out of place here, and why."""
    return Effect(Kind.ORDER, reason)


@dataclass(frozen=True)
class Always:
    """The rule of operators that need every token in its place."""

    reason: str

    def __call__(self, node: Node, tokens: Tokens) -> Effect:
        """Say why, whatever the dimensions."""
        return order(self.reason)


def each_token(node: Node, tokens: Tokens) -> Effect:
    """Every token by itself."""
    return MAP


# --- dimensions along which operators work ----------------------------------------------------


def all_places(node: Node) -> tuple[int, ...]:
    """Every dimension."""
    return tuple(range(len(shape(first(node)))))


def last_places(count: int) -> Places:
    """Make the rule of operators that work along the last dimensions."""
    return lambda node: all_places(node)[-count:]


def normalised(node: Node) -> tuple[int, ...]:
    """The last dimensions, as many as a norm lists."""
    given = node.args[1]
    assert isinstance(given, (list, tuple))
    return all_places(node)[-len(given) :]


def weighted_channels(node: Node) -> tuple[int, ...]:
    """The channels, where they have weights of their own; all dimensions in training."""
    if argument(node, "training") is True:
        return all_places(node)
    weights = [shape(arg) for arg in tensors(node)[1:]]
    return (1,) if any(size != (1,) for size in weights) else ()


def convolved(node: Node) -> tuple[int, ...]:
    """All but the batch; the channels alone, where the kernel covers one place."""
    return (1,) if is_pointwise(node) else all_places(node)[1:]


def pooled(node: Node) -> tuple[int, ...]:
    """The grid of a pooling or an upsampling."""
    return all_places(node)[-grid_rank(node) :]


def repeated(node: Node) -> tuple[int, ...]:
    """The dimensions that are repeated, counted in the argument."""
    ahead = len(shape(node)) - len(shape(first(node)))
    counts = repeats(node)[ahead:]
    return tuple(place for place, count in enumerate(counts) if count != 1)


# --- products ---------------------------------------------------------------------------------


def _mixed(contracted: Iterable[Dim], tokens: Tokens, what: str) -> Effect:
    """Say whether a sum of products runs over tokens or over samples."""
    factors = {axis for dim in contracted for axis in leaves(dim)}
    if any(tokens.find(leaves(dim)) is not None for dim in contracted):
        return order(f"{what} mixes the tokens")
    if factors & set(tokens.batch):
        return order(f"{what} mixes tokens of different samples, and each sample keeps others")
    return MAP


def linear(node: Node, tokens: Tokens) -> Effect:
    """A linear layer over channels; its weight is that of all tokens."""
    x, weight = tensors(node)[:2]
    if tokens.on(weight):
        return order("a linear layer mixes the tokens")
    return _mixed([tokens.axes.of(x)[-1]], tokens, "a linear layer")


def matmul(node: Node, tokens: Tokens) -> Effect:
    """A product over a dimension that is not the tokens."""
    a, b = (tokens.axes.of(arg) for arg in tensors(node)[-2:])
    inner = [a[-1], b[-2] if len(b) > 1 else b[0]]
    if any(tokens.find(dim) is not None for dim in inner):
        return order("a product mixes the tokens outside of an attention call")
    return _mixed(inner, tokens, "a product")


def distance(node: Node, tokens: Tokens) -> Effect:
    """Distances of vectors over channels."""
    inner = [tokens.axes.of(arg)[-1] for arg in tensors(node)[:2]]
    return _mixed(inner, tokens, "a distance")


def einsum(node: Node, tokens: Tokens) -> Effect:
    """A sum of products over letters that do not count tokens."""
    operands, output = letters(node)
    contracted, carrying = list[Dim](), list[Node]()
    for names, arg in zip(operands, tensors(node), strict=True):
        spots = tokens.on(arg)
        carrying += [arg] if spots else []
        if any(names.count(names[spot]) > 1 for spot in spots):
            return order("it takes tokens out of a table of token pairs")
        pairs = zip(names, tokens.axes.of(arg), strict=True)
        contracted += [dim for name, dim in pairs if name not in output]
    mixed = _mixed(contracted, tokens, "an einsum")
    if mixed is MAP and not _have_batch(carrying, tokens):
        return order("an einsum reads tokens of a value that all samples share")
    return mixed


def attention(node: Node, tokens: Tokens) -> Effect:
    """Attention over the tokens, or from them."""
    q, k = tensors(node)[:2]
    if any(len(shape(arg)) - 1 in tokens.on(arg) for arg in (q, k)):
        return order("attention over channels mixes the tokens")
    place = len(shape(q)) - 2
    on_queries, on_keys = place in tokens.on(q), place in tokens.on(k)
    if is_causal(node) and on_queries != on_keys:
        return order("causal attention compares the places of two kinds of tokens")
    return Effect(Kind.ATTEND) if on_queries or on_keys else MAP


# --- views, parts, reductions -----------------------------------------------------------------


def view(node: Node, tokens: Tokens) -> Effect:
    """A view that leaves the tokens a dimension, or whole in one."""
    after = tokens.on(node)
    if BROKEN in after.values() or not after:
        return order("a view cuts the tokens into a grid or windows")
    return MAP


def size(node: Node, tokens: Tokens) -> Effect:
    """A size that is not the number of tokens."""
    reads = dim_arg(node, 1) in tokens.on(first(node))
    return order("the number of tokens is computed with") if reads else MAP


def reduction(node: Node, tokens: Tokens) -> Effect:
    """A mean, a sum or an extreme over the tokens alone can be weighted; over others, each."""
    gone = named_dims(node)
    if not set(gone) & set(tokens.on(first(node))):
        return MAP
    pools = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
    if node.target in pools and len(gone) == 1:
        return Effect(Kind.POOL)
    return order(f"{node.target} over the tokens has no weighted form")


def select(node: Node, tokens: Tokens) -> Effect:
    """One token is picked."""
    return Effect(Kind.PICK) if dim_arg(node, 1) in tokens.on(first(node)) else MAP


def slice_(node: Node, tokens: Tokens) -> Effect:
    """A range of the tokens."""
    if dim_arg(node, 1) not in tokens.on(first(node)):
        return MAP
    if slice_range(node)[2] != 1:
        return order("every other token is taken")
    return Effect(Kind.RANGE)


def join(node: Node, tokens: Tokens) -> Effect:
    """Tensors are joined along another dimension, or the tokens are joined again in order."""
    place = dim_arg_of_list(node)
    if not any(place in tokens.on(part) for part in tensors(node)):
        return MAP
    whole = tokens.on(node).get(place) == Range(0, tokens.size, True)
    again = whole and rejoined(tokens.axes, node) == tokens.dim
    return MAP if again else order("the tokens are joined with others")


def write(node: Node, tokens: Tokens) -> Effect:
    """Places of another dimension than the tokens are overwritten."""
    (place,), source = named_dims(node), argument(node, "src")
    within = len(shape(source)) == len(shape(first(node))) and place in tokens.on(source)
    if within or place in tokens.on(first(node)) or not tokens.on(first(node)):
        return order("some tokens are overwritten")
    return MAP


# --- indices ----------------------------------------------------------------------------------


def _have_batch(args: Sequence[Node], tokens: Tokens) -> bool:
    """Tell whether all of several values differ from sample to sample, as the tokens kept do."""
    rows = set(tokens.batch)
    return all(rows & {axis for dim in tokens.axes.of(arg) for axis in dim} for arg in args)


def embedding(node: Node, tokens: Tokens) -> Effect:
    """A table is read by what each token says; the table itself holds no tokens."""
    table = tensors(node)[0]
    return order("a table is read by token place") if tokens.on(table) else MAP


def index(node: Node, tokens: Tokens) -> Effect:
    """`x[i, j]`: other dimensions than the tokens are indexed, or the index counts tokens."""
    x, given = first(node), indices(node)
    spots, carrying = tokens.on(x), [arg for arg in given.values() if tokens.on(arg)]
    if set(spots) & set(given):
        return order("tokens are picked by an index")
    if spots and carrying:
        return order("an index that counts the tokens is read from a value that does, too")
    if not _have_batch(carrying, tokens):
        return order("an index that all samples share counts the tokens")
    return MAP


def gather(node: Node, tokens: Tokens) -> Effect:
    """Along another dimension than the tokens, with an index for every token."""
    x, at = first(node), argument(node, "index")
    carrying = [arg for arg in (x, at) if tokens.on(arg)]
    if set(named_dims(node)) & set(tokens.on(x)):
        return order("tokens are gathered by an index")
    if not _stands_with(x, at, tokens) or not _have_batch(carrying, tokens):
        return order("tokens are gathered by an index of other places")
    return MAP


def _stands_with(x: Node, other: Node, tokens: Tokens) -> bool:
    """Tell whether every dimension of x that counts tokens is the same one of the other value."""
    dims, others = tokens.axes.of(x), tokens.axes.of(other)
    return all(len(others) > spot and dims[spot] == others[spot] for spot in tokens.on(x))


def scatter(node: Node, tokens: Tokens) -> Effect:
    """Written along another dimension than the tokens, with an index for every token."""
    x, *others = tensors(node)
    written = [arg for arg in others if shape(arg)]
    carrying = [arg for arg in (x, *written) if tokens.on(arg)]
    along = any(set(named_dims(node)) & set(tokens.on(arg)) for arg in carrying)
    together = all(_stands_with(x, arg, tokens) for arg in written)
    if along or not together or x not in carrying or not _have_batch(carrying, tokens):
        return order("tokens are written at the places of an index")
    return MAP


def index_select(node: Node, tokens: Tokens) -> Effect:
    """Along another dimension than the tokens."""
    along = set(named_dims(node)) & set(tokens.on(first(node)))
    if along or tokens.on(argument(node, "index")):
        return order("tokens are picked by an index")
    return MAP


def index_put(node: Node, tokens: Tokens) -> Effect:
    """One number where a mask is true, or values along other dimensions than the tokens."""
    x, given, values = first(node), indices(node), argument(node, "values")
    masked = len(given) == 1 and all(value(arg).dtype == torch.bool for arg in given.values())
    carrying = [arg for arg in (x, *given.values(), values) if tokens.on(arg)]
    if masked and not shape(values) and x in carrying and _have_batch(carrying, tokens):
        return MAP
    indexed = masked or set(tokens.on(x)) & set(given) or x not in carrying
    if indexed or any(arg in carrying for arg in given.values()):
        return order("tokens are written at the places of an index")
    return MAP


def buckets(node: Node, tokens: Tokens) -> Effect:
    """Each token's value is looked up in a list that holds no tokens."""
    lists = [arg for arg in tensors(node) if arg is not looked_up(node)]
    return order("values are looked up among the tokens") if any(map(tokens.on, lists)) else MAP
