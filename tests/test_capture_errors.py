"""What capture refuses: wrong inputs, no module, models that are not one graph."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effopt.capture import capture
from effopt.errors import CaptureError, EffoptError, UsageError
from tests.check import said

X = torch.randn(2, 4)
FORMS = (
    "  remedy: pass a tensor, a tuple of positional or a dict of keyword arguments, "
    "or (args, kwargs)"
)


def message(kind: type[EffoptError], model: Any, given: Any = None, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        capture(model, given, **options)
    return said(caught.value)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("text", "example inputs cannot be a str"),
        (3, "example inputs cannot be a int"),
        ((), "no tensor among the example inputs (tuple)"),
        ({}, "no tensor among the example inputs (dict)"),
        ((1, 2), "no tensor among the example inputs (tuple)"),
        (((), {}), "no tensor among the example inputs (tuple)"),
    ],
)
def test_inputs_that_are_none(given: Any, why: str) -> None:
    assert message(UsageError, nn.Linear(4, 4), given) == f"{why}\n{FORMS}"


def test_what_is_no_module() -> None:
    assert message(UsageError, lambda x: x, X) == (
        "the model is a function, not a torch module\n"
        "  remedy: pass an nn.Module, a torch.export.ExportedProgram or a Hugging Face model"
    )


def test_a_plain_module_without_example_inputs() -> None:
    assert message(UsageError, nn.Linear(4, 4)) == (
        f"example inputs are needed: Linear has no config to infer them from\n{FORMS}"
    )


def test_a_dynamic_dimension_that_is_none() -> None:
    assert message(UsageError, nn.Linear(4, 4), X, dynamic=("batch", "lenght")) == (
        "unknown dynamic dimension 'lenght'\n  remedy: did you mean 'length'?"
    )


def test_dynamic_length_without_a_table_of_ids() -> None:
    assert message(UsageError, nn.Linear(4, 4), X, dynamic=("batch", "length")) == (
        "dynamic length was asked for, but no input is a [batch, length] table of token ids "
        "or [batch, length, channels]\n"
        "  remedy: leave 'length' out of dynamic, or pass integer token ids as an example input"
    )


class Branches(nn.Module):
    """Control flow that reads values."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x


def test_control_flow_that_reads_values_names_its_line() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Branches(), X)
    shown = str(caught.value)
    assert "Branches cannot be captured at " in shown
    assert "test_capture_errors.py" in shown
    assert "(if x.sum() > 0:)" in shown
    assert caught.value.remedy == "the control flow reads values: use torch.where"


class Fixed(nn.Module):
    """A view that holds for one batch alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 2, 2)


def test_a_model_that_fixes_the_batch() -> None:
    shown = message(CaptureError, Fixed(), X)
    assert shown == (
        "Fixed cannot be captured: it fixes its batch at 2\n  remedy: leave 'batch' out of dynamic"
    )
    assert capture(Fixed(), X, dynamic=()).signature.inputs[0].shape == (2, 4)


class FixedLength(nn.Module):
    """A table of one length added to embedded ids."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Parameter(torch.randn(6, 4))

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.places


def test_a_model_that_fixes_the_length() -> None:
    ids = torch.randint(0, 9, (2, 6))
    shown = message(CaptureError, FixedLength(), ids, dynamic=("batch", "length"))
    assert shown.startswith("FixedLength cannot be captured")
    assert shown.endswith("  remedy: the model fixes that size: leave it out of dynamic")


class Counted(nn.Module):
    """Returns a number beside a tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x + 1, 3


def test_an_output_that_is_no_tensor() -> None:
    assert message(CaptureError, Counted(), X) == (
        "the model returns 3 as 'output.1', which is no tensor\n  remedy: return tensors only; "
        "a module around the model can leave the rest out"
    )


class Silent(nn.Module):
    """Returns nothing."""

    def forward(self, x: Tensor) -> None:
        return None


def test_a_model_that_returns_nothing() -> None:
    assert message(CaptureError, Silent(), X) == (
        "the model returns None, which is no tensor\n  remedy: return tensors only; "
        "a module around the model can leave the rest out"
    )


def test_inputs_of_a_wrong_shape_or_name() -> None:
    shown = message(CaptureError, nn.Linear(4, 4), torch.randn(2, 5))
    assert shown.startswith("Linear cannot be captured")
    assert shown.endswith(
        "  remedy: run the model once on the example inputs, then torch.export.export on it"
    )
    shown = message(CaptureError, nn.Linear(4, 4), {"input": X, "other": X})
    assert shown.startswith("Linear cannot be captured")
    assert shown.endswith("  remedy: check the names of the example inputs against forward")
    shown = message(CaptureError, nn.Bilinear(4, 4, 4), (X,))
    assert shown.endswith("  remedy: pass every required argument of forward in the example inputs")


def test_an_error_of_the_model_itself_is_shown_with_its_place() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of coffee")

    shown = message(CaptureError, Broken(), X)
    assert "Broken cannot be captured at test_capture_errors.py" in shown
    assert "RuntimeError: out of coffee" in shown


def test_an_exported_program_without_example_inputs() -> None:
    exported = torch.export.export(nn.Linear(4, 4).eval(), (X,))
    exported._example_inputs = None
    assert message(UsageError, exported) == (
        "the exported program holds no example inputs\n  remedy: pass example_inputs"
    )


def test_a_config_without_image_size() -> None:
    model: Any = nn.Linear(4, 4)
    model.config, model.main_input_name = SimpleNamespace(), "pixel_values"
    assert message(UsageError, model) == f"the config names no image_size\n{FORMS}"
