"""write-back: what a view is a view of, the view taken again, and a new view put back."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from effopt.axes import same_sizes
from effopt.edit import Edit
from effopt.errors import CaptureError
from effopt.program import is_tensor, shape, value, where

aten = torch.ops.aten


def viewed(node: Node) -> Node | None:
    """Return the argument that a node could be a view of: its first, of a list's maker too."""
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(source, Node):
        source = source.args[0] if source.args else None
    return source if isinstance(source, Node) and is_tensor(source) else None


def take_again(edit: Edit, view: Node, source: Node) -> Node:
    """Make the same view of another value."""
    if view.target is operator.getitem:
        maker, place = view.args
        assert isinstance(maker, Node)
        assert isinstance(place, int)
        return edit.item(_copy(edit, maker, source), place)
    return _copy(edit, view, source)


def _copy(edit: Edit, node: Node, source: Node) -> Node:
    assert callable(node.target)
    kwargs: dict[str, Any] = dict(node.kwargs)
    made = edit.call(node.target, source, *node.args[1:], **kwargs)
    _note_origin(made, node)
    return made


def _note_origin(made: Node, view: Node) -> None:
    for key in ("nn_module_stack", "stack_trace"):
        if key in view.meta:
            made.meta.setdefault(key, view.meta[key])


def put_back(edit: Edit, view: Node, outer: Node, inner: Node) -> Node:
    """Return `outer` with `inner` in the place that `view` has in it."""
    maker = view.args[0] if view.target is operator.getitem else view
    assert isinstance(maker, Node)
    rule = RULES.get(maker.target)
    made = rule(edit, view, outer, inner) if rule else None
    if made is None:
        raise CaptureError(
            f"{where(view)} is written through, which has no functional form",
            "write into the tensor itself, or join its parts with torch.cat",
        )
    _note_origin(made, view)
    return made


def _select(edit: Edit, view: Node, outer: Node, inner: Node) -> Node:
    return edit.call(aten.select_scatter.default, outer, inner, *view.args[1:])


def _slice(edit: Edit, view: Node, outer: Node, inner: Node) -> Node:
    """Put back a slice; one of the whole is the whole (`x[:, 0]` slices the rows first)."""
    step = view.args[4] if len(view.args) > 4 else 1
    if step == 1 and _as_it_is(edit, view, outer, inner):
        return inner
    return edit.call(aten.slice_scatter.default, outer, inner, *view.args[1:])


def _narrow(edit: Edit, view: Node, outer: Node, inner: Node) -> Node | None:
    dim, start, length = view.args[1:]
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    return _piece(edit, outer, inner, dim, start, length)


def _diagonal(edit: Edit, view: Node, outer: Node, inner: Node) -> Node:
    return edit.call(aten.diagonal_scatter.default, outer, inner, *view.args[1:])


def _exchange(edit: Edit, view: Node, outer: Node, inner: Node) -> Node:
    """Exchanging two dimensions twice is nothing."""
    assert callable(view.target)
    return edit.call(view.target, inner, *view.args[1:])


def _permute(edit: Edit, view: Node, outer: Node, inner: Node) -> Node:
    order: Any = view.args[1]
    places = [place % len(order) for place in order]
    return edit.call(aten.permute.default, inner, [places.index(i) for i in range(len(places))])


def _move(edit: Edit, view: Node, outer: Node, inner: Node) -> Node:
    assert callable(view.target)
    source, destination = view.args[1:]
    return edit.call(view.target, inner, destination, source)


def _reshape(edit: Edit, view: Node, outer: Node, inner: Node) -> Node | None:
    """Cut the elements, which keep their order, into the dimensions that they had."""
    sizes = [size if isinstance(size, int) else -1 for size in shape(outer)]
    if sizes.count(-1) > 1:
        return None
    return edit.call(aten.reshape.default, inner, sizes)


def _as_it_is(edit: Edit, view: Node, outer: Node, inner: Node) -> Node | None:
    return inner if same_sizes(shape(outer), shape(inner)) else None


def _part(edit: Edit, view: Node, outer: Node, inner: Node) -> Node | None:
    """Put back one part of a split: the parts before it say where it begins."""
    maker, place = view.args
    assert isinstance(maker, Node)
    assert isinstance(place, int)
    dim: Any = maker.args[2] if len(maker.args) > 2 else maker.kwargs.get("dim", 0)
    sizes = [part.shape[dim] for part in value(maker)]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return _piece(edit, outer, inner, dim, sum(sizes[:place]), sizes[place])


def _piece(edit: Edit, outer: Node, inner: Node, dim: Any, start: int, length: int) -> Node:
    return edit.call(aten.slice_scatter.default, outer, inner, dim, start, start + length)


def _unbound(edit: Edit, view: Node, outer: Node, inner: Node) -> Node:
    maker, place = view.args
    assert isinstance(maker, Node)
    dim = maker.args[1] if len(maker.args) > 1 else 0
    return edit.call(aten.select_scatter.default, outer, inner, dim, place)


Rule = Callable[[Edit, Node, Node, Node], Node | None]
FAMILIES: tuple[tuple[Rule, tuple[OpOverload, ...]], ...] = (
    (_select, (aten.select.int,)),
    (_slice, (aten.slice.Tensor,)),
    (_narrow, (aten.narrow.default,)),
    (_diagonal, (aten.diagonal.default,)),
    (
        _exchange,
        (
            *(aten.transpose.int, aten.t.default, aten.numpy_T.default),
            *(aten.swapaxes.default, aten.swapdims.default),
        ),
    ),
    (_permute, (aten.permute.default,)),
    (_move, (aten.movedim.int, aten.movedim.intlist)),
    (
        _reshape,
        (
            *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
            *(aten.flatten.using_ints, aten.unflatten.int, aten.ravel.default),
            *(aten.view_as.default, aten.reshape_as.default, aten.unsqueeze.default),
            *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
            *(aten.atleast_1d.default, aten.atleast_2d.default, aten.atleast_3d.default),
        ),
    ),
    (
        _as_it_is,
        (
            *(aten.alias.default, aten.detach.default, aten.contiguous.default),
            *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other),
            *(aten.type_as.default, aten.lift_fresh.default, aten.expand.default),
            *(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default),
            *(aten.expand_as.default, aten.broadcast_to.default, aten.detach_.default),
        ),
    ),
    (
        _part,
        (
            *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default),
            *(aten.tensor_split.sections, aten.tensor_split.indices, aten.split.sizes),
        ),
    ),
    (_unbound, (aten.unbind.int,)),
)
RULES: dict[Any, Rule] = {target: rule for rule, targets in FAMILIES for target in targets}
"""How a value takes back what was written through a view of it; None where it cannot."""
