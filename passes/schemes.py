"""Quantization schemes as data: what is rounded, how it is searched, and what that needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Scheme:
    """One way to quantize linear layers.

    `weights` are "int4", "int8" or "fp8" (as `effopt.products` names them), or a floating type that
    keeps `values` of a kind; `bits` and `group` (0: one scale an output channel) are theirs.
    `activations` are as `effopt::quantized_linear` names them; `scaling` chooses channel scales by
    "awq" or "smooth"; `muls` says whether a scale that nothing absorbs is worth a multiplication;
    `rounding` is "nearest", "gptq" (to nearest where there is no data), or one that leaves floats:
    "pow2", "2:4" or "cast". `options` are those of the pass that mean something. A scheme that
    `needs_data` has no meaning without. `values` says what the weights are if no integers.
    """

    weights: str
    bits: int
    group: int
    about: str
    options: tuple[str, ...] = ()
    activations: str = "float"
    scaling: str = ""
    muls: bool = False
    rounding: str = "nearest"
    needs_data: bool = False
    values: str = ""


_INTEGERS = "int8 weights and activations"
_GRID = ("group", "symmetric")

SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "int8-dynamic": Scheme(
            *("int8", 8, 0, f"{_INTEGERS}, ranges at run time", ("activations", "alpha")),
            *("tensor", "smooth"),
            rounding="gptq",
        ),
        "int8-static": Scheme(
            *("int8", 8, 0, f"{_INTEGERS}, calibrated ranges", ("alpha", "observer")),
            *("static", "smooth"),
            muls=True,
            needs_data=True,
        ),
        "int8-weight": Scheme("int8", 8, 128, "int8 weights, float activations", _GRID),
        "int4-rtn": Scheme("int4", 4, 128, "int4 weights, rounded to nearest", _GRID),
        "int4-awq": Scheme(
            *("int4", 4, 128, "int4 weights, channel scales and clipping searched on data (AWQ)"),
            options=(*_GRID, "clip"),
            scaling="awq",
            muls=True,
            needs_data=True,
        ),
        "int4-gptq": Scheme(
            *("int4", 4, 128, "int4 weights, rounded with error feedback (GPTQ)", _GRID),
            rounding="gptq",
            needs_data=True,
        ),
        "fp8": Scheme(
            *("fp8", 8, 0, "8-bit float weights and activations (E4M3), calibrated ranges"),
            options=("observer",),
            activations="fp8",
            needs_data=True,
            values="8-bit floats (E4M3), one scale a row",
        ),
        "fp16": Scheme(
            *("float16", 16, 0, "weights in float16"), rounding="cast", values="float16"
        ),
        "bf16": Scheme(
            *("bfloat16", 16, 0, "weights in bfloat16"), rounding="cast", values="bfloat16"
        ),
        "pow2": Scheme(
            *("float", 4, 128, "weights are signed powers of two, stored as floats", ("group",)),
            rounding="pow2",
            values="powers of two, stored as floats",
        ),
        "2:4": Scheme(
            *("float", 8, 0, "two of four weights are 0, stored as floats"),
            rounding="2:4",
            values="two of four are 0, stored as floats",
        ),
    }
)
