"""Small patterns over the graph: operators, sums and products in any order, captures by identity.

A pattern is data. It is matched from the last node of what it describes, backwards:

    X = Capture("x")
    SILU = product((Call((aten.sigmoid.default,), X), 1), (X, 1))
    match(SILU, node)   # {"x": ...} for x * sigmoid(x) in either order, or None

A product is any tree of `mul`, `div`, `pow`, `sqrt` ...: factors with exponents, and a number.
A sum is any tree of `add`, `sub`, `neg`: terms with coefficients, and a number. A pattern opens
no more of a tree than it has parts, so the time for one node is bounded by the pattern alone.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from torch.fx import Node

from effopt.constants import number_in

aten = torch.ops.aten
Match = Mapping[str, Any]
"""What the captures of a pattern stand for: nodes, and numbers."""

PRECISION = 2e-7
"""Numbers of a pattern are met to this relative difference, an ulp or two of float32."""


@dataclass(frozen=True)
class Capture:
    """Any node, or one that matches `of`; the same one wherever the name stands."""

    name: str
    of: "Pattern | None" = None


@dataclass(frozen=True)
class Call:
    """A node of one of the operators whose first arguments match, and that `where` accepts.

    An argument that is no pattern must be equal.
    """

    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    where: Callable[[Node], bool] = lambda node: True


@dataclass(frozen=True)
class Either:
    """The first of several patterns that matches."""

    options: tuple["Pattern", ...]


@dataclass(frozen=True)
class Group:
    """A sum or a product, by its law: parts with weights, and a number or the name of one."""

    law: "Law"
    parts: tuple[tuple["Pattern", float], ...]
    number: float | str


Pattern = Capture | Call | Either | Group


def product(*factors: tuple[Pattern, float], scale: float | str = 1.0) -> Group:
    """Describe scale * f1**e1 * f2**e2 ...; the factors that say most come first."""
    return Group(TIMES, factors, scale)


def total(*terms: tuple[Pattern, float], constant: float | str = 0.0) -> Group:
    """Describe constant + c1 * t1 + c2 * t2 ...; the terms that say most come first."""
    return Group(PLUS, terms, constant)


def match(pattern: Pattern, node: Node) -> Match | None:
    """Match a pattern whose last node is `node`."""
    return next(_match(pattern, node, {}), None)


def heads(pattern: Pattern) -> frozenset[Any]:
    """Return the operators that the last node of a call, a sum or a product may have."""
    if isinstance(pattern, Call):
        return frozenset(pattern.targets)
    assert isinstance(pattern, Group)
    return frozenset(pattern.law.opens)


def number(arg: object) -> float | None:
    """Return the number that an argument is: a literal, or a constant tensor of one element."""
    if isinstance(arg, Node):
        known = arg.op == "get_attr" and arg.meta["val"].numel() == 1
        return number_in(arg) if known and arg.meta["val"].dtype != torch.bool else None
    return None if isinstance(arg, bool) else number_in(arg)


def _match(pattern: Pattern, arg: object, known: Match) -> Iterator[Match]:
    """Yield every way to match, each with what was known before."""
    if not isinstance(arg, Node):
        return
    if isinstance(pattern, Capture):
        if known.get(pattern.name, arg) is arg:
            inner = iter([known]) if pattern.of is None else _match(pattern.of, arg, known)
            yield from ({**found, pattern.name: arg} for found in inner)
    elif isinstance(pattern, Either):
        for option in pattern.options:
            yield from _match(option, arg, known)
    elif isinstance(pattern, Group):
        yield from _group(pattern, arg, known)
    elif arg.target in pattern.targets and pattern.where(arg):
        yield from _arguments(pattern.args, arg.args, known)


def _arguments(wanted: tuple[Any, ...], args: tuple[Any, ...], known: Match) -> Iterator[Match]:
    if not wanted:
        yield known
    elif not args:
        return
    elif isinstance(wanted[0], Pattern):
        for found in _match(wanted[0], args[0], known):
            yield from _arguments(wanted[1:], args[1:], found)
    elif wanted[0] == args[0]:
        yield from _arguments(wanted[1:], args[1:], known)


# --- sums and products ------------------------------------------------------------------------

Parts = tuple[tuple[Any, float], ...]
"""Arguments with their weights: exponents in a product, coefficients in a sum."""


@dataclass(frozen=True)
class Law:
    """What a product and a sum differ in: which operators open, and how numbers join."""

    opens: Mapping[Any, Callable[[Node], Parts]]
    unit: float
    scale: Callable[[float, float], float]
    join: Callable[[float, float], float]


def _ways(law: Law, arg: object, weight: float, budget: int) -> Iterator[tuple[float, Parts]]:
    """Yield each way to read an argument as a number and at most `budget` parts."""
    literal = number(arg)
    if literal is not None:
        if literal > 0 or (weight.is_integer() and (literal or weight > 0)):
            yield law.scale(literal, weight), ()
        return
    if not isinstance(arg, Node) or budget < 1:
        return
    yield law.unit, ((arg, weight),)
    inner = _opened(law, arg)
    # sqrt(a)**2 is not a, and sqrt(a * b) is not sqrt(a) * sqrt(b), where a is negative.
    if inner and weight.is_integer() and (abs(weight) == 1 or _whole(inner)):
        yield from _joined(law, tuple((part, weight * own) for part, own in inner), budget)


def _opened(law: Law, node: Node) -> Parts:
    """Return the parts of a node; none where `alpha` or a rounding mode says more than the law."""
    plain = node.target in law.opens and not node.kwargs and len(node.args) <= 2
    return law.opens[node.target](node) if plain else ()


def _whole(parts: Parts) -> bool:
    return all(float(weight).is_integer() for _, weight in parts)


def _joined(law: Law, parts: Parts, budget: int) -> Iterator[tuple[float, Parts]]:
    if not parts:
        yield law.unit, ()
        return
    (part, weight), *rest = parts
    for literal, own in _ways(law, part, weight, budget):
        for others, more in _joined(law, tuple(rest), budget - len(own)):
            yield law.join(literal, others), (*own, *more)


def _group(group: Group, node: Node, known: Match) -> Iterator[Match]:
    budget = sum(max(1, int(abs(weight))) for _, weight in group.parts)
    for literal, parts in _ways(group.law, node, 1.0, budget):
        merged = _merged(parts)
        if isinstance(group.number, str):
            found: Match | None = {**known, group.number: literal}
        else:
            found = known if isclose(group.number, literal, rel_tol=PRECISION) else None
        if merged is not None and found is not None and len(merged) == len(group.parts):
            yield from _assigned(group.parts, merged, found)


def _merged(parts: Parts) -> dict[Node, float] | None:
    """Add up the weights of equal parts; None where x / x or x - x would cancel."""
    merged: dict[Node, float] = {}
    for part, weight in parts:
        if merged.get(part, weight) * weight < 0:
            return None
        merged[part] = merged.get(part, 0.0) + weight
    return merged


def _assigned(
    wanted: tuple[tuple[Pattern, float], ...], parts: Mapping[Node, float], known: Match
) -> Iterator[Match]:
    """Give each pattern a part of its weight, in any order."""
    if not wanted:
        yield known
        return
    (pattern, weight), *rest = wanted
    for part, own in parts.items():
        if isclose(weight, own, rel_tol=PRECISION):
            left = {other: more for other, more in parts.items() if other is not part}
            for found in _match(pattern, part, known):
                yield from _assigned(tuple(rest), left, found)


def _weighted(*weights: float) -> Callable[[Node], Parts]:
    """Make the rule of an operator whose arguments are parts."""
    return lambda node: tuple(zip(node.args, weights, strict=False))


def _power(node: Node) -> Parts:
    exponent = number(node.args[1])
    return ((node.args[0], exponent),) if exponent else ()


TIMES = Law(
    {
        **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _weighted(1, 1)),
        **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _weighted(1, -1)),
        aten.neg.default: lambda node: ((node.args[0], 1), (-1, 1)),
        aten.square.default: _weighted(2),
        aten.reciprocal.default: _weighted(-1),
        aten.sqrt.default: _weighted(0.5),
        aten.rsqrt.default: _weighted(-0.5),
        aten.pow.Tensor_Scalar: _power,
    },
    unit=1.0,
    scale=lambda literal, exponent: literal**exponent,
    join=lambda a, b: a * b,
)
PLUS = Law(
    {
        **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _weighted(1, 1)),
        **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _weighted(1, -1)),
        aten.rsub.Scalar: _weighted(-1, 1),
        aten.neg.default: _weighted(-1),
    },
    unit=0.0,
    scale=lambda literal, coefficient: literal * coefficient,
    join=lambda a, b: a + b,
)
