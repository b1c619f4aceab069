"""Axis rules of operators that read or write places named by an index."""

import torch
from torch.fx import Node

from effopt.axes import AxisError, AxisMap, Dim, Dims, fresh, same_size, size_of, unify
from effopt.axis_rules import align, argument, first, named_dims, tensors
from effopt.program import is_tensor, shape, value

aten = torch.ops.aten
SAME_ORDER = (
    *(aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.expand.default),
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.clone.default),
    *(aten.contiguous.default, aten.alias.default, aten.squeeze.dim),
)
"""Operators that leave the places 0, 1, 2, ... of an `arange` as they are."""
COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step)


def embedding(found: AxisMap, node: Node) -> Dims:
    """`embedding(table [n, C], ids)`: the dims of the ids and the table's last."""
    table, ids = tensors(node)[:2]
    return (*found.of(ids), found.of(table)[-1])


def gather(found: AxisMap, node: Node) -> Dims:
    """`gather(x, dim, index)`: the index says what the gathered dimension becomes."""
    x, index = first(node), argument(node, "index")
    dims, gone = found.of(index), named_dims(node)
    _same_elsewhere(found.of(x), dims, gone)
    return dims


def scatter(found: AxisMap, node: Node) -> Dims:
    """`scatter(x, dim, index, src)` writes into x: its dims; those of index and src meet them."""
    x, *others = (found.of(arg) for arg in tensors(node))
    for dims in others:
        if dims:
            _same_elsewhere(x, dims, named_dims(node))
    index, *source = others
    for dims in source:
        _same_elsewhere(index, dims, ())
    return x


def _same_elsewhere(x: Dims, index: Dims, apart: tuple[int, ...]) -> None:
    """Make dimensions of one size one, but those along which an index counts."""
    for place, (own, dim) in enumerate(zip(x, index, strict=False)):
        if place not in apart and own and dim and same_size(size_of(own), size_of(dim)):
            unify(dim, own)


def index_select(found: AxisMap, node: Node) -> Dims:
    """`index_select(x, dim, index)`: the dimension becomes that of the index."""
    (place,) = named_dims(node)
    (picked,) = found.of(argument(node, "index")) or ((),)
    return tuple(picked if n == place else dim for n, dim in enumerate(found.of(first(node))))


def index_copy(found: AxisMap, node: Node) -> Dims:
    """`index_add`, `index_copy`: x at the places of an index; the source counts as the index."""
    (place,) = named_dims(node)
    dims, (picked,) = found.of(first(node)), found.of(argument(node, "index")) or ((),)
    for spot, dim in enumerate(found.of(argument(node, "source"))):
        own = picked if spot == place else dims[spot]
        if own and dim:
            unify(own, dim)
    return dims


def index(found: AxisMap, node: Node) -> Dims:
    """`x[i, :, j]`: the indices' dims, broadcast, stand for those that they count over.

    They stand at the place of the first if all are neighbours, else in front. An index that
    counts 0, 1, 2, ... to the end is the dimension itself.
    """
    dims, given = found.of(first(node)), indices(node)
    if any(value(arg).dtype in (torch.bool, torch.uint8) for arg in given.values()):
        raise AxisError("a boolean index takes as many places as the data says")
    for place, arg in given.items():
        if (counted := _count(node, place, arg)) is not None:
            _meet(found.of(counted)[0], dims[place])
    picked = align([found.of(arg) for arg in given.values()], index_rank(given))
    rest = [dim for place, dim in enumerate(dims) if place not in given]
    front = index_place(given)
    return (*rest[:front], *picked, *rest[front:])


def index_put(found: AxisMap, node: Node) -> Dims:
    """Write values at indexed places of x: its dims; a mask's are those that it lies over."""
    dims, given = found.of(first(node)), indices(node)
    masks = [arg for arg in given.values() if value(arg).dtype in (torch.bool, torch.uint8)]
    for place, arg in given.items():
        for own, dim in zip(found.of(arg), dims[place:], strict=False):
            if arg in masks:
                _meet(own, dim)
    if not masks:
        values = argument(node, "values")
        picked = align([found.of(arg) for arg in given.values()], index_rank(given))
        rest = [dim for place, dim in enumerate(dims) if place not in given]
        front = index_place(given)
        taken = (*rest[:front], *picked, *rest[front:])
        align([taken, found.of(values)], max(len(taken), len(shape(values))))
    return dims


def indices(node: Node) -> dict[int, Node]:
    """Return the index tensors of `index` or `index_put` by the dimension they count over."""
    listed = argument(node, "indices")
    return {place: arg for place, arg in enumerate(listed) if is_tensor(arg)}


def index_rank(given: dict[int, Node]) -> int:
    """Return how many dimensions the indices have together."""
    return max((len(shape(arg)) for arg in given.values()), default=0)


def index_place(given: dict[int, Node]) -> int:
    """Return before how many of the dimensions that stay the indices' dimensions stand."""
    places = sorted(given)
    neighbours = bool(places) and places[-1] - places[0] == len(places) - 1
    return places[0] if neighbours else 0


def picked(node: Node) -> tuple[int, ...]:
    """Return the dimensions over which an index counts otherwise than 0, 1, 2, ... to the end."""
    return tuple(p for p, arg in indices(node).items() if _count(node, p, arg) is None)


def _count(node: Node, place: int, index: Node) -> Node | None:
    """Return the `arange` over the whole dimension that an index is, up to views; else None."""
    while index.target in SAME_ORDER and isinstance(index.args[0], Node):
        index = index.args[0]
    if index.target not in COUNTS or argument(index, "start") not in (None, 0):
        return None
    by_one = argument(index, "step") in (None, 1)
    return index if by_one and same_size(shape(index)[0], shape(first(node))[place]) else None


def _meet(own: Dim, dim: Dim) -> None:
    if own and dim:
        unify(dim, own)


def masked_scatter(found: AxisMap, node: Node) -> Dims:
    """x where a mask is false, and the next of the source where it is true: the dims of x."""
    x, mask = (found.of(arg) for arg in tensors(node)[:2])
    return align([x, mask], len(shape(node)))


def one_hot(found: AxisMap, node: Node) -> Dims:
    """A new last dimension counts the classes."""
    return (*found.of(first(node)), *_last(node))


def _last(node: Node) -> Dims:
    place = len(shape(node)) - 1
    return (fresh(f"{node.name}.{place}", shape(node)[place]),)


def buckets(found: AxisMap, node: Node) -> Dims:
    """Each value by itself is looked up in a list: the dims of the values."""
    return found.of(looked_up(node))


def looked_up(node: Node) -> Node:
    """Return the values that `bucketize`, `searchsorted` or `isin` look up."""
    given = argument(node, "elements") or argument(node, "self")
    assert isinstance(given, Node)
    return given
