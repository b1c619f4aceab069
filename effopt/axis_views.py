"""Axis rules of views and copies: factors regrouped, moved, or repeated; none is invented."""

from collections.abc import Sequence

import torch
from torch.fx import Node

from effopt.axes import (
    Axis,
    AxisError,
    AxisMap,
    Dim,
    Dims,
    Size,
    divide,
    fresh,
    leaves,
    same_size,
    show,
    size_of,
    split,
    unify,
)
from effopt.axis_rules import argument, dim_arg, first, int_list, named_dims, tensors
from effopt.program import shape, value

aten = torch.ops.aten


def regroup(dims: Dims, sizes: Sequence[Size], name: str) -> Dims:
    """Cut the factors of a tensor anew into dimensions of the given sizes (a view)."""
    rest = [axis for dim in dims for axis in leaves(dim)]
    result: list[Dim] = []
    for place, size in enumerate(sizes):
        taken: list[Axis] = []
        while not same_size(size_of(taken), size):
            if not rest:
                raise AxisError(f"{name}: its dimension {place} of {size} has no factors left")
            taken.append(_take(rest, taken, size, name))
        result.append(tuple(taken))
    if rest:
        raise AxisError(f"{name}: {show(tuple(rest))} is left over")
    return tuple(result)


def _take(rest: list[Axis], taken: list[Axis], size: Size, name: str) -> Axis:
    """Take the next factor, or the outer part of it that the dimension still needs."""
    axis = rest.pop(0)
    need = divide(size, size_of(taken))
    if need is None or divide(need, axis.size) is not None:
        return axis
    if divide(axis.size, need) is not None:
        outer, inner = split(axis, need)
        rest.insert(0, inner)
        return outer
    if isinstance(need, int) and isinstance(axis.size, int):
        raise AxisError(f"{name}: {axis} of {axis.size} is cut in the middle")
    return axis  # sizes that no formula relates: the product tells in the end


def view(found: AxisMap, node: Node) -> Dims:
    """Regroup the factors: they are read as one list and cut into the result's dimensions."""
    return regroup(found.of(first(node)), shape(node), node.name)


def view_like(found: AxisMap, node: Node) -> Dims:
    """Regroup the factors as another tensor's, which is one with the result."""
    like = argument(node, "other")
    assert isinstance(like, Node)
    dims = view(found, node)
    for own, other in zip(dims, found.of(like), strict=True):
        unify(own, other)
    return dims


def permute(found: AxisMap, node: Node) -> Dims:
    """Dimensions in another order, the whole of which is named."""
    dims = found.of(first(node))
    return tuple(dims[place] for place in named_dims(node, "dims"))


def transpose(found: AxisMap, node: Node) -> Dims:
    """Swap two dimensions, or the first two (`t`)."""
    dims = list(found.of(first(node)))
    a, b = (dim_arg(node, 1), dim_arg(node, 2)) if len(node.args) > 1 else (0, 1)
    if len(dims) > 1:
        dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


def reverse(found: AxisMap, node: Node) -> Dims:
    """`x.T` turns all dimensions around, `x.mT` the last two."""
    dims = found.of(first(node))
    if node.target is aten.numpy_T.default:
        return dims[::-1]
    return (*dims[:-2], dims[-1], dims[-2])


def movedim(found: AxisMap, node: Node) -> Dims:
    """Dimensions go to places that are named; the others keep their order."""
    dims = found.of(first(node))
    sources, targets = named_dims(node, "source"), named_dims(node, "destination")
    rest = [dim for place, dim in enumerate(dims) if place not in sources]
    for target, source in sorted(zip(targets, sources, strict=True)):
        rest.insert(target, dims[source])
    return tuple(rest)


def expand(found: AxisMap, node: Node) -> Dims:
    """Repeat dimensions of size 1: what is new has an identity of its own until it meets one."""
    dims, sizes = found.of(first(node)), shape(node)
    padded = (*(() for _ in range(len(sizes) - len(dims))), *dims)
    return tuple(
        dim or fresh(f"{node.name}.{place}", size)
        for place, (dim, size) in enumerate(zip(padded, sizes, strict=True))
    )


def expand_as(found: AxisMap, node: Node) -> Dims:
    """Repeat dimensions of size 1 as another tensor has them: those are its own."""
    x, other = tensors(node)
    dims = found.of(x)
    padded = (*(() for _ in range(len(shape(node)) - len(dims))), *dims)
    result = []
    for own, dim in zip(padded, found.of(other), strict=True):
        if own and dim:
            unify(dim, own)
        result.append(own or dim)
    return tuple(result)


def repeat(found: AxisMap, node: Node) -> Dims:
    """`repeat`, `tile`: place r * n + i of the result is copy r of place i, a product (r, n)."""
    dims = found.of(first(node))
    counts = repeats(node)
    padded = (*(() for _ in range(len(counts) - len(dims))), *dims)
    return tuple(
        (*fresh(f"{node.name}.{place}", count), *dim)
        for place, (count, dim) in enumerate(zip(counts, padded, strict=True))
    )


def repeats(node: Node) -> tuple[Size, ...]:
    """Return how often `repeat` or `tile` repeats each dimension of its result."""
    given = argument(node, "repeats")
    if given is None:
        given = argument(node, "dims")
    counts = int_list(given)
    return (*(1 for _ in range(len(shape(node)) - len(counts))), *counts)


def repeat_interleave(found: AxisMap, node: Node) -> Dims:
    """Place i * r + j of the result is copy j of place i: a product (n, r)."""
    count, place = int_list([argument(node, "repeats")])[0], argument(node, "dim")
    copies = fresh(f"{node.name}.copies", count)
    if place is None:
        return (tuple(axis for dim in found.of(first(node)) for axis in dim) + copies,)
    (place,) = named_dims(node)
    return tuple(
        (*dim, *copies) if spot == place else dim for spot, dim in enumerate(found.of(first(node)))
    )


def shuffle(found: AxisMap, node: Node) -> Dims:
    """`pixel_shuffle`: channels (C, r, r) become rows (H, r) and columns (W, r); or back."""
    dims, r = found.of(first(node)), node.args[1]
    assert isinstance(r, int)
    *_, channels, rows, columns = shape(first(node))
    outer = dims[:-3]
    if node.target is aten.pixel_shuffle.default:
        c, down, right, h, w = regroup(
            dims[-3:], (divide(channels, r * r), r, r, rows, columns), node.name
        )
        return (*outer, c, (*h, *down), (*w, *right))
    c, h, down, w, right = regroup(
        dims[-3:], (channels, divide(rows, r), r, divide(columns, r), r), node.name
    )
    return (*outer, (*c, *down, *right), h, w)


def complex_parts(found: AxisMap, node: Node) -> Dims:
    """Complex numbers as pairs: a last dimension of two is new, or gone."""
    dims = found.of(first(node))
    if value(node).is_complex():
        return dims[:-1]
    return (*dims, fresh(f"{node.name}.pair", 2))
