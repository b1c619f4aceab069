"""fold-constants: what no input can change is computed now."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from effopt.edit import Edit
from effopt.errors import PreconditionError
from effopt.pipeline import Outcome
from effopt.program import Program, is_tensor, value

SMALL = 1 << 16
"""Bytes that a folded constant may have; a larger one no more than what it is made of."""


@dataclass(frozen=True)
class FoldConstants:
    """Compute what depends on weights and constants alone, where it takes no more room. Exact."""

    name: ClassVar[str] = "fold-constants"
    exact: ClassVar[bool] = True

    def check(self, program: Program) -> list[PreconditionError]:
        """Accept every program."""
        return []

    def run(self, program: Program) -> Outcome:
        """Replace the last node of each constant expression by its value."""
        edit = Edit(program, self.name)
        known: dict[Node, Any] = {}
        for node in list(program.nodes()):
            if node.op == "get_attr":
                known[node] = program.weight(node)
            elif _foldable(node, known):
                known[node] = _compute(node, known)
        folded = [
            node
            for node, held in known.items()
            if node.op == "call_function" and isinstance(held, Tensor) and _needed(node, known)
        ]
        for node in folded:
            edit.replace(node, edit.constant(f"folded_{node.name}", known[node]))
        changed = edit.close()
        return Outcome(changed, (f"{len(folded)} constants folded",) if changed else ("none",))


def _foldable(node: Node, known: dict[Node, Any]) -> bool:
    """Tell whether a node yields fixed tensors of acceptable size."""
    target = node.target
    if node.op != "call_function" or not all(source in known for source in node.all_input_nodes):
        return False
    if target is operator.getitem:
        return is_tensor(node)
    if not isinstance(target, OpOverload) or not _is_fixed(target):
        return False
    vals = value(node) if isinstance(value(node), (tuple, list)) else [value(node)]
    if not all(isinstance(val, Tensor) for val in vals):
        return False
    if not all(isinstance(size, int) for val in vals for size in val.shape):
        return False
    read = sum(_bytes(held) for n in node.all_input_nodes for held in _tensors(known[n]))
    return sum(map(_bytes, vals)) <= max(SMALL, read)


def _is_fixed(target: OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable


def _tensors(held: Any) -> Sequence[Tensor]:
    return (held,) if isinstance(held, Tensor) else held


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _compute(node: Node, known: dict[Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), lambda arg: known[arg])
    assert callable(node.target)
    with torch.no_grad():
        found = node.target(*args, **kwargs)
    keep = torch.contiguous_format
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(memory_format=keep), found)


def _needed(node: Node, known: dict[Node, Any]) -> bool:
    """Tell whether something that is not itself folded reads the node."""
    return any(user not in known for user in node.users)
