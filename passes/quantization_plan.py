"""What a quantize pass decided before it looked at a layer: scheme, grid, and how to search."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effopt.passes.quantizable import Layer
from effopt.passes.rounding import Grid
from effopt.passes.schemes import Scheme
from effopt.products import Limit, Product


@dataclass(frozen=True)
class Plan:
    """A scheme with its options resolved for one program and target.

    `grid` are the codes of integer weights. `product` is what the target runs of these, None for
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
    def limit(self) -> Limit | None:
        """Say why the target runs no layer of the plan, whatever its size."""
        if self.product is None:
            return None
        if self.grid.group and not self.product.takes(self.grid.group, columns=0):
            return self.product.against_blocks(self.grid.group)
        return self.product.against(symmetric=self.grid.symmetric)

    def fits(self, layer: Layer) -> bool:
        """Tell whether some block size that the target takes divides the inputs of a layer."""
        block = self.grid.block(layer.columns)
        return block is not None and (
            self.product is None or self.product.takes(block, layer.columns)
        )

    def words(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Write what the layers of the report's rows became: `4-bit weights in blocks of 128`."""
        if self.product is None:
            return self.scheme.about
        weights = f"{self.grid.bits}-bit weights"
        sizes = sorted({int(row["group"]) for row in rows})
        blocks = f" in blocks of {' and '.join(map(str, sizes))}" if self.grid.group else ""
        zero = "" if self.grid.symmetric else ", asymmetric"
        inputs = "" if self.activations == "float" else f", 8-bit activations by {self.activations}"
        return f"{weights}{blocks}{zero}{inputs}"
