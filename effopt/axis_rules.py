"""Axis rules: how the axes of an operator's arguments become those of its result, by family.

Here are the reading of arguments, element-wise operators, norms, reductions and convolutions.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils import _pytree as pytree

from effopt.axes import AxisError, AxisMap, Dim, Dims, fresh, fresh_dims, same_size, unify
from effopt.program import is_tensor, shape, value

aten = torch.ops.aten
Rule = Callable[[AxisMap, Node], Any]
Places = Callable[[Node], tuple[int, ...]]
"""Tells along which dimensions of its first argument an operator works."""


# --- arguments --------------------------------------------------------------------------------


def tensors(node: Node) -> list[Node]:
    """Return the arguments that are tensors, in order, those inside lists as well."""
    flat = pytree.tree_leaves((node.args, node.kwargs))
    return [arg for arg in flat if is_tensor(arg)]


def first(node: Node) -> Node:
    """Return the first argument, a tensor in nearly every operator."""
    arg = node.args[0]
    assert isinstance(arg, Node)
    return arg


def argument(node: Node, name: str) -> Any:
    """Return an argument by its name in the operator's schema: given or default; else None."""
    if name in node.kwargs:
        return node.kwargs[name]
    assert isinstance(node.target, OpOverload)
    for place, known in enumerate(node.target._schema.arguments):
        if known.name == name:
            by_place = place < len(node.args) and not known.kwarg_only
            return node.args[place] if by_place else known.default_value
    return None


def dim_arg(node: Node, place: int, default: int = 0) -> int:
    """Return the dimension that an operator's argument names, counted from the front."""
    dim = node.args[place] if len(node.args) > place else default
    assert isinstance(dim, int)
    return dim % max(len(shape(first(node))), 1)


def dims_arg(node: Node, place: int) -> tuple[int, ...]:
    """Return the dimensions that a list argument names; none named means all of them."""
    return _counted(node, node.args[place] if len(node.args) > place else None)


def named_dims(node: Node, name: str = "dim") -> tuple[int, ...]:
    """Return the dimensions that the argument of a name lists; none named means all of them."""
    return _counted(node, argument(node, name))


def _counted(node: Node, given: Any) -> tuple[int, ...]:
    """Count dimensions of the first argument from the front."""
    rank = len(shape(first(node)))
    if given is None or given == []:
        return tuple(range(rank))
    listed = given if isinstance(given, (list, tuple)) else (given,)
    return tuple(dim % max(rank, 1) for dim in listed if isinstance(dim, int))


def int_list(given: Any) -> list[Any]:
    """Return the values of a list of sizes, each an int or the node that computes it."""
    return [value(arg) if isinstance(arg, Node) else arg for arg in given]


def each_result(node: Node, dims: Dims) -> Any:
    """Give the dims to the result, or to every one of several."""
    results = value(node)
    return tuple(dims for _ in results) if isinstance(results, (tuple, list)) else dims


# --- element by element -----------------------------------------------------------------------


def keep(found: AxisMap, node: Node) -> Any:
    """The result has the dims of the first argument."""
    return each_result(node, found.of(first(node)))


def pointwise(found: AxisMap, node: Node) -> Any:
    """Align right as broadcasting does; dimensions that are not of size 1 are one."""
    return each_result(node, broadcast(node, [found.of(arg) for arg in tensors(node)]))


def broadcast(node: Node, operands: Iterable[Dims]) -> Dims:
    """Make dimensions that broadcasting aligns one; what no operand knows is new."""
    results = value(node)
    sizes = tuple((results[0] if isinstance(results, (tuple, list)) else results).shape)
    result = align(operands, len(sizes))
    return tuple(
        dim or fresh(f"{node.name}.{place}", size)
        for place, (dim, size) in enumerate(zip(result, sizes, strict=True))
    )


def align(operands: Iterable[Dims], rank: int) -> Dims:
    """Align dims right in `rank` dimensions and make those that meet one."""
    result: list[Dim] = [() for _ in range(rank)]
    for dims in operands:
        for place, dim in enumerate(dims, start=rank - len(dims)):
            if dim and result[place]:
                unify(result[place], dim)
            result[place] = result[place] or dim
    return tuple(result)


def meshgrid(found: AxisMap, node: Node) -> Any:
    """Every tensor gets the dimensions of all; `xy` swaps the first two."""
    dims = [dim for arg in tensors(node) for dim in (found.of(arg) or ((),))]
    if argument(node, "indexing") == "xy" and len(dims) > 1:
        dims[:2] = dims[1::-1]
    return each_result(node, tuple(dims))


# --- normalisations ---------------------------------------------------------------------------


def norm(found: AxisMap, node: Node) -> Dims:
    """Normalisation with weights over the last dimensions: those are the input's."""
    dims = found.of(first(node))
    for weight in tensors(node)[1:]:
        for own, dim in zip(reversed(found.of(weight)), reversed(dims), strict=False):
            unify(dim, own)
    return dims


def channel_norm(found: AxisMap, node: Node) -> Any:
    """Weights, means and variances count the channels, the second dimension."""
    dims = found.of(first(node))
    for weight in tensors(node)[1:]:
        (own,) = found.of(weight)
        if own and len(dims) > 1:
            unify(dims[1], own)
    return dims


# --- reductions -------------------------------------------------------------------------------


def reduction(found: AxisMap, node: Node) -> Any:
    """Sums, means, extremes over some dimensions, kept as size 1 or dropped."""
    gone = named_dims(node)
    dims, results = found.of(first(node)), value(node)
    rank = len((results[0] if isinstance(results, (tuple, list)) else results).shape)
    kept = len(dims) == rank and bool(gone)
    left = tuple(
        () if place in gone else dim for place, dim in enumerate(dims) if kept or place not in gone
    )
    return each_result(node, left)


def select(found: AxisMap, node: Node) -> Dims:
    """Take one place of a dimension, which is gone."""
    gone = dim_arg(node, 1)
    return tuple(dim for place, dim in enumerate(found.of(first(node))) if place != gone)


# --- grids ------------------------------------------------------------------------------------


def convolution(found: AxisMap, node: Node) -> Dims:
    """Batch stays, channels are the weight's, places in the grid are new if the kernel is wide."""
    x, weight = tensors(node)[:2]
    dims, sizes = found.of(x), shape(weight)
    if len(dims) != len(sizes):
        raise AxisError("a convolution of a single sample")
    grid = dims[2:] if is_pointwise(node) else fresh_dims(node)[2:]
    return (dims[0], found.of(weight)[0], *grid)


def is_pointwise(node: Node) -> bool:
    """Tell whether a convolution is a linear layer at each place: kernel 1, stride 1, no rim."""
    alone = all(same_size(size, 1) for size in shape(tensors(node)[1])[2:])
    rim, stride = argument(node, "padding"), argument(node, "stride")
    return alone and (isinstance(rim, str) or _all_are(0, rim)) and _all_are(1, stride)


def _all_are(number: int, given: Any) -> bool:
    """Tell whether an argument that is one number or a list for each dimension is one number."""
    return all(item == number for item in (given if isinstance(given, (list, tuple)) else (given,)))


def transposed_convolution(found: AxisMap, node: Node) -> Dims:
    """Batch stays, channels are the weight's second, places in the grid are new."""
    x, weight = tensors(node)[:2]
    if len(found.of(x)) != len(shape(weight)):
        raise AxisError("a convolution of a single sample")
    channels = found.of(weight)[1] if argument(node, "groups") == 1 else fresh_dims(node)[1]
    return (found.of(x)[0], channels, *fresh_dims(node)[2:])


def grid_rank(node: Node) -> int:
    """Return over how many of the last dimensions a pooling or an upsampling runs."""
    return next(rank for rank in (1, 2, 3) if f"{rank}d" in str(node.target))


def channelwise(found: AxisMap, node: Node) -> Any:
    """Pooling and interpolation over the grid: batch and channels stay, places are new."""
    dims, rank = found.of(first(node)), grid_rank(node)
    sizes = shape_of_first(node)[-rank:]
    grid = tuple(fresh(f"{node.name}.{place}", size) for place, size in enumerate(sizes))
    return each_result(node, (*dims[:-rank], *grid))


def shape_of_first(node: Node) -> tuple[Any, ...]:
    """Return the shape of a node's value, or of the first of several."""
    results = value(node)
    return tuple((results[0] if isinstance(results, (tuple, list)) else results).shape)


# --- new dimensions ---------------------------------------------------------------------------


def renewed(places: Places) -> Rule:
    """Make the rule of operators after which places along some dimensions are others."""

    def rule(found: AxisMap, node: Node) -> Any:
        moved, dims, sizes = places(node), found.of(first(node)), shape_of_first(node)
        if len(sizes) != len(dims):
            raise AxisError(f"{node.target} over a flattened tensor")
        new = (fresh(f"{node.name}.{place}", size) for place, size in enumerate(sizes))
        pairs = enumerate(zip(dims, new, strict=True))
        return each_result(node, tuple(b if place in moved else a for place, (a, b) in pairs))

    rule.__doc__ = "Places along the named dimensions are others than before: those are new axes."
    return rule


def create(found: AxisMap, node: Node) -> Dims:
    """A new tensor: its dimensions are unified when they first meet others."""
    return fresh_dims(node)


def number(found: AxisMap, node: Node) -> Dims:
    """A number has no dimensions."""
    return ()


def getitem(found: AxisMap, node: Node) -> Any:
    """One result of several."""
    many, place = found.dims[first(node)], node.args[1]
    assert isinstance(place, int)
    return many[place]
