"""Which layers lose most when they are quantized: those are the ones to leave in float.

The error of a layer's own outputs does not tell (a Spearman correlation of 0.04 was measured in a
sentence encoder), so the whole program runs once for each layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.nn.functional import linear

from effopt.errors import PreconditionError, at
from effopt.kernel import kernel
from effopt.passes.float_weights import FLOATS
from effopt.passes.output_change import change
from effopt.passes.quantizable import Layer
from effopt.passes.quantization_plan import Plan
from effopt.passes.rounding import e4m3_step, round_weight
from effopt.program import Program, where

_Linear = Callable[..., Tensor]
"""What stands for a layer in a trial: a function of its inputs and its bias, if any."""


class _Instead(Interpreter):
    """Runs a program with some of its layers replaced."""

    def __init__(self, program: Program, instead: Mapping[Node, _Linear]) -> None:
        super().__init__(program.module)
        self.instead = instead

    def run_node(self, n: Node) -> Any:
        if n not in self.instead:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x, _, *bias = (*args, *kwargs.values())
        return self.instead[n](x, *bias)


class Trial:
    """Measures what rounding some layers to nearest, without search, does to a program's outputs.

    On the first batch of its calibration data, or its samples where there is none. Static ranges
    count as ranges by tensor.
    """

    def __init__(self, program: Program, plan: Plan) -> None:
        self.program, self.plan = program, plan
        data = program.calibration
        self.inputs = program.samples if data is None else next(iter(data))
        self.want = program.run(self.inputs)

    @torch.no_grad()
    def loss(self, layers: Sequence[Layer]) -> float:
        """Return the relative squared error of the worst floating output; inf if no number."""
        instead = {layer.node: self._rounded(layer) for layer in layers}
        return self.distance(_Instead(self.program, instead).run(*self.inputs))

    def distance(self, got: Sequence[Tensor]) -> float:
        """Return the same of outputs on `inputs`."""
        return change([(got, self.want)])

    def _rounded(self, layer: Layer) -> _Linear:
        weight, scheme = self.program.weight(layer.weight).detach(), self.plan.scheme
        with at(where(layer.node)):
            if scheme.rounding in FLOATS:
                values = FLOATS[scheme.rounding](weight, self.plan, None).to(weight.dtype)
                return lambda x, bias=None: linear(x, values, bias)
            made = round_weight(weight, self.plan.grid)
        parts = made.codes, made.scale, made.zero
        words = made.bits, made.group, _TRIED.get(self.plan.activations, self.plan.activations)
        operator, floating = kernel("quantized_linear").op, self.plan.grid.floating

        def tried(x: Tensor, bias: Tensor | None = None) -> Tensor:
            step = e4m3_step(float(x.abs().amax()), x.dtype) if floating else 1.0
            result: Tensor = operator(x, *parts, bias, *words, step, 0)
            return result

        return tried


_TRIED = {"static": "tensor"}


def by_sensitivity(trial: Trial, layers: Sequence[Layer]) -> list[tuple[Layer, float]]:
    """Return layers with what each loses alone, the worst first; of equals the earlier one.

    Raises PreconditionError where no output tells.
    """
    found = [(layer, trial.loss([layer])) for layer in layers]
    if not any(loss for _, loss in found):
        reason = "no floating output changes when a layer is quantized, so none is sensitive"
        raise PreconditionError("model", reason, "let the model return its logits too")
    return sorted(found, key=lambda pair: -pair[1])


def most_sensitive(trial: Trial, layers: Sequence[Layer], count: int) -> list[Layer]:
    """Return the layers that lose most; PreconditionError where so many would leave no layer."""
    if count >= len(layers):
        reason = f"keep-float={count} leaves none of {len(layers)} layers to quantize"
        raise PreconditionError("model", reason, "keep fewer layers in float")
    return [layer for layer, _ in by_sensitivity(trial, layers)[:count]]


def within_budget(trial: Trial, layers: Sequence[Layer], most: float) -> tuple[list[Layer], float]:
    """Return the fewest most sensitive layers without which the others lose at most `most`.

    And that loss, as measured with all others rounded together. Losses are nearly additive, which
    says where to look first. Raises PreconditionError where no layer is within the budget.
    """
    if (whole := trial.loss(layers)) <= most:
        return [], whole
    ranked = by_sensitivity(trial, layers)
    order, alone = [layer for layer, _ in ranked], [loss for _, loss in ranked]

    def left(count: int) -> float:
        return trial.loss(order[count:])

    low, high = 0, len(order)  # the loss is above the budget at low, and within it at high
    guess = next(count for count in range(len(order) + 1) if sum(alone[count:]) <= most)
    known = {len(order): 0.0}
    while high - low > 1:
        count = min(max(guess, low + 1), high - 1)
        known[count] = left(count)
        low, high = (low, count) if known[count] <= most else (count, high)
        guess = (low + high) // 2
    if high == len(order):
        reason = f"each layer alone loses {alone[-1]:.2g} or more, above max-loss={most:g}"
        raise PreconditionError("model", reason, "raise max-loss, or choose a scheme of more bits")
    return order[:high], known[high]
