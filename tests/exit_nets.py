"""Small models that get exits in tests, with samples to calibrate on."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from effopt.calibration import read_calibration
from effopt.exits import Exits, find_exits
from effopt.program import Program
from effopt.report import StepRecord
from tests.check import Check
from tests.programs import apply, draw, normal

TOKENS = 6


class Net(nn.Module):
    """A class token ahead of six, residual attention and a layer in each block; and a read."""

    def __init__(self, read: Callable[..., Any], blocks: int = 3, seen: Tensor | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.qk, self.up = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.cls, self.head = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 3)
        self.read, self.blocks, self.seen = read, blocks, seen

    def forward(self, x: Tensor) -> Any:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        for _ in range(self.blocks):
            h = self.qk(x).unsqueeze(1)
            x = x + scaled_dot_product_attention(h, h, h, self.seen).squeeze(1)
            x = x + self.up(x)
        return self.read(self, layer_norm(x, [4]))


def logits(net: Net, x: Tensor) -> Tensor:
    return net.head(x[:, 0])


def data(count: int = 200, batch: int = 20) -> list[Tensor]:
    given = torch.randn(count, TOKENS, 4, generator=torch.Generator().manual_seed(7))
    return list(given.split(batch))


def check(read: Callable[..., Any] = logits, count: int = 200, **options: Any) -> Check:
    """A small model in normal form, with samples to calibrate on."""
    return copy.copy(_checked(read, count, **options))


@functools.cache
def _checked(read: Callable[..., Any], count: int, **options: Any) -> Check:
    tester = Check(Net(read, **options), torch.randn(2, TOKENS, 4)).normal()
    if count:
        tester.program.calibration = read_calibration(data(count), tester.program)
    return tester


def exited(read: Callable[..., Any] = logits, spec: str = "cuts=2") -> Program:
    return check(read).run(f"exit-early{{epsilon=0.05,{spec}}}").program


def record_of(tester: Check, spec: str) -> StepRecord:
    return tester.run(f"exit-early{{epsilon=0.05,{spec}}}").records[-1]


def exits_in(program: Program) -> Exits:
    found = program.get(find_exits)
    assert found is not None
    return found


@functools.cache
def zoo(name: str, spec: str = "exit-early{epsilon=0.05}") -> Program:
    """A zoo model with exits; it has 182 samples."""
    program = normal(name).fork()
    batches = [draw(name, 7, seed=seed) for seed in range(26)]
    program.calibration = read_calibration(batches, program)
    return apply(program, spec)[0]


def head_of(program: Program, place: int) -> tuple[Tensor, Tensor]:
    """The weight and bias of an exit's head."""
    node = next(n for n in program.nodes() if str(n.target) == f"exit{place}_weight")
    reader = next(iter(node.users))
    return program.weight(node), program.weight(reader.args[2])  # type: ignore[arg-type]


def three_blocks() -> tuple[nn.Module, Tensor]:
    """Return a model and its example inputs, as a command loads them."""
    return Net(logits).eval(), torch.randn(2, TOKENS, 4)
