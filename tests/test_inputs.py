"""Example inputs: variadic signatures, values that are no tensors, and exported programs."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from effopt.capture import capture
from effopt.errors import CaptureError, UsageError
from effopt.program import Program

X, Y = torch.randn(2, 4), torch.randn(2, 4)


def names(program: Program) -> list[str]:
    return [item.name for item in program.signature.inputs]


def open_batch(program: Program) -> bool:
    return all(item.shape[0] == "batch" for item in program.signature.inputs)


class Rest(nn.Module):
    """Takes any number of tensors."""

    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0] - xs[1]


class Keywords(nn.Module):
    """Takes a tensor and any keywords."""

    def forward(self, a: Tensor, **kw: Tensor) -> Tensor:
        return a - kw["y"] * kw["x"]


class Everything(nn.Module):
    """Takes a tensor, more of them, and any keywords."""

    def forward(self, a: Tensor, *xs: Tensor, **kw: Tensor) -> Tensor:
        return a - xs[0] * kw["z"]


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "wanted"),
    [
        (Rest(), (X, Y), {}, ["xs.0", "xs.1"]),
        (Keywords(), (X,), {"x": X + 1, "y": Y}, ["a", "x", "y"]),
        (Keywords(), (), {"y": Y, "a": X, "x": X + 1}, ["y", "a", "x"]),
        (Everything(), (X, Y), {"z": X + 2}, ["a", "xs.0", "z"]),
    ],
)
def test_a_variadic_forward(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], wanted: list[str]
) -> None:
    forward = inspect.signature(model.forward)
    program = capture(model, (args, kwargs))
    assert names(program) == wanted
    assert open_batch(program)
    assert "forward" not in vars(model)
    assert inspect.signature(model.forward) == forward
    rows = [x[:1].repeat(5, 1) for x in args]
    named = {key: x[:1].repeat(5, 1) for key, x in kwargs.items()}
    torch.testing.assert_close(program(*rows, **named), model(*rows, **named), rtol=0, atol=0)
    swapped = dict(reversed(named.items()))
    torch.testing.assert_close(program(*rows, **swapped), model(*rows, **named), rtol=0, atol=0)


def test_a_forward_of_the_callers_own_is_put_back() -> None:
    model = Keywords()
    own = model.forward
    model.forward = own  # type: ignore[method-assign]
    capture(model, ((X,), {"x": X, "y": Y}))
    assert vars(model)["forward"] is own


class Flagged(nn.Module):
    """Adds or subtracts one, by a flag."""

    def forward(self, x: Tensor, flag: bool = False, mode: str | None = None) -> Tensor:
        return x + 1 if flag else x - 1


def message(program: Program, *args: Any, **kwargs: Any) -> tuple[str, str]:
    with pytest.raises(UsageError) as caught:
        program(*args, **kwargs)
    return caught.value.reason, caught.value.remedy


def test_another_flag_than_at_capture_is_told() -> None:
    program = capture(Flagged(), ((X,), {"flag": False, "mode": None}))
    torch.testing.assert_close(program(X, flag=False, mode=None), X - 1)
    assert message(program, X, flag=True, mode=None) == (
        "flag was False at capture, which the graph holds",
        "pass flag=False, or capture the model again with the other value",
    )
    assert message(program, X, flag=0, mode=None)[0].startswith("flag was False")
    assert message(program, X, flag=False, mode="a")[0].startswith("mode was None")
    assert message(program, X, flag=X, mode=None)[0].startswith("flag was False")
    assert message(program, None, flag=False, mode=None)[0] == "input 'x' is a NoneType"
    assert program.fork().constants == program.constants


class Condition(nn.Module):
    """Branches by torch.cond."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))
        return found


def test_torch_cond_is_refused_with_its_place() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Condition(), X)
    assert caught.value.reason.startswith("cond (cond)")
    assert "test_inputs.py:" in caught.value.reason
    assert "torch.where" in caught.value.remedy


class Adds(nn.Module):
    """Changes a tensor in place."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).add_(2)


def test_an_operator_in_place_is_taken() -> None:
    torch.testing.assert_close(capture(Adds(), X)(X), X + 3)


def test_a_size_that_an_exported_program_lacks_is_told() -> None:
    fixed, rows = export(Adds(), (X,)), export(Adds(), (X,), dynamic_shapes=({0: Dim("rows")},))
    assert capture(fixed).signature.inputs[0].shape == (2, 4), "the default asks for nothing"
    assert capture(fixed, dynamic=()).signature.inputs[0].shape == (2, 4)
    for program, size in ((fixed, "batch"), (rows, "length")):
        with pytest.raises(UsageError, match=f"fixes its {size}") as caught:
            capture(program, dynamic=("batch", "length"))
        assert f"leave '{size}' out of dynamic" in caught.value.remedy


def test_example_inputs_that_an_exported_program_does_not_take() -> None:
    with pytest.raises(UsageError, match="do not nest as at capture"):
        capture(export(Adds(), (X,)), {"x": X})
