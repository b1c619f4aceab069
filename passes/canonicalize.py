"""canonicalize: one form for each thing: one spelling, no identities, no repeats."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import Argument

from effopt.axes import same_sizes
from effopt.edit import Edit
from effopt.errors import PreconditionError
from effopt.infer import depends_on_data
from effopt.passes.broadcasts import EXPANSIONS, choose_in_place_of_write, read_unexpanded
from effopt.pipeline import Outcome
from effopt.program import Program, is_tensor, shape, value

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Canonicalize:
    """Bring the graph to its normal form: without identities and repeats. Exact."""

    name: ClassVar[str] = "canonicalize"
    exact: ClassVar[bool] = True

    def check(self, program: Program) -> list[PreconditionError]:
        """Any program has a normal form."""
        return []

    def run(self, program: Program) -> Outcome:
        """Apply the rules once, in execution order; then share what is computed twice."""
        edit = Edit(program, self.name)
        for node in list(program.nodes()):
            _normalise(edit, node)
        _share(edit)
        note = f"{edit.count} nodes rewritten"
        changed = edit.close()
        return Outcome(changed, (note,) if changed else ("already normal",))


def _normalise(edit: Edit, node: Node) -> None:
    """Apply the first rule that fits; a rule returns what stands for the node, or None."""
    if node.op != "call_function":
        return
    if node.target in CHECKS:
        edit.erase(node)
        return
    if node.target in SHAPED_ALIKE:
        with edit.before(node):
            sizes = sizes_of(edit, node)
        edit.retarget(node, SHAPED_ALIKE[node.target], node.args[0], sizes)
    if node.target in VIEWS and node.target is not aten.reshape.default:
        edit.retarget(node, aten.reshape.default, *node.args)
    same = next((found for rule in IDENTITIES if (found := rule(node)) is not None), None)
    same = same or choose_in_place_of_write(edit, node)
    if same is not None:
        edit.replace(node, same)
    elif node.target in EXPANSIONS:
        read_unexpanded(edit, node)
    elif node.target is aten.reshape.default:
        _join_views(edit, node)


def sizes_of(edit: Edit, node: Node) -> list[Argument]:
    """Write the sizes of a result as arguments: -1 for a free one, a node for each further one."""
    free = [place for place, size in enumerate(shape(node)) if not isinstance(size, int)]
    sizes: list[Argument] = list(shape(node))
    for place in free:
        other = node.args[1]
        sizes[place] = -1 if len(free) == 1 else edit.call(aten.sym_size.int, other, place)
    return sizes


def _join_views(edit: Edit, node: Node) -> None:
    """reshape(reshape(x)) is one reshape of x, or x itself."""
    inner = node.args[0]
    while isinstance(inner, Node) and inner.target is aten.reshape.default:
        inner = inner.args[0]
    assert isinstance(inner, Node)
    if same_shape(inner, node):
        edit.replace(node, inner)
    elif inner is not node.args[0]:
        edit.update(node, inner, *node.args[1:])


def same_shape(left: Node, right: Node) -> bool:
    """Tell whether two tensors have one shape for every input."""
    return same_sizes(shape(left), shape(right))


def _unchanged(node: Node) -> Node | None:
    """Return the argument of a node that returns it as it is: same shape, same dtype."""
    if node.target not in IDENTICAL:
        return None
    inner = node.args[0]
    if not isinstance(inner, Node) or not same_shape(inner, node):
        return None
    return inner if value(inner).dtype == value(node).dtype else None


def _neutral(node: Node) -> Node | None:
    """x + 0, x - 0, x * 1, x / 1."""
    if node.target not in NEUTRAL or len(node.args) < 2:
        return None
    x, other = node.args[:2]
    if isinstance(other, (Node, bool)) or other != NEUTRAL[node.target] or not is_tensor(x):
        return None
    assert isinstance(x, Node)
    return x if value(x).dtype == value(node).dtype and not node.kwargs else None


def _lone_part(node: Node) -> Node | None:
    """cat([nothing, x]) is x: an unfilled cache is a vector of no elements."""
    if node.target is not aten.cat.default:
        return None
    parts = [part for part in node.args[0] if list(shape(part)) != [0]]  # type: ignore[union-attr,arg-type]
    if len(parts) != 1 or not isinstance(parts[0], Node):
        return None
    return parts[0] if value(parts[0]).dtype == value(node).dtype else None


def _eval_dropout(node: Node) -> Node | None:
    dropouts = (aten.dropout.default, aten.feature_dropout.default)
    inert = node.target in dropouts and (node.args[2] is False or node.args[1] == 0)
    return node.args[0] if inert and isinstance(node.args[0], Node) else None


def _whole_slice(node: Node) -> Node | None:
    step = node.args[4] if len(node.args) > 4 else 1
    if node.target is not aten.slice.Tensor or step != 1:
        return None
    inner = node.args[0]
    return inner if isinstance(inner, Node) and same_shape(inner, node) else None


def _share(edit: Edit) -> None:
    """Compute equal things once: same operator, same arguments, no randomness."""
    known: dict[Any, Node] = {}
    for node in list(edit.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags or depends_on_data(value(node)):
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        if key in known:
            edit.replace(node, known[key])
        else:
            known[key] = node


def _hashable(arg: Any) -> Any:
    if isinstance(arg, (list, tuple)):
        return tuple(_hashable(item) for item in arg)
    if isinstance(arg, dict):
        return tuple((key, _hashable(item)) for key, item in sorted(arg.items()))
    return (type(arg), arg) if isinstance(arg, (bool, int, float)) else arg


SHAPED_ALIKE = {
    aten.reshape_as.default: aten.reshape.default,
    aten.view_as.default: aten.reshape.default,
}
"""Operators that take the shape of another tensor, and those that take sizes."""
CHECKS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default)
IDENTICAL = (
    *(aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default),
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default),
    *(aten.expand.default, aten.lift_fresh_copy.default, aten.reshape.default),
)
NEUTRAL: dict[Any, int] = {
    aten.add.Tensor: 0,
    aten.sub.Tensor: 0,
    aten.mul.Tensor: 1,
    aten.div.Tensor: 1,
}
IDENTITIES: tuple[Callable[[Node], Node | None], ...] = (
    *(_eval_dropout, _lone_part, _whole_slice, _unchanged, _neutral),
)
