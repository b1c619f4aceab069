"""Batched products of two tensors of one rank, whatever operator computes them."""

from dataclasses import dataclass

import torch
from torch.fx import Node

from effopt.program import shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Operand:
    """A tensor with its dimensions read in another order."""

    node: Node
    order: tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """A batched product: `left` [..., n, d] times `right` [..., m, d], or [..., d, m] for values.

    `order` says in which order the result's dimensions are those of [..., n, m].
    """

    left: Operand
    right: Operand
    order: tuple[int, ...]
    factor: float = 1.0
    added: tuple[Node, float] | None = None


def product_of(node: Node) -> Product | None:
    """Read a batched product of two tensors of one rank, whatever its operator."""
    if node.target is aten.einsum.default:
        return _einsum(node)
    if node.target not in (aten.matmul.default, aten.bmm.default, aten.baddbmm.default):
        return None
    added, factor = None, 1.0
    left, right = node.args[-2:]
    if node.target is aten.baddbmm.default:
        bias, left, right = node.args[:3]
        assert isinstance(bias, Node)
        beta, alpha = (node.kwargs.get(key, 1) for key in ("beta", "alpha"))
        if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
            return None
        added, factor = (bias, float(beta)) if beta else None, float(alpha)
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    rank = len(shape(left))
    if len(shape(right)) != rank or rank < 2:
        return None
    same = tuple(range(rank))
    turned = (*same[:-2], rank - 1, rank - 2)
    return Product(Operand(left, same), Operand(right, turned), same, factor, added)


def _einsum(node: Node) -> Product | None:
    """Read `b…nd, b…md -> b…nm` in any letters and order as a product."""
    equation, tensors = node.args[:2]
    if not isinstance(equation, str) or not isinstance(tensors, (list, tuple)):
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    letters = [left, right, out]
    if len(tensors) != 2 or not arrow or not all(word.isalpha() for word in letters):
        return None
    if any(len(set(word)) != len(word) for word in letters):
        return None
    shared = [one for one in out if one in left and one in right]
    ours, theirs = ([one for one in out if one not in word] for word in (right, left))
    summed = [one for one in left if one in right and one not in out]
    if not len(ours) == len(theirs) == len(summed) == 1:
        return None
    if len(left) != len(right) or len(left) != len(shared) + 2:
        return None
    first, second = tensors
    assert isinstance(first, Node)
    assert isinstance(second, Node)
    wanted = [*shared, ours[0], theirs[0]]
    return Product(
        Operand(first, tuple(left.index(one) for one in [*shared, ours[0], summed[0]])),
        Operand(second, tuple(right.index(one) for one in [*shared, theirs[0], summed[0]])),
        tuple(wanted.index(one) for one in out),
    )
