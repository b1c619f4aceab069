"""Which quantized linear layers each kind of machine runs, and within which limits.

Passes ask before they quantize, backends before they write: each row has its form in ONNX.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from effopt.target import Target


class Limit(NamedTuple):
    """Why a machine does not run a product, and what to do instead."""

    reason: str
    remedy: str


@dataclass(frozen=True)
class Product:
    """Quantized weights times activations of a kind; see `effopt::quantized_linear`.

    `scheme` is the one of `Target.schemes` that it takes, "" for none. Weights without a zero point
    alone where `symmetric`; one scale a row where `whole`; else in blocks whose size is a multiple
    of one in `blocks` (empty: any), or, where `ragged`, of the whole row. Activations around code
    128 alone where `centred`.
    """

    scheme: str
    symmetric: bool = False
    whole: bool = False
    blocks: tuple[int, ...] = ()
    ragged: bool = False
    centred: bool = False

    def takes(self, group: int, columns: int | None = None) -> bool:
        """Tell whether blocks of `group` weights in rows of `columns`, if known, are allowed."""
        if group == columns and (self.whole or self.ragged):
            return True
        return not self.whole and (
            not self.blocks or any(group % size == 0 for size in self.blocks)
        )

    def against_blocks(self, group: int) -> Limit:
        """Say why `takes` is false."""
        if self.whole:
            return Limit(f"it takes one scale a row of weights, not one for {group}", "set group=0")
        sizes = " or ".join(map(str, self.blocks))
        reason = f"blocks of {group or 'all'} weights are no multiple of {sizes}"
        return Limit(reason, f"use blocks of {self.blocks[-1]} weights or more")

    def against(self, *, symmetric: bool, origin: int = 128) -> Limit | None:
        """Say what of weights and activations is out of the limits, blocks aside."""
        if self.symmetric and not symmetric:
            return Limit("it takes no zero points of weights", "use symmetric weights")
        if self.centred and origin != 128:
            reason = f"it takes activations around code 128 alone, not {origin}"
            return Limit(reason, "calibrate with a symmetric range")
        return None


CPU_BLOCKS = (256, 128, 64, 32, 16)
"""Sizes of a block that kernels on a CPU take, the fastest first."""
GPU_BLOCKS = (128, 64)
"""Sizes of a block that kernels on a GPU take."""

_INTEGERS = Product("int8", symmetric=True)
_AT_RUN_TIME = Product("int8-dynamic", symmetric=True)
_CPU_WEIGHTS = Product("", blocks=CPU_BLOCKS, ragged=True)

PRODUCTS: Mapping[tuple[str, str, str], Product] = MappingProxyType({
    ("cpu", "int4", "float"): _CPU_WEIGHTS,
    ("cpu", "int8", "float"): _CPU_WEIGHTS,
    ("cpu", "int8", "tensor"): _AT_RUN_TIME,
    ("cpu", "int8", "row"): _AT_RUN_TIME,
    ("cpu", "int8", "static"): _INTEGERS,
    ("portable", "int4", "float"): Product(""),
    ("portable", "int8", "float"): Product(""),
    ("portable", "int8", "tensor"): _AT_RUN_TIME,
    ("portable", "int8", "row"): _AT_RUN_TIME,
    ("portable", "int8", "static"): _INTEGERS,
    ("gpu", "int4", "float"): Product("int4-weights", symmetric=True, blocks=GPU_BLOCKS),
    ("gpu", "int8", "float"): Product("int8", symmetric=True, whole=True),
    ("gpu", "int8", "static"): Product("int8", symmetric=True, centred=True),
    ("gpu", "fp8", "fp8"): Product("fp8", symmetric=True, whole=True),
})  # fmt: skip
"""Products by kind of machine, type of weights and activations."""

ACTIVATIONS: Mapping[str, str] = MappingProxyType({
    "float": "float activations",
    "static": "calibrated activations",
    "fp8": "calibrated activations in 8-bit floats",
    "tensor": "activations whose ranges are found at run time",
    "row": "activations whose ranges are found row by row at run time",
})  # fmt: skip
"""What each kind of activations is called."""


def product(
    kind: str, weights: str, activations: str, target: Target | None = None
) -> Product | Limit:
    """Return the product of a kind of machine, or why it has none; of a target, by its schemes."""
    rows = {
        key[1:]: row
        for key, row in PRODUCTS.items()
        if key[0] == kind and (target is None or row.scheme in ("", *target.schemes))
    }
    if (weights, activations) in rows:
        return rows[weights, activations]
    known = [f"{own} weights and {ACTIVATIONS[how]}" for own, how in rows]
    reason = f"no product of {weights} weights and {ACTIVATIONS[activations]}"
    return Limit(reason, f"choose {'; or '.join(known)}")
