"""Scale rules: which scales of a value's elements each operator ties to which.

The rewritten graph computes v / S[label of v], element by element. A rule gives the labels of a
result, of the result's own shape, from those of the operands. What has no rule pins its operands:
a new operator costs an opportunity and never correctness.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from effopt.axis_rules import argument, dims_arg
from effopt.axis_table import family
from effopt.constants import constant_value
from effopt.labelling import LARGEST, Labelling, Site
from effopt.labels import spread
from effopt.program import is_tensor, value

aten = torch.ops.aten
SHAPED = frozenset(("view", "expand", "repeat", "view-like", "expand-like"))
"""Families whose sizes say the shape of the result and not which elements are taken."""

CHANNELWISE: dict[str, tuple[int, int | None]] = {
    "gather_tokens": (1, None),
    "merge_tokens": (1, 1),
    "scatter_tokens": (2, 1),
    "fuse_tokens": (1, 1),
}
"""By kernel: how many leading operands its first result is linear in, channel by channel, and the
dimension of tokens (None: its third argument says)."""

Rule = Callable[[Labelling, Node], Any]


def opaque(state: Labelling, node: Node) -> Tensor | None:
    """Pin all operands: nothing is known of the operator."""
    state.pin(*node.all_input_nodes)
    return None


def shape_only(state: Labelling, node: Node) -> None:
    """Read nothing but the shape of the operands."""


def same(state: Labelling, node: Node) -> Tensor | None:
    """Pass labels on: f(x / s) = f(x) / s for each element and positive s."""
    return state.of(node.args[0])


def linear(state: Labelling, node: Node) -> Tensor | None:
    """Scale the columns of the weight up by what its inputs lost; its rows give new labels."""
    weight, inner, bias = parts(node)
    if weight not in state.own or value(weight).ndim != 2 or not set(node.kwargs) <= {"bias"}:
        return opaque(state, node)
    x = state.channels(source_of(node))
    state.columns[node] = x
    times = None if x is None else x.unsqueeze(1 - inner)
    if bias is not None and (bias not in state.own or value(bias).ndim != 1):
        state.pin(bias)
        state.sites.append(Site(node, weight, times, None))
        return None
    over = state.labels.fresh(state.shape(weight)[1 - inner])
    state.sites.append(Site(node, weight, times, over.unsqueeze(inner)))
    if bias is not None:
        state.sites.append(Site(node, bias, None, over))
    return over.expand(state.shape(node))


LAYERS: dict[Any, tuple[int, int, int, int]] = {
    aten.linear.default: (0, 1, 1, 2),
    aten.addmm.default: (1, 2, 0, 0),
    aten.matmul.default: (0, 1, 0, 2),
    aten.mm.default: (0, 1, 0, 2),
}
"""Spellings of a linear layer: the places of its source and weight, which dimension of the weight
is the input's, and the place of the bias."""


def source_of(node: Node) -> Node:
    """Return the activation that a linear layer reads."""
    source = node.args[LAYERS[node.target][0]]
    assert is_tensor(source)
    return source


def parts(node: Node) -> tuple[Node, int, Node | None]:
    """Return the weight of a linear layer, which of its dimensions is the input's, and the bias."""
    _, place, inner, added = LAYERS[node.target]
    weight = node.args[place]
    bias = node.args[added] if len(node.args) > added else node.kwargs.get("bias")
    assert isinstance(weight, Node)
    return weight, inner, bias if isinstance(bias, Node) else None


def norm(state: Labelling, node: Node) -> Tensor | None:
    """Read the true values, and give new labels by the gain and the offset, if there is a gain."""
    weight = argument(node, "weight")
    bias = argument(node, "bias") if node.target is aten.layer_norm.default else None
    state.pin(node.args[0])
    if weight not in state.own or not (bias is None or bias in state.own):
        return opaque(state, node)
    over = state.absorb(weight, state.shape(weight))
    if bias is not None:
        state.sites.append(Site(node, bias, None, over))
    return over.expand(state.shape(node))


def embedding(state: Labelling, node: Node) -> Tensor | None:
    """Give new labels by the columns of the table."""
    table = node.args[0]
    if table not in state.own or not is_tensor(table):
        return opaque(state, node)
    return state.absorb(table, state.shape(table)[1:]).expand(state.shape(node))


def add(state: Labelling, node: Node) -> Tensor | None:
    """Tie both sides, element by element; a number that is added pins."""
    x, y = (node.args[0], node.args[1]) if node.target is not aten.where.self else node.args[1:3]
    if not is_tensor(x) or not is_tensor(y):
        return opaque(state, node)
    a, b = state.of(x), state.of(y)
    if a is None or b is None:
        return opaque(state, node)
    shape = state.shape(node)
    a, b = a.expand(shape), b.expand(shape)
    state.labels.unite(a, b, state.cause)
    return a if spread(a) <= spread(b) else b


def multiply(state: Labelling, node: Node) -> Tensor | None:
    """Carry the labels of one factor; a constant of its own for each channel gives new ones."""
    x, y = node.args[:2]
    if not is_tensor(x) or not is_tensor(y):
        return state.of(x if is_tensor(x) else y)
    for constant, other in ((y, x), (x, y)):
        if constant in state.own and _is_gain(state, constant, other, node):
            return _gain(state, constant, state.of(other)).expand(state.shape(node))
    a, b = state.of(x), state.of(y)
    kept, pinned = (y, x) if state.free(b) else (x, y)
    state.pin(pinned)
    labels = b if kept is y else a
    return None if labels is None else labels.expand(state.shape(node))


def _is_gain(state: Labelling, constant: Node, other: Node, node: Node) -> bool:
    shape, whole = state.shape(constant), state.shape(node)
    wide = bool(shape) and shape[-1] == whole[-1] > 1 and other.op != "get_attr"
    small = math.prod(shape) <= LARGEST
    return wide and small and whole == state.shape(other) and value(other).is_floating_point()


def _gain(state: Labelling, constant: Node, labels: Tensor | None) -> Tensor:
    """Take the scales of a value into the constant that it is multiplied with."""
    shape, times = state.shape(constant), None
    if labels is not None:
        ahead = labels.ndim - len(shape)
        dims = [dim for dim, size in enumerate((1,) * ahead + shape) if size == 1]
        times = state.level(labels, dims).reshape(shape)
    return state.absorb(constant, shape, times)


def divide(state: Labelling, node: Node) -> Tensor | None:
    """Carry the labels of what is divided."""
    if not is_tensor(node.args[0]):
        return opaque(state, node)
    state.pin(node.args[1])
    labels = state.of(node.args[0])
    return None if labels is None else labels.expand(state.shape(node))


def matmul(state: Labelling, node: Node) -> Tensor | None:
    """Carry the labels of the columns of the right side: they are equal along what is summed."""
    a, b = node.args[:2]
    if b in state.own and is_tensor(b) and value(b).ndim == 2:
        return linear(state, node)
    state.pin(a)
    labels = state.of(b)
    if labels is None or labels.ndim < 2 or len(state.shape(node)) < labels.ndim:
        return opaque(state, node)
    return state.level(labels, (-2,)).expand(state.shape(node))


def attention(state: Labelling, node: Node) -> Tensor | None:
    """Carry the labels of the values, equal over the keys; grouped heads are repeated."""
    q, k, v = node.args[:3]
    state.pin(q, k, argument(node, "attn_mask"))
    labels, shape = state.of(v), state.shape(node)
    if labels is None:
        return None
    head = state.level(labels, (-2,))
    if argument(node, "enable_gqa") and head.ndim > 2:
        head = head.repeat_interleave(shape[-3] // head.shape[-3], -3)
    return head.expand(shape)


def reduction(state: Labelling, node: Node) -> Tensor | None:
    """Carry the labels of a sum, a mean or an extreme: they are equal along what it runs over."""
    labels = state.of(node.args[0])
    if labels is None:
        return None
    dims = dims_arg(node, 1)
    head = state.level(labels, dims)
    return head if argument(node, "keepdim") else head.squeeze(dims)


def masked(state: Labelling, node: Node) -> Tensor | None:
    """Pass labels on where zeros are filled in."""
    return same(state, node) if argument(node, "value") == 0 else opaque(state, node)


def structural(state: Labelling, node: Node) -> Any:
    """Run the operator on the labels themselves; their places must not follow from free sizes."""
    if all(state.of(source) is None for source in node.all_input_nodes):
        return None
    if _is_placed_by_size(state, node):
        return opaque(state, node)
    target: Any = node.target
    given: Any = map_arg((node.args, node.kwargs), lambda arg: _plain(state, arg))
    found = target(*given[0], **given[1])
    return tuple(found) if isinstance(found, (list, tuple)) else found


def _plain(state: Labelling, arg: Node) -> Any:
    """Return the labels of an operand as a tensor, zeros if pinned; numbers for sizes."""
    if not is_tensor(arg):
        return state.sizes(value(arg))
    labels = state.of(arg)
    return torch.zeros((), dtype=torch.int64).expand(state.shape(arg)) if labels is None else labels


def _is_placed_by_size(state: Labelling, node: Node) -> bool:
    """Tell whether a free size says which elements are taken, where these have different labels."""
    sizes = [source for source in node.all_input_nodes if not is_tensor(source)]
    if not sizes or family(node) in SHAPED:
        return False
    labels = state.of(node.args[0])
    if family(node) not in ("slice", "select", "narrow") or labels is None:
        return True
    dim = node.args[1] if len(node.args) > 1 else 0
    return not isinstance(dim, int) or state.varies(labels, dim % labels.ndim)


def zeros(state: Labelling, node: Node) -> Tensor | None:
    """Give new labels: zeros stay zeros at any scale."""
    shape = state.shape(node)
    floating = value(node).is_floating_point() and shape
    return state.labels.fresh(shape[-1]).expand(shape) if floating else None


def pad(state: Labelling, node: Node) -> Tensor | None:
    """Give zeros that are filled in new labels."""
    labels, widths = state.of(node.args[0]), node.args[1]
    mode, filled = argument(node, "mode"), argument(node, "value")
    sized = not all(map(is_tensor, node.all_input_nodes))
    if labels is None or sized or mode not in (None, "constant") or filled not in (None, 0):
        return opaque(state, node)
    given: Any = widths
    found: Tensor = aten.constant_pad_nd.default(labels, given, -1)
    found[found < 0] = state.labels.fresh(int((found < 0).sum()))
    return found


def places(state: Labelling, node: Node) -> Tensor | None:
    """Take places: where data says which, labels are equal along them, so any index serves."""
    labels = state.of(node.args[0])
    given: Any = node.args[1]
    several = isinstance(given, (list, tuple))
    indices: Any = given if several else node.args[2:3]
    held = [index for index in indices if index is not None]
    if labels is None or any(not is_tensor(i) or value(i).dtype != torch.int64 for i in held):
        return opaque(state, node)
    dims = [n for n, index in enumerate(given) if index is not None] if several else [given]
    known = {index: constant_value(index) for index in held if index.op == "get_attr"}
    sizes = value(node.all_input_nodes[0]).shape
    fixed = len(known) == len(held) and all(isinstance(sizes[dim], int) for dim in dims)
    taken = labels if fixed else state.level(labels, dims)
    target: Any = node.target
    rest: Any = map_arg(
        node.args[1:],
        lambda i: known[i] if fixed else torch.zeros(state.shape(i), dtype=torch.int64),
    )
    found: Tensor = target(taken, *rest)
    return found


def item(state: Labelling, node: Node) -> Tensor | None:
    """Take one of several results."""
    source, place = node.args
    found: Any = state.at.get(source) if isinstance(source, Node) else None
    taken: Tensor | None = None if found is None else found[place]
    return taken


def tokens(state: Labelling, node: Node) -> Any:
    """Carry the labels of what a kernel of ours maps channel by channel, equal over tokens."""
    assert isinstance(node.target, OpOverload)
    carried, dim = CHANNELWISE.get(node.target._opname, (0, None))
    values = [state.of(arg) for arg in node.args[:carried]]
    if not carried or any(labels is None for labels in values):
        return opaque(state, node)
    state.pin(*node.args[carried:])
    place: Any = node.args[2] if dim is None else dim
    heads = [state.level(labels, (place,)) for labels in values if labels is not None]
    for head in heads[1:]:
        state.labels.unite(heads[0], head, state.cause)
    val = value(node)
    first, rest = (val[0], val[1:]) if isinstance(val, (tuple, list)) else (val, None)
    found = heads[0].expand(tuple(map(state.sizes, first.shape)))
    return found if rest is None else (found, *(None for _ in rest))
