"""Quantization schemes as data: what is rounded, how it is searched, and what that needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Scheme:
    """One way to quantize linear layers.

    `bits` and `group` (0: one scale an output channel) of the weights; `activations` as
    `effopt::quantized_linear` names them; `scaling` chooses channel scales by "awq" or "smooth";
    `muls` says whether a scale that nothing absorbs is worth a multiplication; `rounding` is
    "nearest", "gptq", or one that leaves floats of a kind: "pow2" or "2:4". A scheme that
    `needs_data` has no meaning without calibration.
    """

    bits: int
    group: int
    activations: str
    about: str
    scaling: str = ""
    muls: bool = False
    rounding: str = "nearest"
    needs_data: bool = False


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "int8-dynamic": Scheme(
            8, 0, "tensor", "int8 weights and activations, ranges at run time", "smooth"
        ),
        "int8-static": Scheme(
            8,
            0,
            "static",
            "int8 weights and activations, calibrated ranges",
            "smooth",
            muls=True,
            needs_data=True,
        ),
        "int8-weight": Scheme(8, 128, "float", "int8 weights, float activations"),
        "int4-rtn": Scheme(4, 128, "float", "int4 weights, rounded to nearest"),
        "int4-awq": Scheme(
            4,
            128,
            "float",
            "int4 weights, channel scales and clipping searched on data (AWQ)",
            "awq",
            muls=True,
            needs_data=True,
        ),
        "int4-gptq": Scheme(
            4,
            128,
            "float",
            "int4 weights, rounded with error feedback (GPTQ)",
            rounding="gptq",
            needs_data=True,
        ),
        "pow2": Scheme(
            4, 128, "float", "weights are signed powers of two, stored as floats", rounding="pow2"
        ),
        "2:4": Scheme(8, 0, "float", "two of four weights are 0, stored as floats", rounding="2:4"),
    }
)
