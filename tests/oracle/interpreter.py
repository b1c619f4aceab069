"""Run a program node by node: note every value, and put others in their place."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from effopt.program import Program

Inputs = tuple[Tensor, ...]
Change = Callable[[Any], Any]


class Recorder(Interpreter):
    """Runs a program; `changes` maps names of nodes to what becomes of their values."""

    def __init__(self, program: Program, changes: Mapping[str, Change] | None = None) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.changes = changes or {}
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.changes:
            value = self.changes[n.name](value)
        self.values[n.name] = value
        return value


def record(
    program: Program, inputs: Inputs, changes: Mapping[str, Change] | None = None
) -> Recorder:
    """Run a program on flat inputs and return what every node yielded."""
    recorder = Recorder(program, changes)
    with torch.no_grad():
        recorder.run(*inputs)
    return recorder


def outputs_of(recorder: Recorder) -> Inputs:
    """Return the outputs of a run."""
    return tuple(recorder.values["output"])
