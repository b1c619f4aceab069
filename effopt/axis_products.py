"""Axis rules of products: what is contracted is one, what is free carries over."""

import re

import torch
from torch.fx import Node

from effopt.axes import AxisError, AxisMap, Dim, Dims, same_size, size_of, unify
from effopt.axis_rules import align, tensors
from effopt.program import shape

aten = torch.ops.aten
ADDED = (aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
"""Products whose first tensor is added to the result."""


def linear(found: AxisMap, node: Node) -> Dims:
    """`x [..., in] @ weight [out, in]^T + bias [out]`."""
    x, weight, *bias = tensors(node)
    (*outer, inner), (*out, into) = found.of(x), found.of(weight)
    unify(inner, into)
    for term in bias:
        align([tuple(out), found.of(term)], 1)
    return (*outer, *out)


def matmul(found: AxisMap, node: Node) -> Dims:
    """Batched product [..., n, k] @ [..., k, m], or with vectors [k]; a term may be added."""
    left, right = tensors(node)[-2:]
    a, b = found.of(left), found.of(right)
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    unify(a[-1], b[-2] if len(b) > 1 else b[0])
    outer = (a[:-2], b[:-2])
    result = (*align(outer, max(map(len, outer))), *rows, *columns)
    if node.target not in ADDED:
        return result
    return align([result, found.of(tensors(node)[0])], len(result))


def outer(found: AxisMap, node: Node) -> Dims:
    """Two vectors make a table."""
    a, b = (found.of(arg) for arg in tensors(node))
    return (*a, *b)


def distance(found: AxisMap, node: Node) -> Dims:
    """`cdist`: [..., n, k] and [..., m, k] make [..., n, m]."""
    a, b = (found.of(arg) for arg in tensors(node)[:2])
    unify(a[-1], b[-1])
    outer = (a[:-2], b[:-2])
    return (*align(outer, max(map(len, outer))), a[-2], b[-2])


def attention(found: AxisMap, node: Node) -> Dims:
    """`q [..., Lq, D], k [..., Lk, D], v [..., Lk, E]`, mask broadcast to [..., Lq, Lk]."""
    q, k, v, *mask = (found.of(arg) for arg in tensors(node))
    unify(k[-2], v[-2])
    unify(q[-1], k[-1])
    for a, b, c in zip(q[:-2], k[:-2], v[:-2], strict=True):
        for other in (b, c):
            if a and other and same_size(size_of(a), size_of(other)):
                unify(a, other)
    for dims in mask:
        for own, dim in zip(reversed(dims), reversed((*q[:-2], q[-2], k[-2])), strict=False):
            if own and dim:
                unify(dim, own)
    return (*q[:-1], v[-1])


def einsum(found: AxisMap, node: Node) -> Dims:
    """Each letter is one dimension; an ellipsis stands for dimensions that broadcast."""
    operands, output = letters(node)
    known: dict[str, Dim] = {}
    for names, arg in zip(operands, tensors(node), strict=True):
        for name, dim in zip(names, found.of(arg), strict=True):
            if dim and known.get(name):
                unify(known[name], dim)
            known[name] = known.get(name) or dim
    return tuple(known[name] for name in output)


def letters(node: Node) -> tuple[list[list[str]], list[str]]:
    """Name the dimensions of an `einsum`'s operands and of its result.

    Those that an ellipsis stands for are named `.0`, `.1`, counted from the last.
    """
    equation = node.args[0]
    if not isinstance(equation, str):
        raise AxisError("an einsum in the form of lists")
    given, arrow, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    ranks = [len(shape(arg)) - len(term.replace("...", "")) for term, arg in _pairs(terms, node)]
    widths = [rank if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)]
    names = [_named(term, width) for term, width in zip(terms, widths, strict=True)]
    if arrow:
        return names, _named(result, max(widths, default=0))
    once = sorted(letter for letter in set(given) if letter.isalpha() and given.count(letter) == 1)
    return names, [*_named("...", max(widths, default=0)), *once]


def _pairs(terms: list[str], node: Node) -> list[tuple[str, Node]]:
    return list(zip(terms, tensors(node), strict=True))


def _named(term: str, width: int) -> list[str]:
    """Write a term's dimensions one by one."""
    found: list[str] = []
    for part in re.findall(r"\.\.\.|\w", term):
        found += [f".{place}" for place in reversed(range(width))] if part == "..." else [part]
    return found
