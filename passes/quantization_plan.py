"""What a quantize pass decided before it looked at a layer: scheme, grid, and how to search."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effopt.errors import PreconditionError
from effopt.passes.quantizable import Layer
from effopt.passes.rounding import Grid
from effopt.passes.schemes import Scheme
from effopt.target import Target

KINDS_OF_FLOATS = ("pow2", "2:4")
"""Roundings that leave a float weight, whose values have a form that some machines use."""

GPU_BLOCK = 64
"""TensorRT's blocks of 4-bit weights are multiples of this."""


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

    def words(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Write what the layers of the report's rows became: `4-bit weights in blocks of 128`."""
        if self.scheme.rounding in KINDS_OF_FLOATS:
            return self.scheme.about
        weights = f"{self.grid.bits}-bit weights"
        sizes = sorted({int(row["group"]) for row in rows})
        blocks = f" in blocks of {' and '.join(map(str, sizes))}" if self.grid.group else ""
        zero = "" if self.grid.symmetric else ", asymmetric"
        inputs = "" if self.activations == "float" else f", 8-bit activations by {self.activations}"
        return f"{weights}{blocks}{zero}{inputs}"


def refused_by(target: Target | None, plan: Plan) -> PreconditionError | None:
    """Say why a target cannot run what a plan makes, before any work is done."""
    if target is None or not target.gpu or plan.scheme.rounding in KINDS_OF_FLOATS:
        return None
    grid = plan.grid
    rules = (
        (
            plan.activations in ("tensor", "row"),
            "TensorRT has no operator that finds ranges at run time",
            "choose int8-static with calibration, or 4-bit weights",
        ),
        (not grid.symmetric, "TensorRT takes codes around 0 alone", "leave symmetric out"),
        (
            grid.bits == 8 and grid.group > 0,
            "TensorRT takes one scale a row of 8-bit weights",
            "set group=0",
        ),
        (
            grid.bits == 4 and grid.group % GPU_BLOCK > 0,
            f"TensorRT takes blocks of 4-bit weights in multiples of {GPU_BLOCK}",
            "set group=64 or group=128",
        ),
    )
    found = next(((reason, remedy) for holds, reason, remedy in rules if holds), None)
    return PreconditionError("model", f"{target.name}: {found[0]}", found[1]) if found else None
