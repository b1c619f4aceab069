"""What calibration showed of the inputs of linear layers, and what scaling makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from effopt.collectors import ROWS, ChannelExtremes, Collector, Gram, MeanAbs, Rows
from effopt.errors import PreconditionError
from effopt.memory import give_back
from effopt.passes.observers import OBSERVERS, affine
from effopt.passes.quantizable import Layer
from effopt.passes.quantization_plan import Plan
from effopt.passes.rounding import e4m3_step
from effopt.program import Program, value, where
from effopt.scale_later import constant_of
from effopt.spool import Kept, Shelf
from effopt.statistics import gather, gather_in_parts

HELD = 64 << 20
"""Bytes that statistics of layers hold in memory at once, unless those of one layer are more."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Values [tokens, K] that layers read, divided by `over` [K] where that is given.

    `rows` [T, K] are some of them, `gram` [K, K] is the sum of x x^T, before the division.
    """

    rows: Kept
    gram: Kept | None = None
    over: Tensor | None = None

    @property
    def count(self) -> int:
        """How many rows there are: T."""
        return self.rows.shape[0]

    def divided(self, scale: Tensor) -> "Inputs":
        """Return the values of x / scale."""
        return replace(self, over=scale if self.over is None else self.over * scale)

    def read_rows(self) -> Tensor:
        """Read the rows [T, K] float32."""
        rows = self.rows.read()
        return rows if self.over is None else rows / self.over

    def read_gram(self) -> Tensor | None:
        """Read the sum of x x^T [K, K] float32, if it was asked for."""
        if self.gram is None or self.over is None:
            return None if self.gram is None else self.gram.read()
        return self.gram.read() / torch.outer(self.over, self.over)


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """The inputs [tokens, K] of the layers that read one value; padding is left out.

    By channel, [K], the mean and the largest of |x|. What is larger is in a temporary file and
    read each time: `rows` [T, K] are some of the inputs, T <= 512 for each of `inputs`; `hessian`
    [K, K] is the sum of x x^T where the plan asks for it.
    """

    inputs: tuple[Inputs, ...]
    mean: Tensor
    most: Tensor

    @property
    def count(self) -> int:
        """How many rows there are: T."""
        return sum(part.count for part in self.inputs)

    @property
    def rows(self) -> Tensor:
        """Some of the inputs [T, K] float32."""
        first, *more = (part.read_rows() for part in self.inputs)
        return torch.cat([first, *more]) if more else first

    @property
    def hessian(self) -> Tensor | None:
        """The sum of x x^T [K, K] float32, or None."""
        return None if self.inputs[0].gram is None else self.read_hessian()

    def read_hessian(self) -> Tensor:
        """Read the sum of x x^T [K, K] float32, which the plan asked for."""
        total = self.inputs[0].read_gram()
        assert total is not None
        for part in self.inputs[1:]:
            more = part.read_gram()
            assert more is not None
            total += more
        return total

    def divided(self, scale: Tensor) -> "LayerStatistics":
        """Return the statistics of x / scale, for a positive scale [K]."""
        inputs = tuple(part.divided(scale) for part in self.inputs)
        return LayerStatistics(inputs, self.mean / scale, self.most / scale)

    def joined(self, other: "LayerStatistics") -> "LayerStatistics":
        """Return the statistics of both inputs, for a weight that two layers share."""
        mean = self.mean * self.count + other.mean * other.count
        most = torch.maximum(self.most, other.most)
        return LayerStatistics(
            (*self.inputs, *other.inputs), mean / (self.count + other.count), most
        )


def by_weight(
    layers: Sequence[Layer], seen: Mapping[Node, LayerStatistics]
) -> dict[Node, LayerStatistics]:
    """Give layers that share a weight the statistics of all their inputs."""
    found: dict[object, LayerStatistics] = {}
    for layer in layers:
        own, path = seen[layer.node], constant_of(layer.weight).target
        found[path] = found[path].joined(own) if path in found else own
    return {layer.node: found[constant_of(layer.weight).target] for layer in layers}


def observe(program: Program, layers: Sequence[Layer], plan: Plan) -> dict[Node, LayerStatistics]:
    """Run the calibration data once; returns what each value that layers read was seen to be.

    Raises PreconditionError where no token but padding reached a layer.
    """
    grams = plan.scheme.rounding in ("gptq", "2:4")
    sizes = dict[Node, int]()
    for layer in layers:
        sizes[layer.source] = layer.columns * (4 * ROWS + 8 * layer.columns * grams)

    def start(source: Node) -> Sequence[Collector]:
        return Rows(), MeanAbs(), ChannelExtremes(), *([Gram()] if grams else ())

    found, shelf = dict[Node, LayerStatistics](), Shelf()
    for part in gather_in_parts(program, sizes, start, HELD):
        found |= {source: _statistics(source, part.pop(source), shelf) for source in list(part)}
        give_back()
    return found


def _statistics(source: Node, found: Sequence[Collector], shelf: Shelf) -> LayerStatistics:
    rows, mean, most, *rest = found
    assert isinstance(rows, Rows)
    assert isinstance(mean, MeanAbs)
    assert isinstance(most, ChannelExtremes)
    if rows.kept is None or not len(rows.kept):
        reason = "the calibration data has no token that is not padding"
        raise PreconditionError(where(source), reason, "give samples with real tokens")
    total = rest[0].total if rest and isinstance(rest[0], Gram) else None
    gram = None if total is None else shelf.put(total.float())
    inputs = Inputs(shelf.put(rows.kept.float()), gram)
    return LayerStatistics((inputs,), mean.mean.float(), most.max_abs.float())


def static_ranges(
    program: Program, layers: Sequence[Layer], plan: Plan
) -> dict[Node, tuple[float, int]]:
    """Run the calibration data once; returns step and origin of each value that layers read.

    Some targets take ranges around 0 alone: codes of 0..255 around 128. Float codes have no origin.
    """
    chosen = OBSERVERS[plan.observer]
    collected = {layer.source: chosen.start() for layer in layers}
    gather(program, {source: [state] for source, state in collected.items()})
    ranges = {source: chosen.range(state) for source, state in collected.items()}
    if plan.grid.floating:
        kinds = {source: value(source).dtype for source in ranges}
        return {
            source: (e4m3_step(max(-lo, hi), kinds[source]), 0)
            for source, (lo, hi) in ranges.items()
        }
    if plan.product is not None and plan.product.centred:
        around = {source: affine(*ends, symmetric=True) for source, ends in ranges.items()}
        return {source: (step, MIDDLE) for source, (step, _) in around.items()}
    return {source: affine(*ends) for source, ends in ranges.items()}


MIDDLE = 128
"""The code of 0 in a range around it."""
