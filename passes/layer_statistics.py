"""What calibration showed of the inputs of linear layers, and what scaling makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from effopt.collectors import ChannelExtremes, Collector, Gram, MeanAbs, Rows
from effopt.errors import PreconditionError
from effopt.passes.observers import OBSERVERS, affine
from effopt.passes.quantizable import Layer
from effopt.passes.quantization_plan import Plan
from effopt.program import Program, where
from effopt.statistics import gather


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """The inputs [tokens, K] of the layers that read one value; padding is left out.

    `rows` [T, K] are some of them, T <= 512; by channel, [K], the mean and the largest of |x|;
    `hessian` [K, K] the sum of x x^T where the plan asks for it.
    """

    rows: Tensor
    mean: Tensor
    most: Tensor
    hessian: Tensor | None = None

    def divided(self, scale: Tensor) -> "LayerStatistics":
        """Return the statistics of x / scale, for a positive scale [K]."""
        hessian = None if self.hessian is None else self.hessian / torch.outer(scale, scale)
        return replace(
            self,
            rows=self.rows / scale,
            mean=self.mean / scale,
            most=self.most / scale,
            hessian=hessian,
        )

    def joined(self, other: "LayerStatistics") -> "LayerStatistics":
        """Return the statistics of both inputs, for a weight that two layers share."""
        summed = None
        if self.hessian is not None and other.hessian is not None:
            summed = self.hessian + other.hessian
        counts = len(self.rows), len(other.rows)
        mean = (self.mean * counts[0] + other.mean * counts[1]) / sum(counts)
        rows, most = torch.cat([self.rows, other.rows]), torch.maximum(self.most, other.most)
        return LayerStatistics(rows, mean, most, summed)


def by_weight(
    layers: Sequence[Layer], seen: Mapping[Node, LayerStatistics]
) -> dict[Node, LayerStatistics]:
    """Give layers that share a weight the statistics of all their inputs."""
    found: dict[object, LayerStatistics] = {}
    for layer in layers:
        own, path = seen[layer.node], layer.weight.target
        found[path] = found[path].joined(own) if path in found else own
    return {layer.node: found[layer.weight.target] for layer in layers}


def observe(program: Program, layers: Sequence[Layer], plan: Plan) -> dict[Node, LayerStatistics]:
    """Run the calibration data once; returns what each value that layers read was seen to be.

    Raises PreconditionError where no token but padding reached a layer.
    """
    sources = dict.fromkeys(layer.source for layer in layers)
    collected: dict[Node, list[Collector]] = {
        source: [
            Rows(),
            MeanAbs(),
            ChannelExtremes(),
            *([Gram()] if plan.scheme.rounding in ("gptq", "2:4") else []),
        ]
        for source in sources
    }
    gather(program, collected)
    return {source: _statistics(source, found) for source, found in collected.items()}


def _statistics(source: Node, found: Sequence[Collector]) -> LayerStatistics:
    rows, mean, most, *rest = found
    assert isinstance(rows, Rows)
    assert isinstance(mean, MeanAbs)
    assert isinstance(most, ChannelExtremes)
    if rows.kept is None or not len(rows.kept):
        reason = "the calibration data has no token that is not padding"
        raise PreconditionError(where(source), reason, "give samples with real tokens")
    hessian = rest[0].total if rest and isinstance(rest[0], Gram) else None
    return LayerStatistics(rows.kept.float(), mean.mean.float(), most.max_abs.float(), hessian)


def static_ranges(
    program: Program, layers: Sequence[Layer], plan: Plan
) -> dict[Node, tuple[float, int]]:
    """Run the calibration data once; returns step and origin of each value that layers read.

    Some targets take ranges around 0 alone: codes of 0..255 around 128.
    """
    chosen = OBSERVERS[plan.observer]
    collected = {layer.source: chosen.start() for layer in layers}
    gather(program, {source: [state] for source, state in collected.items()})
    ranges = {source: chosen.range(state) for source, state in collected.items()}
    if plan.product is not None and plan.product.centred:
        around = {source: affine(*ends, symmetric=True) for source, ends in ranges.items()}
        return {source: (step, MIDDLE) for source, (step, _) in around.items()}
    return {source: affine(*ends) for source, ends in ranges.items()}


MIDDLE = 128
"""The code of 0 in a range around it."""
