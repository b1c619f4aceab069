"""Axis rules of operators that cut a dimension into parts, or join parts to one."""

import re
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.axes import (
    Axis,
    AxisError,
    AxisMap,
    Dim,
    Dims,
    Part,
    Segment,
    divide,
    fresh,
    fresh_dims,
    leaves,
    same_size,
    size_of,
    unify,
)
from effopt.axis_rules import argument, dim_arg, first, int_list, named_dims, tensors
from effopt.program import is_tensor, shape, value


def slice_(found: AxisMap, node: Node) -> Dims:
    """Take a range of a dimension: a new axis that knows which part of the old one it is."""
    dims, place = list(found.of(first(node))), dim_arg(node, 1)
    size = shape(node)[place]
    if same_size(size, shape(first(node))[place]):
        return tuple(dims)
    start, _, step = slice_range(node)
    whole = dims[place]
    parts = (Part(whole, start, start + size),) if step == 1 else ()
    axis = Axis(f"{node.name}.{place}", size, parts=parts)
    dims[place] = () if same_size(size, 1) else (axis,)
    return tuple(dims)


def slice_range(node: Node) -> tuple[Any, Any, Any]:
    """Return start, stop and step of a `slice.Tensor`, counted from the front."""
    size = shape(first(node))[dim_arg(node, 1)]
    given = [*node.args[2:], *([None] * 3)][:3]
    start, stop, step = (value(arg) if isinstance(arg, Node) else arg for arg in given)
    start, step = 0 if start is None else start, 1 if step is None else step
    if isinstance(start, int) and start < 0:
        start = start + size
    new = shape(node)[dim_arg(node, 1)]
    return start, start + new * step if stop is not None else size, step


def slice_edges(node: Node, start: Any, stop: Any) -> tuple[Any, Any]:
    """Return where a slice of the places `start` to `stop` begins and ends, in the same count.

    Reads the arguments alone: the shapes may belong to a graph that is half rewritten.
    """
    given = [value(arg) if isinstance(arg, Node) else arg for arg in node.args[2:4]]
    low, high = [*given, None, None][:2]
    first_ = start if low is None else (stop if isinstance(low, int) and low < 0 else start) + low
    if high is None or (isinstance(high, int) and high >= _TO_THE_END):
        return first_, stop
    last = (stop if isinstance(high, int) and high < 0 else start) + high
    return first_, stop if known_within(stop, last) else last


_TO_THE_END = 2**62
"""A stop from here on is torch's way to say "to the end"."""


def narrow(found: AxisMap, node: Node) -> Dims:
    """`narrow(x, dim, start, length)`: a new axis that knows which part of the old one it is."""
    dims, place, start = list(found.of(first(node))), dim_arg(node, 1), node.args[2]
    start, size = value(start) if isinstance(start, Node) else start, shape(node)[place]
    known = isinstance(start, int) and start >= 0
    parts = (Part(dims[place], start, start + size),) if known else ()
    dims[place] = () if same_size(size, 1) else (Axis(f"{node.name}.{place}", size, parts=parts),)
    return tuple(dims)


def join(found: AxisMap, node: Node) -> Dims:
    """`cat`: the joined dimension is a new axis with segments; the others are one.

    What was cut apart and is joined again in order is what it was before.
    """
    parts, place = [part for part in tensors(node) if not _is_empty(part)], dim_arg_of_list(node)
    if len(parts) < 2:
        return found.of(parts[0]) if parts else fresh_dims(node)
    dims = list(found.of(parts[0]))
    for other in parts[1:]:
        for spot, dim in enumerate(found.of(other)):
            if spot != place and dim and dims[spot]:
                unify(dims[spot], dim)
    whole = rejoined(found, node)
    if whole is not None:
        dims[place] = whole
        return tuple(dims)
    segments, start = list[Segment](), 0
    for part in parts:
        segments += _segments(found, part, place, start)
        start = start + shape(part)[place]
    dims[place] = (Axis(f"{node.name}.{place}", start, tuple(segments)),)
    return tuple(dims)


def rejoined(found: AxisMap, node: Node) -> Dim | None:
    """Return the dimension that the parts of a `cat` are all of, in order; None for others."""
    place, parts = dim_arg_of_list(node), [part for part in tensors(node) if not _is_empty(part)]
    cuts = [_cuts(found, part, place) for part in parts]
    for head in cuts[0]:
        whole, reached = leaves(head.whole), head.stop
        if not same_size(head.start, 0):
            continue
        for own in cuts[1:]:
            nexts = [c for c in own if leaves(c.whole) == whole and same_size(c.start, reached)]
            reached = nexts[0].stop if nexts else -1
        if same_size(reached, size_of(whole)):
            return whole
    return None


def _cuts(found: AxisMap, part: Node, place: int) -> tuple[Part, ...]:
    """Return what a dimension was cut out of; a single place has no axis that would know it."""
    dim = found.of(part)[place]
    if len(dim) == 1:
        return dim[0].parts
    if dim or part.target is not torch.ops.aten.slice.Tensor or dim_arg(part, 1) != place:
        return ()
    start, stop, step = slice_range(part)
    return (Part(found.of(first(part))[place], start, stop),) if step == 1 else ()


def _is_empty(part: Node) -> bool:
    """Tell whether a part of a `cat` is a vector of nothing, as an unfilled cache is."""
    return len(shape(part)) == 1 and same_size(shape(part)[0], 0)


def pad(found: AxisMap, node: Node) -> Dims:
    """A padded dimension is a new axis with segments, a cropped one is a part of the old."""
    dims, sizes, pads = list(found.of(first(node))), shape(first(node)), margins(node)
    for place, (before, after) in pads.items():
        size = before + sizes[place] + after
        axis = Axis(f"{node.name}.{place}", size)
        if all(known_within(edge, 0) for edge in (before, after)):
            axis.parts = (Part(dims[place], 0 - before, sizes[place] + after),)
        elif fills(node) and all(known_within(0, edge) for edge in (before, after)):
            inner = _segments(found, first(node), place, before)
            rims = (Segment(0, before, True), Segment(before + sizes[place], size, True))
            edges = zip(rims, (before, after), strict=True)
            head, tail = ([rim] if not same_size(edge, 0) else [] for rim, edge in edges)
            axis.segments = (*head, *inner, *tail)
        dims[place] = () if same_size(size, 1) else (axis,)
    return tuple(dims)


def margins(node: Node) -> dict[int, tuple[Any, Any]]:
    """Return by how much `pad` widens dimensions at both ends; those it leaves are not listed."""
    given, rank = int_list(argument(node, "pad")), len(shape(node))
    pairs = zip(given[::2], given[1::2], strict=True)
    named = {rank - 1 - place: pair for place, pair in enumerate(pairs)}
    return {place: pair for place, pair in named.items() if not all(same_size(p, 0) for p in pair)}


def fills(node: Node) -> bool:
    """Tell whether `pad` fills with a constant: the other modes repeat what is there."""
    mode = argument(node, "mode")
    return mode in (None, "constant") and not MODES.search(str(node.target))


MODES = re.compile("reflect|replicat|circular")
"""Paddings that repeat what is there, by the names of their operators."""


def _segments(found: AxisMap, part: Node, place: int, start: Any) -> list[Segment]:
    """Return the segments of one joined part; what was joined or cut before keeps its own."""
    dim, size = found.of(part)[place], shape(part)[place]
    if len(dim) == 1 and dim[0].segments:
        return [Segment(start + s.start, start + s.stop, s.learned) for s in dim[0].segments]
    for cut in _cuts(found, part, place):
        whole = leaves(cut.whole)
        inside = whole[0].segments if len(whole) == 1 else ()
        for segment in inside:
            if known_within(segment.start, cut.start) and known_within(cut.stop, segment.stop):
                return [Segment(start, start + size, segment.learned)]
    return [Segment(start, start + size, learned=not depends_on_input(part))]


def known_within(low: Any, high: Any) -> bool:
    """Tell whether low <= high for every input, without adding a guard."""
    if isinstance(low, int) and isinstance(high, int):
        return low <= high
    return bool(statically_known_true(low <= high))


def dim_arg_of_list(node: Node) -> int:
    """Return the dimension along which `cat` or `stack` joins."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % len(shape(node))


def depends_on_input(node: Node) -> bool:
    """Tell whether a value holds data of the sample; a batch size is none."""
    seen, todo = set[Node](), [node]
    while todo:
        current = todo.pop()
        if current in seen or not is_tensor(current):
            continue
        seen.add(current)
        if current.op == "placeholder":
            return True
        todo += current.all_input_nodes
    return False


def unbind(found: AxisMap, node: Node) -> Any:
    """Several tensors, each without the dimension."""
    gone = dim_arg(node, 1)
    left = tuple(dim for place, dim in enumerate(found.of(first(node))) if place != gone)
    return tuple(left for _ in value(node))


def pieces(found: AxisMap, node: Node) -> Any:
    """`split` and `chunk`: each piece is a part of the dimension."""
    dims, place = found.of(first(node)), dim_arg(node, 2)
    results, start = list[Dims](), 0
    for count, piece in enumerate(value(node)):
        size = piece.shape[place]
        part = Part(dims[place], start, start + size)
        axis = Axis(f"{node.name}.{count}", size, parts=(part,))
        own = () if same_size(size, 1) else (axis,)
        results.append((*dims[:place], own, *dims[place + 1 :]))
        start = start + size
    return tuple(results)


def stack(found: AxisMap, node: Node) -> Dims:
    """Several tensors of one shape along a new dimension."""
    place = dim_arg_of_list(node)
    parts = tensors(node)
    for other in parts[1:]:
        for a, b in zip(found.of(parts[0]), found.of(other), strict=True):
            unify(a, b)
    dims = list(found.of(parts[0]))
    dims.insert(place, fresh(f"{node.name}.{place}", len(parts)))
    return tuple(dims)


def write(found: AxisMap, node: Node) -> Dims:
    """`slice_scatter`, `select_scatter`: x with some places overwritten; the others are one."""
    dims, (place,) = found.of(first(node)), named_dims(node)
    source = found.of(argument(node, "src"))
    if len(source) < len(dims):
        source = (*source[:place], (), *source[place:])
    for spot, (own, dim) in enumerate(zip(dims, source, strict=True)):
        if spot != place and own and dim:
            unify(own, dim)
    return dims


def windows(found: AxisMap, node: Node) -> Dims:
    """`unfold(x, dim, size, step)`: the windows are new, and so are the places in each."""
    place = dim_arg(node, 1)
    dims, new = list(found.of(first(node))), fresh_dims(node)
    dims[place] = new[place]
    return (*dims, new[-1])


def patches(found: AxisMap, node: Node) -> Dims:
    """`im2col`: channels times the places in a patch, and the patches, which are new."""
    x, sizes = found.of(first(node)), shape(node)
    if len(x) != 4:
        raise AxisError("im2col of a single sample")
    inside = divide(sizes[1], shape(first(node))[1])
    return (x[0], (*x[1], *fresh(f"{node.name}.inside", inside)), fresh_dims(node)[2])
