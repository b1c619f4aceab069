"""What a quantize pass decided before it looked at a layer: scheme, grid, and how to search."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effopt.passes.quantizable import LINEAR, Layer
from effopt.passes.rounding import Grid
from effopt.passes.schemes import Scheme
from effopt.products import Limit, Product
from effopt.program import Program, value


@dataclass(frozen=True)
class Plan:
    """A scheme with its options resolved for one program and target.

    `grid` are the codes of rounded weights. `product` is what the target runs of these, None for
    weights that stay floats; `inside` says whether layers compute in the type of such weights.
    `alpha` is how much of an outlier goes into weights, None to search that for each group.
    """

    scheme: Scheme
    grid: Grid
    activations: str
    product: Product | None = None
    inside: bool = False
    clip: bool = True
    alpha: float | None = None
    observer: str = "minmax"

    @property
    def scaling(self) -> str:
        """How channel scales are chosen: awq, smooth, or "" for not at all."""
        return "" if self.scheme.scaling == "smooth" and self.alpha == 0 else self.scheme.scaling

    @property
    def calibrated(self) -> bool:
        """Tell whether the ranges of activations are fixed beforehand."""
        return self.activations in ("static", "fp8")

    @property
    def limit(self) -> Limit | None:
        """Say why the target runs no layer of the plan, whatever its size."""
        if self.product is None:
            return None
        if self.grid.group and not self.product.takes(self.grid.group):
            return self.product.against_blocks(self.grid.group)
        return self.product.against(symmetric=self.grid.symmetric)

    def why_not(self, program: Program, layer: Layer) -> str:
        """Say why a layer stays in float, or ""."""
        if self.scheme.rounding == "cast":
            return self._not_cast(program, layer)
        if self.scheme.rounding == "2:4" and layer.columns % 4:
            return "its inputs are no whole number of runs of four"
        block = self.grid.block(layer.columns)
        if block is None or (self.product and not self.product.takes(block, layer.columns)):
            return "no block of weights that the target takes divides its inputs"
        return ""

    def _not_cast(self, program: Program, layer: Layer) -> str:
        kind, own = getattr(torch, self.scheme.weights), value(layer.weight).dtype
        if own.itemsize <= kind.itemsize:
            return f"its weight is {str(own).removeprefix('torch.')} already"
        held = (n for n in program.nodes() if n.target == layer.weight.target)
        if any(user.target is not LINEAR for node in held for user in node.users):
            return "its weight is read by other operators too, and would be kept twice"
        most = program.weight(layer.weight).detach().abs().max()
        if most.isfinite() and most > torch.finfo(kind).max:
            return f"its weight is beyond {self.scheme.weights}"
        return ""

    def words(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Write what the layers of the report's rows became: `4-bit weights in blocks of 128`."""
        if self.product is None or self.grid.floating:
            return self.scheme.about
        weights = f"{self.grid.bits}-bit weights"
        sizes = sorted({int(row["group"]) for row in rows})
        blocks = f" in blocks of {' and '.join(map(str, sizes))}" if self.grid.group else ""
        zero = "" if self.grid.symmetric else ", asymmetric"
        inputs = "" if self.activations == "float" else f", 8-bit activations by {self.activations}"
        return f"{weights}{blocks}{zero}{inputs}"
