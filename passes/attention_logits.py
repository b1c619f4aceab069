"""From a product of queries and keys to its softmax: what each operator makes of the logits.

A fact is carried forward from each product: its operands, the factor on it, and what was added
to it or hidden from it on the way. One rule an operator; an operator without a rule ends the way.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from effopt.axes import same_size, same_sizes
from effopt.constants import LOW, number_in
from effopt.passes.attention_products import Product, product_of
from effopt.program import is_tensor, shape, value

aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default)


@dataclass(frozen=True)
class Bias:
    """A tensor that was added to the logits, times a factor; `at` is the logits it met."""

    node: Node
    factor: float
    at: Node


@dataclass(frozen=True)
class Hidden:
    """Places of the logits that were filled with a low number: where `node` is not `seen`."""

    node: Node
    seen: bool
    low: float
    at: Node


@dataclass(frozen=True)
class Logits:
    """A product on its way to a softmax; `path` holds the nodes from the product to here.

    `rows` are factors that are one for all keys; `passed` are values that a softmax does not see.
    """

    product: Product
    scale: float
    path: tuple[Node, ...]
    biases: tuple[Bias, ...] = ()
    hidden: tuple[Hidden, ...] = ()
    rows: tuple[Bias, ...] = ()
    passed: tuple[Node, ...] = ()

    def then(self, node: Node, **changes: Any) -> "Logits":
        """Go one node further."""
        return replace(self, path=(*self.path, node), **changes)


@dataclass(frozen=True)
class Weights:
    """The result of a softmax over logits (None if they are no product), and what keeps it."""

    logits: "Logits | Lost | None"
    softmax: Node
    path: tuple[Node, ...]


@dataclass(frozen=True)
class Lost:
    """Logits that have no form as one attention call, and why."""

    reason: str


Fact = Logits | Weights | Lost
Facts = Mapping[Node, Fact]


def fact_of(node: Node, facts: Facts) -> Fact | None:
    """Find what a node says of a product, from what its arguments say."""
    known = [facts[arg] for arg in node.all_input_nodes if arg in facts]
    if node.target in SOFTMAX:
        return _softmax(node, facts)
    product = product_of(node)
    if product is not None:
        return _started(node, product)
    if not known:
        return None
    if node.target in RULES and (found := RULES[node.target](node, facts)) is not None:
        return found
    lost = next((one for one in known if isinstance(one, Lost)), None)
    if any(isinstance(one, Logits) for one in known):
        operation = getattr(node.target, "__name__", str(node.target))
        return lost or Lost(f"{node.name} ({operation}) lies between the product and its softmax")
    return lost if node.target in RULES else None


def _started(node: Node, product: Product) -> Logits | None:
    """Begin a way at a product whose result is [..., n, m] as it stands."""
    if product.order != tuple(range(len(product.order))):
        return None
    right, factor = product.right, product.factor
    while (scaled := _scaled(right.node)) is not None:  # k^T / sqrt(d) hides the transposition
        right, factor = replace(right, node=scaled[0]), factor * scaled[1]
    biases = () if product.added is None else (Bias(*product.added, at=node),)
    return Logits(replace(product, right=right), factor, (node,), biases)


def _scaled(node: Node) -> tuple[Node, float] | None:
    """Read a node as another one times a number."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or node.kwargs:
        return None
    inner, by = node.args
    factor = number_in(by)
    if not isinstance(inner, Node) or not factor or not _same(inner, node):
        return None
    return inner, factor if node.target is aten.mul.Tensor else 1 / factor


def _same(one: Node, other: Node) -> bool:
    """Tell whether two values have the same shape and dtype."""
    return value(one).dtype == value(other).dtype and same_sizes(shape(one), shape(other))


def _softmax(node: Node, facts: Facts) -> Weights | None:
    source, dim = node.args[:2]
    assert isinstance(source, Node)
    assert isinstance(dim, int)
    if dim not in (-1, len(shape(node)) - 1):
        return None
    found = facts.get(source)
    return Weights(found if isinstance(found, (Logits, Lost)) else None, node, (node,))


def _scale(node: Node, facts: Facts) -> Fact | None:
    """`logits * 0.5`, `0.5 * logits`, `logits / 8`: what was added before is scaled as well."""
    arguments = list(node.args[:2])
    if node.target is aten.mul.Tensor and arguments[0] not in facts:
        arguments.reverse()
    x, by = arguments
    factor = number_in(by)
    fact = facts.get(x) if isinstance(x, Node) else None
    if not isinstance(fact, Logits) or not _same(fact.path[-1], node):
        return None
    if not factor:
        return _scale_rows(node, fact, by)
    if factor < 0:
        return None
    factor = 1 / factor if node.target is aten.div.Tensor else factor
    biases = tuple(replace(bias, factor=bias.factor * factor) for bias in fact.biases)
    hidden = tuple(replace(one, low=one.low * factor) for one in fact.hidden)
    if any(one.low > LOW for one in hidden):
        return Lost("what a mask hid is scaled back to where it counts")
    return fact.then(node, scale=fact.scale * factor, biases=biases, hidden=hidden)


def _scale_rows(node: Node, fact: Logits, by: object) -> Fact | None:
    """A learned temperature for each head, before anything is added."""
    if node.target is not aten.mul.Tensor or not isinstance(by, Node) or not is_tensor(by):
        return None
    sizes = shape(by)
    if not sizes or not same_size(sizes[-1], 1) or fact.biases or fact.hidden:
        return None
    return fact.then(node, rows=(*fact.rows, Bias(by, 1.0, fact.path[-1])))


def _sum(node: Node, facts: Facts) -> Fact | None:
    """A bias on either side; of two products, the one that holds data of the sample twice."""
    alpha = node.kwargs.get("alpha", 1)
    pair = [arg for arg in node.args[:2] if isinstance(arg, Node) and is_tensor(arg)]
    if len(pair) != 2 or not isinstance(alpha, (int, float)):
        return None
    ways = [arg for arg in pair if isinstance(facts.get(arg), Logits)]
    if len(ways) == 2:
        return Lost("disentangled: several products are added up before the softmax")
    if not ways or (node.target is aten.sub.Tensor and ways[0] is not node.args[0]):
        return None
    logits, other = ways[0], pair[1] if ways[0] is pair[0] else pair[0]
    fact = facts[logits]
    assert isinstance(fact, Logits)
    if not _same(logits, node):
        return None
    if node.target is aten.sub.Tensor and (maximum := _own_maximum(other, fact)):
        return fact.then(node, passed=(*fact.passed, maximum))
    factor = float(-alpha if node.target is aten.sub.Tensor else alpha)
    if alpha != 1 and logits is node.args[1]:
        return None
    return fact.then(node, biases=(*fact.biases, Bias(other, factor, logits)))


def _own_maximum(node: Node, fact: Logits) -> Node | None:
    """Find the greatest logit of each row in a value, which a softmax does not see."""
    if not same_size(shape(node)[-1], 1) or len(shape(node)) != len(shape(fact.path[-1])):
        return None
    while node.target in (operator.getitem, aten.unsqueeze.default, aten.reshape.default):
        assert isinstance(node.args[0], Node)
        node = node.args[0]
    known = node.target in (aten.amax.default, aten.max.dim) and len(node.args) > 1
    last = (-1, [-1], len(shape(fact.path[-1])) - 1)
    own = known and node.args[0] is fact.path[-1] and node.args[1] in last
    return node if own else None


def _fill(node: Node, facts: Facts) -> Fact | None:
    """`masked_fill(logits, hidden, low)`, `where(seen, logits, low)`, `where(hidden, low, …)`."""
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        (x, condition, low), seen = node.args, False
        if isinstance(x, Node) and isinstance(weights := facts.get(x), Weights):
            return _zeroed(node, weights)
    else:
        condition, x, low = node.args
        seen = x in facts
        if not seen:
            x, low = low, x
    fact, number = facts.get(x) if isinstance(x, Node) else None, number_in(low)
    if not isinstance(fact, Logits) or not isinstance(condition, Node) or number is None:
        return None
    if number > LOW or not _same(fact.path[-1], node) or value(condition).dtype != torch.bool:
        return None
    hidden = Hidden(condition, seen, number, fact.path[-1])
    return fact.then(node, hidden=(*fact.hidden, hidden))


def _zeroed(node: Node, fact: Weights) -> Fact | None:
    """Weights that are zero since their logits were low, set to zero once more."""
    hidden = fact.logits.hidden if isinstance(fact.logits, Logits) else ()
    known = {one.node for one in hidden if not one.seen}
    same = node.args[1] in known and number_in(node.args[2]) == 0
    return replace(fact, path=(*fact.path, node)) if same else None


def _clamp(node: Node, facts: Facts) -> Fact | None:
    """`max(logits, least)`, where no number is below the least: nothing is lifted."""
    fact = facts.get(node.args[0])  # type: ignore[arg-type]
    low, high = [*node.args[1:3], None, None][:2]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    number = number_in(low)
    if not isinstance(fact, Logits) or number is None or not _same(fact.path[-1], node):
        return None
    if high is not None or number > torch.finfo(value(node).dtype).min:
        return None
    return fact.then(node)


def _cast(node: Node, facts: Facts) -> Fact | None:
    """Casts that lose nothing, and what does nothing."""
    fact = facts.get(node.args[0])  # type: ignore[arg-type]
    if isinstance(fact, Weights):
        return replace(fact, path=(*fact.path, node))
    if not isinstance(fact, Logits):
        return None
    before, after = value(fact.path[0]).dtype, value(node).dtype
    wider = after.is_floating_point and torch.finfo(after).bits >= torch.finfo(before).bits
    return fact.then(node) if (wider and after != torch.bfloat16) or after == before else None


def _view(node: Node, facts: Facts) -> Fact | None:
    """Regroup what comes before queries and keys."""
    fact = facts.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(fact, (Logits, Weights)):
        return None
    before, after = shape(fact.path[-1]), shape(node)
    if len(after) < 3 or not same_sizes(before[-2:], after[-2:]):
        return None
    return replace(fact, path=(*fact.path, node))


Rule = Callable[[Node, Facts], Fact | None]
RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor), _scale),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _sum),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _fill),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), _fill),
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default), _clamp),
    **dict.fromkeys((aten.maximum.default, aten.max.other), _clamp),
    **dict.fromkeys((aten.to.dtype, aten.to.device, aten.to.dtype_layout), _cast),
    **dict.fromkeys((aten.type_as.default, aten.alias.default, aten.clone.default), _cast),
    aten.contiguous.default: _cast,
    **dict.fromkeys((aten.reshape.default, aten.view.default, aten._unsafe_view.default), _view),
    **dict.fromkeys((aten.unsqueeze.default, aten.squeeze.dim, aten.unflatten.int), _view),
    aten.flatten.using_ints: _view,
}
"""Operators that may lie between a product, its softmax and the product with the values."""
