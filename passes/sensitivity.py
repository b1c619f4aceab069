"""Which layers lose most when they are quantized alone: those are the ones to leave in float.

The error of a layer's own outputs does not tell (a Spearman correlation of 0.04 was measured in a
sentence encoder), so the whole program runs once for each layer.
"""

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from effopt.errors import PreconditionError
from effopt.kernel import kernel
from effopt.passes.quantizable import Layer
from effopt.passes.quantization_plan import Plan
from effopt.passes.rounding import Rounded, round_weight
from effopt.program import Program

TINY = 1e-30
"""Outputs that are all 0 have no error."""


class _Instead(Interpreter):
    """Runs a program with one layer quantized."""

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
    """Return the relative squared error of the outputs when each layer alone is rounded.

    To nearest, on the program's samples; the worst of all floating outputs counts. Static ranges
    count as ranges by tensor. An error that is no number is infinite.
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
    """Return |got - want|^2 / |want|^2 where both are finite; 0 for outputs that are no floats."""
    if not want.is_floating_point() or not want.numel():
        return 0.0
    both = got.isfinite() & want.isfinite()
    if not bool((got.isfinite() == want.isfinite()).all()):
        return inf
    change, whole = ((torch.where(both, x, 0.0)).double() for x in (got - want, want))
    return float(change.square().sum() / whole.square().sum().clamp_min(TINY))


def most_sensitive(
    program: Program, layers: Sequence[Layer], plan: Plan, count: int
) -> list[Layer]:
    """Return the layers that lose most, the worst first; of equals the earlier one.

    Raises PreconditionError where so many would leave no layer, or where no output tells.
    """
    if not count:
        return []
    if count >= len(layers):
        reason = f"keep-float={count} leaves none of {len(layers)} layers to quantize"
        raise PreconditionError("model", reason, "keep fewer layers in float")
    found = losses(program, layers, plan)
    if inf in found.values():
        reason = "an output is no finite number, with or without a layer quantized"
        raise PreconditionError("model", reason, "give example inputs with finite outputs")
    if not any(found.values()):
        reason = "no floating output changes when a layer is quantized, so none is sensitive"
        raise PreconditionError("model", reason, "let the model return its logits too")
    return sorted(layers, key=lambda layer: -found[layer.node])[:count]
