"""split-constants: a table that several sequences read becomes one for each.

Two towers of one length often share a table of positions, or the `arange` that makes their masks.
Its tokens are then those of no tower alone; apart, each copy can lose the tokens of its own.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from effopt.axes import AxisMap, Dims, find_axes, leaves
from effopt.edit import Edit
from effopt.errors import PreconditionError
from effopt.pipeline import Outcome
from effopt.program import Program

Readers = dict[Dims, list[Node]]


@dataclass(frozen=True)
class SplitConstants:
    """Give each group of readers that take a constant for other axes a node of its own. Exact."""

    name: ClassVar[str] = "split-constants"
    exact: ClassVar[bool] = True

    def check(self, program: Program) -> list[PreconditionError]:
        """Accept every program."""
        return []

    def run(self, program: Program) -> Outcome:
        """Copy the last node of each shared constant; what that was made of follows in turn."""
        edit = Edit(program, self.name)
        copies = 0
        while shared := _shared(program.get(find_axes)):
            for node, groups in shared.items():
                for readers in groups:
                    with edit.after(node):
                        copy = edit.copy(node)
                    for reader in readers:
                        reader.replace_input_with(node, copy)
                    copies += 1
            edit.close()
        return Outcome(copies > 0, (f"{copies} copies made",) if copies else ("none",))


def _shared(axes: AxisMap) -> dict[Node, list[list[Node]]]:
    """Return the readers of each constant, by what they take it for, but those of its own dims."""
    found: dict[Node, Readers] = {}
    for (reader, node), dims in axes.anew.items():
        taken = tuple(map(leaves, dims))
        if taken != axes.of(node) and not all(axis.constant for dim in taken for axis in dim):
            found.setdefault(node, {}).setdefault(taken, []).append(reader)
    return {
        node: list(groups.values()) for node, groups in found.items() if _has_more(node, groups)
    }


def _has_more(node: Node, groups: Readers) -> bool:
    """Tell whether some reader takes a constant as it is: one that reads it twice is alone."""
    return len(node.users) > sum(map(len, groups.values()))
