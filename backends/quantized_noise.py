"""How far rounding inside of quantized linears may move the outputs of a program."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from effopt.kernel import kernel
from effopt.program import Program

_CODES = 64
"""To either side of 0; with the 127 of programs that round row by row nothing would change."""
_LEAST = 1e-12


class _Rounding(Interpreter):
    """Runs a program with the inputs of its quantized linears rounded, row by row."""

    def run_node(self, n: Node) -> Any:
        if n.target is not kernel("quantized_linear").op:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return n.target(_rounded(args[0]), *args[1:], **kwargs)


def _rounded(x: Tensor) -> Tensor:
    wide = x.float()
    step = wide.abs().amax(-1, keepdim=True).clamp_min(_LEAST) / _CODES
    return ((wide / step).round() * step).to(x.dtype)


def _share(got: Tensor, want: Tensor) -> float:
    """Return max |got - want| / max |want| where both are finite; 0 where nothing is."""
    both = got.isfinite() & want.isfinite()
    if not want.is_floating_point() or not bool(both.any()):
        return 0.0
    change, whole = (part[both].double().abs().max() for part in (got - want, want))
    return float(change / whole.clamp_min(_LEAST))


def rounding_noise(program: Program) -> float:
    """Return the largest change of a floating output, as a share of its largest value.

    Of the program's samples, when every input of a quantized linear is rounded once more, to half
    as many codes as 8 bits have. Engines do that block by block where the program does not; where
    it does, a value near the middle of two codes falls to either side.
    """
    with torch.no_grad():
        moved = _Rounding(program.module).run(*program.samples)
    return max(map(_share, pytree.tree_leaves(moved), program.run(program.samples)), default=0.0)
