"""In which type a program computes, where that is narrower than float32."""

import torch
from torch import Tensor

from effopt.program import Program

_KINDS = ((torch.bfloat16, "bfloat16"), (torch.float16, "float16"))
"""From the shortest mantissa on."""


def narrowest(program: Program) -> str:
    """Return "bfloat16" or "float16" where any operator gives it, else "".

    Weights that are kept in a narrow type and widened before they are used do not count.
    """
    values = (node.meta.get("val") for node in program.nodes() if node.op == "call_function")
    found = {value.dtype for value in values if isinstance(value, Tensor)}
    return next((name for kind, name in _KINDS if kind in found), "")
