"""Wrapped regions: no_grad and autocast around parts of forward, in exported programs too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from effopt.capture import capture
from effopt.errors import CaptureError
from effopt.program import module_path, source_line
from tests.check import said

X = torch.randn(2, 4)


class Layered(nn.Module):
    """A linear layer under two contexts, one in the other; several results leave the inner one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.up(x) + 1
            with torch.autocast("cpu", enabled=False):
                low, high = y.float().chunk(2, -1)
                top = low + high
        return torch.cat([self.up(y), low * top, high], -1)


def exported(model: nn.Module) -> ExportedProgram:
    """Export as users do: with gradients on, so that no_grad is a region of its own."""
    return export(model.eval(), (X,), dynamic_shapes=({0: Dim("rows")},))


def test_regions_become_flat() -> None:
    model = Layered()
    program = capture(exported(model))
    assert {node.op for node in program.nodes()} == {
        *("get_attr", "placeholder", "call_function", "output")
    }
    assert "wrap_with" not in program.text()
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(program(x), model(x))


def test_regions_keep_their_places_in_the_source() -> None:
    program = capture(exported(Layered()))
    (first, *_) = [node for node in program.nodes() if str(node.target) == "aten.linear.default"]
    assert module_path(first) == "up"
    assert ".py:" in source_line(first)
    assert all("val" in node.meta for node in program.nodes() if node.op == "call_function")


class Cast(nn.Module):
    """A sum under autocast."""

    def __init__(self, around: Callable[[], torch.autocast]) -> None:
        super().__init__()
        self.around, self.up = around, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with self.around():
            return self.up(x).float()


def test_autocast_that_is_off_is_inlined() -> None:
    model = Cast(lambda: torch.autocast("cpu", enabled=False))
    assert torch.equal(capture(model, X)(X), model(X))


def test_autocast_for_another_device_is_inlined() -> None:
    model = Cast(lambda: torch.autocast("cuda", dtype=torch.float16, enabled=True))
    assert torch.equal(capture(model, X)(X), model(X))


def test_autocast_that_changes_numbers_is_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Cast(lambda: torch.autocast("cpu", dtype=torch.bfloat16)), X)
    assert said(caught.value) == (
        "linear (linear.default) in up at linear.py is under torch.autocast to "
        "torch.bfloat16, which changes its numbers\n"
        "  remedy: leave torch.autocast out of forward, or convert the model to that dtype"
    )
