"""Spellings of a layer as models, and what unify-layers is expected to make of them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.check import Check

FORM = "canonicalize,fold-constants,unify-layers,canonicalize"
C, N = 8, 6
Spelling = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """A function of x and two vectors of channels."""

    def __init__(self, function: Spelling) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.w, self.b = nn.Parameter(torch.rand(C) + 0.5), nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def check(function: Spelling, rows: int = 2, dynamic: tuple[str, ...] = ("batch",)) -> Check:
    torch.manual_seed(1)
    return Check(Model(function), torch.randn(rows, N, C) * 3 + 1, dynamic)


def becomes(function: Spelling, line: str, ulps: float = 8) -> None:
    """Expect one node, which `line` describes, in place of a whole function of x."""
    name = line.partition("[")[0]
    done = check(function).run(FORM).after(f"x[batch, {N}, {C}]\n{line}\nreturn {name}")
    done.numbers(ulps).idempotent(FORM)


def stays(function: Spelling) -> None:
    """Expect that nothing is found."""
    check(function).run("canonicalize,fold-constants").run("unify-layers").kept(
        "no other spelling found"
    )


def by_mean(s: Model, x: Tensor) -> Tensor:
    """A layer_norm of x with both vectors, in its most common spelling."""
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return s.w * (x - mean) / torch.sqrt(variance + 1e-5) + s.b
