"""What a quantize pass decided before it looked at a layer: scheme, grid, and how to search."""

from dataclasses import dataclass

from effopt.passes.quantizable import Layer
from effopt.passes.rounding import Grid
from effopt.passes.schemes import Scheme

KINDS_OF_FLOATS = ("pow2", "2:4")
"""Roundings that leave a float weight, whose values have a form that some machines use."""


@dataclass(frozen=True)
class Plan:
    """A scheme with its options resolved for one program and target."""

    scheme: Scheme
    grid: Grid
    activations: str
    clip: bool = True
    alpha: float = 0.5
    observer: str = "minmax"

    @property
    def scaling(self) -> str:
        """How channel scales are chosen: awq, smooth, or "" for not at all."""
        return "" if self.scheme.scaling == "smooth" and not self.alpha else self.scheme.scaling

    def fits(self, layer: Layer) -> bool:
        """Tell whether some block size divides the inputs of a layer."""
        return self.grid.block(layer.columns) is not None

    def words(self) -> str:
        """Write what the layers become: `4-bit weights in blocks of 128`."""
        if self.scheme.rounding in KINDS_OF_FLOATS:
            return self.scheme.about
        weights = f"{self.grid.bits}-bit weights"
        blocks = f" in blocks of {self.grid.group}" if self.grid.group else ""
        zero = "" if self.grid.symmetric else ", asymmetric"
        inputs = "" if self.activations == "float" else f", 8-bit activations by {self.activations}"
        return f"{weights}{blocks}{zero}{inputs}"
