"""fold-constants: what no input can change is computed now."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

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
        known: dict[Node, Tensor] = {}
        for node in list(program.nodes()):
            if node.op == "get_attr":
                known[node] = program.weight(node)
            elif _foldable(node, known):
                known[node] = _compute(node, known)
        folded = [node for node in known if node.op == "call_function" and _needed(node, known)]
        for node in folded:
            edit.replace(node, edit.constant(f"folded_{node.name}", known[node]))
        changed = edit.close()
        return Outcome(changed, (f"{len(folded)} constants folded",) if changed else ("none",))


def _foldable(node: Node, known: dict[Node, Tensor]) -> bool:
    """Tell whether a node yields one fixed tensor of acceptable size."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload) or not is_tensor(node):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
        return False
    val = value(node)
    if not all(isinstance(size, int) for size in val.shape):
        return False
    if not all(source in known for source in node.all_input_nodes):
        return False
    read = sum(known[n].numel() * known[n].element_size() for n in node.all_input_nodes)
    return bool(val.numel() * val.element_size() <= max(SMALL, read))


def _compute(node: Node, known: dict[Node, Tensor]) -> Tensor:
    args, kwargs = map_arg((node.args, node.kwargs), lambda arg: known[arg])
    assert callable(node.target)
    with torch.no_grad():
        found = node.target(*args, **kwargs)
    assert isinstance(found, Tensor)
    return found.detach().clone(memory_format=torch.contiguous_format)


def _needed(node: Node, known: dict[Node, Tensor]) -> bool:
    """Tell whether something that is not itself folded reads the node."""
    return any(user not in known for user in node.users)
