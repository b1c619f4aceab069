"""One form for taking parts of a tensor: slices and selects in place of splits and gathers.

Pooling follows: one token is a `select`, an average a `mean.dim`, whatever dimension of size 1
they were kept in.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.fx import Node

from effopt.axes import same_size, same_sizes
from effopt.axis_rules import argument, dim_arg, dims_arg, first
from effopt.edit import Edit
from effopt.match import number
from effopt.program import is_tensor, shape, value

aten = torch.ops.aten
END = 2**63 - 1
"""What torch writes for "to the end" of a slice."""


def _piece(edit: Edit, node: Node) -> Node | None:
    """Read one result of a split as a slice, one of an unbind as a select."""
    many, place = node.args
    if not isinstance(many, Node) or not isinstance(place, int) or place < 0:
        return None
    if many.target is aten.unbind.int:
        return _select(edit, first(many), dim_arg(many, 1), place)
    if many.target not in SPLITS:
        return None
    x, dim = first(many), dim_arg(many, 2)
    sizes = [piece.shape[dim] for piece in value(many)]
    if not all(isinstance(size, int) for size in (*sizes, shape(x)[dim])):
        return None
    stop = list(accumulate(sizes))[place]
    last = place == len(sizes) - 1
    return _slice(edit, x, dim, stop - sizes[place], END if last else stop)


def _narrow(edit: Edit, node: Node) -> Node | None:
    x, start, length = first(node), node.args[2], node.args[3]
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    stop = start + length
    ends = start < 0 and stop == 0
    return _slice(edit, x, dim_arg(node, 1), start, END if ends else stop)


def _pooled(edit: Edit, node: Node) -> Node | None:
    """Read an adaptive average pooling to one place as a mean."""
    sizes, rank = argument(node, "output_size"), len(shape(node))
    if any(size != 1 for size in sizes):
        return None
    return mean(edit, first(node), [*range(rank - len(sizes), rank)], keep=True)


def _dropped(edit: Edit, node: Node) -> Node | None:
    """Read a part of size 1, of which the dimension is then dropped, as a select or a mean."""
    inner = node.args[0]
    if not isinstance(inner, Node) or inner.target not in KEPT or not is_tensor(node):
        return None
    dims = KEPT[inner.target][0](inner)
    if dims is None or not _drops(node, inner, dims):
        return None
    return KEPT[inner.target][1](edit, inner)


def _drops(node: Node, inner: Node, dims: tuple[int, ...]) -> bool:
    """Tell whether a node drops these dimensions of size 1 of `inner`, and does nothing else."""
    if node.target is aten.select.int:
        return dims == (dim_arg(node, 1),) and argument(node, "index") in (0, -1)
    sizes = shape(inner)
    left = [size for place, size in enumerate(sizes) if place not in dims]
    ones = all(same_size(sizes[place], 1) for place in dims)
    return ones and same_sizes(left, shape(node))


def _sliced(node: Node) -> tuple[int, ...] | None:
    """Return the dimension of a slice that starts at a place that exists, never clamped."""
    start, size = _start(node), shape(first(node))[dim_arg(node, 1)]
    if argument(node, "step") != 1 or not isinstance(start, int):
        return None
    exists = start >= -1 or (isinstance(size, int) and start >= -size)
    return (dim_arg(node, 1),) if exists else None


def _start(node: Node) -> Any:
    start = argument(node, "start")
    return 0 if start is None else start


def _indexed(node: Node) -> tuple[int, ...] | None:
    """Return the dimension that an index of one constant place, [place], is of."""
    places = [n for n, index in enumerate(_indices(node)) if index is not None]
    if len(places) != 1:
        return None
    index = _indices(node)[places[0]]
    whole = is_tensor(index) and shape(index) == (1,) and not _is_mask(index)
    return (places[0],) if whole and number(index) is not None else None


def _indices(node: Node) -> list[Any]:
    """Return the index of each dimension, None for all of it."""
    if node.target is aten.index.Tensor:
        return list(node.args[1])  # type: ignore[arg-type]
    return [None] * dim_arg(node, 1) + [node.args[2]]


def _is_mask(index: Node) -> bool:
    return value(index).dtype in (torch.bool, torch.uint8)


def _meant(node: Node) -> tuple[int, ...] | None:
    plain = argument(node, "keepdim") is True and argument(node, "dtype") is None
    return dims_arg(node, 1) if plain else None


def _select_start(edit: Edit, inner: Node) -> Node:
    return _select(edit, first(inner), dim_arg(inner, 1), _start(inner))


def _select_index(edit: Edit, inner: Node) -> Node:
    (place,) = _indexed(inner) or ()
    index = number(_indices(inner)[place])
    assert index is not None
    return _select(edit, first(inner), place, int(index))


def _mean_dropped(edit: Edit, inner: Node) -> Node:
    return mean(edit, first(inner), dims_arg(inner, 1), keep=False)


def _unswapped_mean(edit: Edit, node: Node) -> Node | None:
    """mean(x.transpose(1, 2), -1) of a [B, N, C] is mean(x, 1)."""
    x, dims = first(node), dims_arg(node, 1)
    if argument(node, "keepdim") or argument(node, "dtype") or _unswapped(x, dims) is None:
        return None
    return mean(edit, x, dims, keep=False)


def _swapped_back(edit: Edit, node: Node) -> Node | None:
    """mean(x.transpose(1, 2), -1, keepdim).transpose(1, 2) is mean(x, 1, keepdim)."""
    pooled = first(node)
    dims = _meant(pooled) if pooled.target is aten.mean.dim else None
    if dims is None or first(pooled).target is not aten.transpose.int:
        return None
    x = first(pooled)
    swap = [dim_arg(each, place) for each in (node, x) for place in (1, 2)]
    if {*swap[:2]} != {*swap[2:]}:
        return None
    back = {swap[0]: swap[1], swap[1]: swap[0]}
    return mean(edit, first(x), [back.get(place, place) for place in dims], keep=True)


def _unswapped(x: Node, dims: tuple[int, ...]) -> list[int] | None:
    """Return the dimensions of a transposed tensor's source, where the rest stay in order."""
    if x.target is not aten.transpose.int:
        return None
    order = list(range(len(shape(x))))
    a, b = dim_arg(x, 1), dim_arg(x, 2)
    order[a], order[b] = order[b], order[a]
    rest = [place for n, place in enumerate(order) if n not in dims]
    return sorted(order[place] for place in dims) if rest == sorted(rest) else None


def mean(edit: Edit, x: Node, dims: Sequence[int], keep: bool) -> Node:
    """Make a mean over dimensions counted from the front, of what was transposed if `x` was."""
    source = None if keep else _unswapped(x, tuple(dims))
    if source is not None:
        x, dims = first(x), source
    kept = (True,) if keep else ()
    return edit.call(aten.mean.dim, x, list(dims), *kept, name="mean")


def _select(edit: Edit, x: Node, dim: int, place: int) -> Node:
    return edit.call(aten.select.int, x, dim, place, name="select")


def _slice(edit: Edit, x: Node, dim: int, start: int, stop: int) -> Node:
    return edit.call(aten.slice.Tensor, x, dim, start, stop, name="slice")


SPLITS = (
    *(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default),
    *(aten.split.sizes, aten.tensor_split.sections, aten.tensor_split.indices),
)
Dims = Callable[[Node], tuple[int, ...] | None]
KEPT: Mapping[Any, tuple[Dims, Callable[[Edit, Node], Node]]] = {
    aten.slice.Tensor: (_sliced, _select_start),
    aten.index.Tensor: (_indexed, _select_index),
    aten.index_select.default: (_indexed, _select_index),
    aten.mean.dim: (_meant, _mean_dropped),
}
"""What leaves dimensions of size 1: which ones, and what yields the same without them."""

VIEWS: Mapping[Any, Callable[[Edit, Node], Node | None]] = {
    operator.getitem: _piece,
    aten.narrow.default: _narrow,
    aten.mean.dim: _unswapped_mean,
    aten.transpose.int: _swapped_back,
    aten.adaptive_avg_pool1d.default: _pooled,
    aten.adaptive_avg_pool2d.default: _pooled,
    **dict.fromkeys(
        (
            *(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.select.int),
            *(aten.reshape.default, aten.flatten.using_ints),
        ),
        _dropped,
    ),
}
