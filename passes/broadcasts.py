"""Rules of the normal form about broadcasting: no expansion and no masked write that it can do."""

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from effopt.axes import same_size
from effopt.axis_table import is_pointwise
from effopt.edit import Edit
from effopt.program import is_tensor, shape, value

aten = torch.ops.aten
EXPANSIONS = (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)


def read_unexpanded(edit: Edit, node: Node) -> None:
    """Let element-wise readers of an expanded value broadcast it themselves."""
    inner = node.args[0]
    if node.target not in EXPANSIONS or not isinstance(inner, Node):
        return
    for reader in list(node.users):
        if is_pointwise(reader.target) and _broadcasts_alike(reader, node, inner):
            args, kwargs = map_arg(
                (reader.args, reader.kwargs), lambda arg: inner if arg is node else arg
            )
            edit.update(reader, *args, **kwargs)
    if not node.users:
        edit.erase(node)


def _broadcasts_alike(reader: Node, node: Node, inner: Node) -> bool:
    """Tell whether an element-wise operator yields the same shape from the unexpanded value."""
    args = [inner if arg is node else arg for arg in reader.all_input_nodes]
    shapes = [shape(arg) for arg in args if is_tensor(arg)]
    wanted = shape(reader)
    return all(
        any(len(own) >= back and same_size(own[-back], wanted[-back]) for own in shapes)
        for back in range(1, len(wanted) + 1)
    )


def choose_in_place_of_write(edit: Edit, node: Node) -> Node | None:
    """Read `x[mask] = number`, for a mask over the first dimensions, as a choice by the mask."""
    if node.target is not aten.index_put.default or len(node.args) != 3 or node.kwargs:
        return None
    x, indices, number = node.args
    assert isinstance(indices, (list, tuple))
    masks = [index for index in indices if isinstance(index, Node)]
    if len(masks) != 1 or len(indices) != 1 or value(masks[0]).dtype != torch.bool:
        return None
    if not isinstance(x, Node) or not isinstance(number, Node):
        return None
    if value(number).numel() != 1 or value(number).dtype != value(x).dtype:
        return None
    with edit.before(node):
        mask = masks[0]
        for _ in range(len(shape(x)) - len(shape(mask))):
            mask = edit.call(aten.unsqueeze.default, mask, -1)
        return edit.call(aten.where.self, mask, number, x)
