"""Rows of a batch: whether a program computes each by itself."""

from torch.fx import Node

from effopt.axes import Axis, AxisMap, Dim, find_axes
from effopt.axis_table import family
from effopt.effects import acts_along
from effopt.program import Program, is_tensor


def mixes_rows(program: Program, batch: Dim) -> Node | None:
    """Return the first node at which rows of the batch see each other, None where none do.

    There an operator works along the batch, as a sum or a softmax does, or the result has rows no
    more, or twice. `batch` is the dimension that counts them.
    """
    axes, rows = program.get(find_axes), set(batch)
    for node in program.nodes():
        if node.op != "call_function" or family(node) in ("create", "size"):
            continue
        if not any(_places(axes, arg, rows) for arg in node.all_input_nodes):
            continue
        if _along(axes, node, rows) or (is_tensor(node) and len(_places(axes, node, rows)) != 1):
            return node
    return None


def _places(axes: AxisMap, node: Node, rows: set[Axis]) -> list[int]:
    """Return the dimensions of a value that count rows."""
    dims = axes.of(node) if is_tensor(node) else ()
    return [place for place, dim in enumerate(dims) if set(dim) & rows]


def _along(axes: AxisMap, node: Node, rows: set[Axis]) -> bool:
    """Tell whether an operator works along a dimension of rows."""
    source = node.args[0] if node.args else None
    if not is_tensor(source):
        return False
    return bool(set(_places(axes, source, rows)) & set(acts_along(node, family(node))))
