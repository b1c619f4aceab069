"""Functions as captured programs with their axes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effopt.axes import AxisMap, find_axes
from effopt.capture import capture
from effopt.program import Program


class Wrapped(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.function(x) if y is None else self.function(x, y)


def traced(function: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[Program, AxisMap]:
    inputs = tuple(torch.randn(shape) for shape in shapes)
    program = capture(Wrapped(function), inputs)
    return program, program.get(find_axes)
