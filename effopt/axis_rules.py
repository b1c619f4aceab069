"""Axis rules: how the axes of an operator's arguments become those of its result, by family."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from effopt.axes import (
    AxisError,
    AxisMap,
    Dim,
    Dims,
    fresh,
    fresh_dims,
    regroup,
    same_size,
    unify,
)
from effopt.program import is_tensor, shape, value

aten = torch.ops.aten
Rule = Callable[[AxisMap, Node], Any]


def tensors(node: Node) -> list[Node]:
    """Return the arguments that are tensors, in order, those inside lists as well."""
    flat = pytree.tree_leaves((node.args, node.kwargs))
    return [arg for arg in flat if is_tensor(arg)]


def first(node: Node) -> Node:
    """Return the first argument, a tensor in nearly every operator."""
    arg = node.args[0]
    assert isinstance(arg, Node)
    return arg


def dim_arg(node: Node, place: int, default: int = 0) -> int:
    """Return the dimension that an operator's argument names, counted from the front."""
    dim = node.args[place] if len(node.args) > place else default
    assert isinstance(dim, int)
    return dim % max(len(shape(first(node))), 1)


def dims_arg(node: Node, place: int) -> tuple[int, ...]:
    """Return the dimensions that a list argument names; none named means all of them."""
    rank = len(shape(first(node)))
    given = node.args[place] if len(node.args) > place else None
    if given is None or given == []:
        return tuple(range(rank))
    listed = given if isinstance(given, (list, tuple)) else (given,)
    return tuple(dim % rank for dim in listed if isinstance(dim, int))


def keep(found: AxisMap, node: Node) -> Dims:
    """Identity on dims: normalisations over what they like, casts, cumulative sums."""
    return found.of(first(node))


def pointwise(found: AxisMap, node: Node) -> Dims:
    """Align right as broadcasting does; dimensions that are not of size 1 are one."""
    sizes = shape(node)
    result: list[Dim] = [() for _ in sizes]
    for arg in tensors(node):
        dims = found.of(arg)
        for place, dim in enumerate(dims, start=len(sizes) - len(dims)):
            if not dim:
                continue
            if result[place]:
                unify(result[place], dim)
            result[place] = dim
    return tuple(
        dim or fresh(f"{node.name}.{place}", size)
        for place, (dim, size) in enumerate(zip(result, sizes, strict=True))
    )


def norm(found: AxisMap, node: Node) -> Dims:
    """Normalisation with weights over the last dimensions: those are the input's."""
    dims = found.of(first(node))
    for weight in tensors(node)[1:]:
        for own, dim in zip(reversed(found.of(weight)), reversed(dims), strict=False):
            unify(dim, own)
    return dims


def linear(found: AxisMap, node: Node) -> Dims:
    """`x [..., in] @ weight [out, in]^T + bias [out]`."""
    x, weight, *bias = tensors(node)
    (*outer, inner), (out, into) = found.of(x), found.of(weight)
    unify(inner, into)
    for term in bias:
        unify(out, found.of(term)[0])
    return (*outer, out)


def matmul(found: AxisMap, node: Node) -> Dims:
    """Batched product of the last two tensor arguments: [..., n, k] @ [..., k, m]."""
    *_, left, right = tensors(node)
    a, b = found.of(left), found.of(right)
    if len(a) < 2 or len(b) < 2:
        raise AxisError("a product with a vector")
    unify(a[-1], b[-2])
    head = _broadcast(node, a[:-2], b[:-2])
    return (*head, a[-2], b[-1])


def _broadcast(node: Node, left: Dims, right: Dims) -> Dims:
    """Align the outer dimensions of two operands right and make them one."""
    rank = max(len(left), len(right))
    padded = [(() for _ in range(rank - len(dims))) for dims in (left, right)]
    pairs = zip((*padded[0], *left), (*padded[1], *right), strict=True)
    result = []
    for a, b in pairs:
        if a and b:
            unify(a, b)
        result.append(a or b)
    return tuple(result)


def attention(found: AxisMap, node: Node) -> Dims:
    """`q [..., Lq, D], k [..., Lk, D], v [..., Lk, E]`, mask broadcast to [..., Lq, Lk]."""
    q, k, v, *mask = (found.of(arg) for arg in tensors(node))
    unify(k[-2], v[-2])
    unify(q[-1], k[-1])
    for a, b, c in zip(q[:-2], k[:-2], v[:-2], strict=True):
        for other in (b, c):
            if a and other and same_size(_size(a), _size(other)):
                unify(a, other)
    for dims in mask:
        for own, dim in zip(reversed(dims), reversed((*q[:-2], q[-2], k[-2])), strict=False):
            if own and dim:
                unify(dim, own)
    return (*q[:-1], v[-1])


def _size(dim: Dim) -> Any:
    total: Any = 1
    for axis in dim:
        total = total * axis.size
    return total


def view(found: AxisMap, node: Node) -> Dims:
    """Any regrouping of factors: reshape, flatten, unflatten, squeeze, unsqueeze."""
    return regroup(found.of(first(node)), shape(node), node.name)


def permute(found: AxisMap, node: Node) -> Dims:
    """`permute` with its whole order."""
    dims = found.of(first(node))
    return tuple(dims[place] for place in dims_arg(node, 1))


def transpose(found: AxisMap, node: Node) -> Dims:
    """Swap two dimensions."""
    dims = list(found.of(first(node)))
    a, b = (dim_arg(node, 1), dim_arg(node, 2)) if len(node.args) > 1 else (0, 1)
    dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


def expand(found: AxisMap, node: Node) -> Dims:
    """Repeat dimensions of size 1: what is new has an identity of its own until it meets one."""
    dims, sizes = found.of(first(node)), shape(node)
    padded = (*(() for _ in range(len(sizes) - len(dims))), *dims)
    return tuple(
        dim or fresh(f"{node.name}.{place}", size)
        for place, (dim, size) in enumerate(zip(padded, sizes, strict=True))
    )


def reduction(found: AxisMap, node: Node) -> Any:
    """Sums, means, extremes over some dimensions, kept as size 1 or dropped."""
    gone = dims_arg(node, 1)
    dims, results = found.of(first(node)), value(node)
    many = isinstance(results, (tuple, list))
    rank = len((results[0] if many else results).shape)
    kept = len(dims) == rank and bool(gone)
    left = tuple(
        () if place in gone else dim for place, dim in enumerate(dims) if kept or place not in gone
    )
    return tuple(left for _ in results) if many else left


def select(found: AxisMap, node: Node) -> Dims:
    """Take one place of a dimension, which is gone."""
    gone = dim_arg(node, 1)
    return tuple(dim for place, dim in enumerate(found.of(first(node))) if place != gone)


def embedding(found: AxisMap, node: Node) -> Dims:
    """`embedding(table [n, C], ids)`: the dims of the ids and the table's last."""
    table, ids = tensors(node)
    return (*found.of(ids), found.of(table)[-1])


def gather(found: AxisMap, node: Node) -> Dims:
    """`gather(x, dim, index)`: the index says what the gathered dimension becomes."""
    x, index = tensors(node)
    place = dim_arg(node, 1)
    dims = list(found.of(index))
    for spot, dim in enumerate(found.of(x)):
        if spot != place and dim and dims[spot] and same_size(_size(dim), _size(dims[spot])):
            unify(dims[spot], dim)
    return tuple(dims)


def convolution(found: AxisMap, node: Node) -> Dims:
    """Batch stays, channels are the weight's, places in the grid are new."""
    x, weight = tensors(node)[:2]
    dims = found.of(x)
    rest = fresh_dims(node)
    return (dims[0], found.of(weight)[0], *rest[2:])


def channelwise(found: AxisMap, node: Node) -> Dims:
    """Pooling and interpolation over the grid: batch and channels stay, places are new."""
    return (*found.of(first(node))[:2], *fresh_dims(node)[2:])


def create(found: AxisMap, node: Node) -> Dims:
    """A new tensor: its dimensions are unified when they first meet others."""
    return fresh_dims(node)


def getitem(found: AxisMap, node: Node) -> Any:
    """One result of several."""
    many, place = found.dims[first(node)], node.args[1]
    assert isinstance(place, int)
    return many[place]
