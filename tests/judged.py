"""Small models of pre-norm blocks, and what the oracle says of a pass over one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effopt.errors import PreconditionError
from tests.oracle.case import captured, make_case
from tests.oracle.checks import faults

WIDTH, TOKENS = 16, 12


class Block(nn.Module):
    """A pre-norm block; attends from x to x, or to `other`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        z = y if other is None else other
        q, k, v = (
            part.reshape(*part.shape[:2], 2, 8).transpose(1, 2)
            for part in (self.q(y), self.k(z), self.v(z))
        )
        attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        x = x + self.out(attended.reshape(x.shape))
        return x + self.mlp(x)


class Model(nn.Module):
    """Blocks, with a function of (model, inputs) for how they are run."""

    def __init__(self, run: Callable[..., object], depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.words = nn.Embedding(50, WIDTH)
        self.places = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.between = nn.LayerNorm(WIDTH)
        self.channels = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, *inputs: Tensor) -> object:
        return self.run(self, *inputs)


def x(rows: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, TOKENS, WIDTH)


def padding() -> Tensor:
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, 8:] = 0
    return mask


def judged(run: Callable[..., object], inputs: tuple[Tensor, ...], spec: str) -> str:
    """Return the reason of a refusal, or "" for a program in which the oracle finds no fault."""
    original, normal = captured(Model(run), inputs)
    try:
        case = make_case(original, normal, spec)
    except PreconditionError as refusal:
        return refusal.reason if refusal.remedy else "no remedy"
    assert faults(case) == []
    return ""
