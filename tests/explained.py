"""Explanations that several tests read: each is made once a session, and never changed."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import effopt
from effopt.explanation import Explanation
from tests.programs import made
from tests.spellings import WIDTH, ScaledBlock


@functools.cache
def explained(name: str, *dynamic: str) -> Explanation:
    model, inputs = made(name)
    return effopt.explain(model, inputs, dynamic=dynamic or ("batch",))


class Net(nn.Module):
    """Three blocks; `read` says what becomes of the last hidden states."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.Sequential(ScaledBlock(), ScaledBlock(), ScaledBlock())
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.blocks(self.stem(x)))


def averaged(x: Tensor) -> Tensor:
    return x.mean(1)


def cumulated(x: Tensor) -> Tensor:
    return x.cumsum(1).mean(1)


@functools.cache
def of_net(read: Callable[[Tensor], Tensor] = averaged) -> Explanation:
    torch.manual_seed(0)
    return effopt.explain(Net(read).eval(), torch.randn(2, 12, WIDTH))


def renamed(found: Explanation, name: str) -> Explanation:
    return replace(found, model=name)
