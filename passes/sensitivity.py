"""Which layers lose most when they are quantized alone: those are the ones to leave in float.

The error of a layer's own outputs does not tell (a Spearman correlation of 0.04 was measured in a
sentence encoder), so the whole program runs once for each layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from effopt.kernel import kernel
from effopt.passes.quantizable import Layer
from effopt.passes.quantization_plan import Plan
from effopt.passes.rounding import Rounded, round_weight
from effopt.program import Program


class _Instead(Interpreter):
    """Runs a program with one layer quantized, from the values that a float run left."""

    def __init__(self, program: Program, node: Node, rounded: Rounded, activations: str) -> None:
        super().__init__(program.module)
        self.node, self.rounded, self.activations = node, rounded, activations

    def run_node(self, n: Node) -> Any:
        if n is not self.node:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x, _, *bias = (*args, *kwargs.values())
        parts = self.rounded.codes, self.rounded.scale, self.rounded.zero
        rest = self.rounded.bits, self.rounded.group, self.activations, 1.0, 0
        return kernel("quantized_linear").op(x, *parts, bias[0] if bias else None, *rest)


def losses(program: Program, layers: Sequence[Layer], plan: Plan) -> dict[Node, float]:
    """Return 1 - cosine of the outputs when each layer alone is rounded to nearest.

    Measured on the program's samples. Static ranges count as ranges by tensor.
    """
    want = program.run(program.samples)
    activations = "tensor" if plan.activations == "static" else plan.activations
    found = {}
    for layer in layers:
        rounded = round_weight(program.weight(layer.weight).detach(), plan.grid)
        with torch.no_grad():
            got = _Instead(program, layer.node, rounded, activations).run(*program.samples)
        found[layer.node] = max(map(_distance, got, want), default=0.0)
    return found


def _distance(got: Tensor, want: Tensor) -> float:
    """Return 1 - the mean cosine of the samples' outputs; 0 for outputs that are no floats."""
    if not want.is_floating_point() or not want.numel():
        return 0.0
    first, second = (part.double().reshape(len(part), -1) for part in (got, want))
    return 1 - float(torch.nn.functional.cosine_similarity(first, second).mean())


def most_sensitive(
    program: Program, layers: Sequence[Layer], plan: Plan, count: int
) -> list[Layer]:
    """Return the layers that lose most, the worst first; of equals the earlier one."""
    if not count:
        return []
    found = losses(program, layers, plan)
    return sorted(layers, key=lambda layer: -found[layer.node])[:count]
