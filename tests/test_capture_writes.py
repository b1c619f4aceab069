"""Writes into memory: captured graphs are functional, and their numbers are those of eager."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export, load, save
from torch.nn import functional as F

from effopt.capture import capture
from effopt.errors import CaptureError
from effopt.program import Program
from tests.architectures import ARCHITECTURES
from tests.check import Check, said

Function = Callable[[Tensor], Any]


class Writes(nn.Module):
    """Wraps a function of x."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def _after_clone(x: Tensor) -> Tensor:
    y = x.clone()
    y.add_(1)
    return x + y


def _after_neutral(x: Tensor) -> Tensor:
    y = x * 1
    y.add_(1)
    return x + y


def _after_contiguous(x: Tensor) -> Tensor:
    y = x + 1
    y.contiguous().mul_(2)
    return y


def _after_a_copy_by_contiguous(x: Tensor) -> Tensor:
    y = x + 1
    z = y.t().contiguous()
    z.mul_(2)
    return y + z.t()


def _after_inert_dropout(x: Tensor) -> Tensor:
    y = x + 1
    F.dropout(y, 0.5, training=False).mul_(2)
    return y


def _after_a_cast_to_the_same(x: Tensor) -> Tensor:
    y = x + 1
    y.to(torch.float32).mul_(2)
    return y


def _read_before(x: Tensor) -> Tensor:
    y = torch.relu(x)
    z = y + 1
    y.add_(5)
    return y + z


def _view_read_after(x: Tensor) -> Tensor:
    y = torch.relu(x)
    first = y[:, 0]
    y.add_(5)
    return y + first[:, None]


def _written_through_a_view(x: Tensor) -> Tensor:
    y = torch.relu(x)
    y[:, 0] = 7
    return y


def _another_view_read_after(x: Tensor) -> Tensor:
    y = torch.relu(x)
    rows = y.view(-1, 2, 2)
    y[:, 1:3] = x[:, :2]
    return rows.transpose(1, 2) * 2


def _twice(x: Tensor) -> Tensor:
    y = torch.relu(x)
    y.add_(1).mul_(2)
    return y.sub_(x)


def _equal_then_written(x: Tensor) -> Tensor:
    y, z = torch.relu(x), torch.relu(x)
    y.add_(1)
    return y * z


def _filled(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.fill_(3)
    y[:, :2].zero_()
    return x + y


def _masked(x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    y.masked_fill_(x > 0, 2.0)
    return y.clamp_(max=1.5)


def _indexed(x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0] = 2.0
    return y.index_put_((torch.tensor([0]),), x[1:2])


def _chunks(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.clone()
    left, right = y.chunk(2, -1)
    right.mul_(3)
    return y, left + right


def _an_item_of_a_list(x: Tensor) -> Tensor:
    y = x * 1
    y.unbind(1)[2].fill_(3.0)
    return y


def _through_a_chain_of_views(x: Tensor) -> Tensor:
    y = x.clone()
    y.view(-1, 2, 2).permute(1, 2, 0)[0, 1].neg_()
    return y


def _diagonal(x: Tensor) -> Tensor:
    y = x.clone()
    y.diagonal(0, 0, 1).add_(1)
    return y


def _reshaped_in_place(x: Tensor) -> Tensor:
    y = x * 1
    y.unsqueeze_(0).mul_(2)
    return y


def _assembled(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 6)
    y[:, 1:5] = x
    y[:, 0] = x.sum(1)
    return y


def _copied_from_itself(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.clone().view(x.shape[0], 2, 2)
    y[:, 1].copy_(y[:, 0])
    y[:, 0] += 1
    return y.flatten(1), x


def _into_the_input(x: Tensor) -> Tensor:
    first = x[:, 0]
    first.add_(1)
    return x * 2


FUNCTIONS = (
    *(_after_clone, _after_neutral, _after_contiguous, _after_a_copy_by_contiguous),
    *(_after_inert_dropout, _after_a_cast_to_the_same, _read_before, _view_read_after),
    *(_written_through_a_view, _another_view_read_after, _twice, _equal_then_written, _filled),
    *(_masked, _indexed, _chunks, _an_item_of_a_list, _through_a_chain_of_views, _diagonal),
    *(_reshaped_in_place, _assembled, _copied_from_itself, _into_the_input),
)


def leaves(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def is_functional(program: Program) -> bool:
    schemas = [getattr(node.target, "_schema", None) for node in program.nodes()]
    return not any(schema is not None and schema.is_mutable for schema in schemas)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_writes_keep_the_numbers(function: Function) -> None:
    program = capture(Writes(function), torch.randn(2, 4))
    assert is_functional(program)
    for rows in (2, 5):
        x = torch.randn(rows, 4)
        want = leaves(function(x.clone()))
        for got, wanted in zip(leaves(program(x)), want, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_writes_of_an_archived_program_keep_the_numbers(function: Function) -> None:
    """A loaded archive does not know which of its values shared memory."""
    rows = {0: Dim("rows", min=2)}
    file = io.BytesIO()
    with torch.no_grad():
        save(export(Writes(function), (torch.randn(2, 4),), dynamic_shapes=(rows,)), file)
    file.seek(0)
    program = capture(load(file))
    x = torch.randn(3, 4)
    want = leaves(function(x.clone()))
    for got, wanted in zip(leaves(program(x)), want, strict=True):
        assert torch.equal(got, wanted)


def test_a_write_through_a_view_is_put_back() -> None:
    Check(Writes(_assembled), torch.randn(2, 4)).run("canonicalize").after(
        """
        x[batch, 4]
        sym_size_int_3 = sym_size(x, 0)
        zeros[batch, 6] = zeros([sym_size_int_3, 6], device=cpu, pin_memory=False)
        slice_scatter_default[batch, 6] = slice_scatter(zeros, x, 1, 1, 5)
        sum_1[batch] = sum(x, [1])
        select_scatter_default[batch, 6] = select_scatter(slice_scatter_default, sum_1, 1, 0)
        return select_scatter_default
        """
    )


def test_a_view_that_nobody_reads_later_is_not_taken_again() -> None:
    Check(Writes(_after_contiguous), torch.randn(2, 4)).before(
        """
        x[batch, 4]
        add[batch, 4] = add(x, 1)
        mul_[batch, 4] = mul(add, 2)
        return mul_
        """
    )


def test_a_sum_in_place_keeps_the_dtype_of_its_target() -> None:
    def half(x: Tensor) -> Tensor:
        return x.half().add_(x)

    program = capture(Writes(half), torch.randn(2, 4))
    x = torch.randn(3, 4)
    assert program.signature.outputs[0].dtype == "float16"
    assert torch.equal(program(x), half(x))


def test_the_callers_input_is_not_written() -> None:
    x = torch.randn(2, 4)
    program, before = capture(Writes(_into_the_input), x), x.clone()
    program(x)
    assert torch.equal(x, before)
    assert torch.equal(program.samples[0], before)


class Counts(nn.Module):
    """Counts its calls in a buffer, and perhaps returns the count."""

    calls: Tensor

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.read = read
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls if self.read else x + 1


def test_a_counter_that_nobody_reads_is_left_alone() -> None:
    model = Counts(read=False)
    program, x = capture(model, torch.randn(2, 4)), torch.randn(3, 4)
    assert torch.equal(program(x), x + 1)
    assert model.calls == 0


def test_a_counter_that_is_read_is_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Counts(read=True), torch.randn(2, 4))
    assert said(caught.value) == (
        "forward writes into 'calls' and reads it: its results depend on the calls before\n"
        "  remedy: compute what it holds from the inputs, or make it an input and an output"
    )


class Assigns(Counts):
    """Assigns to its buffer in place of writing into it."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x * self.calls


def test_a_buffer_that_is_assigned_and_read_is_refused() -> None:
    with pytest.raises(CaptureError, match="writes into 'calls' and reads it"):
        capture(Assigns(read=True), torch.randn(2, 4))


class Scratch(nn.Module):
    """Writes all of a buffer before it is read: nothing passes from call to call."""

    held: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("held", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.held.copy_(x)
        return self.held * 2


def test_a_buffer_that_is_overwritten_before_it_is_read() -> None:
    model = Scratch()
    program, x = capture(model, torch.ones(2, 4), dynamic=()), torch.randn(2, 4)
    assert torch.equal(program(x), x * 2)
    assert torch.equal(model.held, torch.zeros(2, 4))


def test_a_write_without_a_functional_form_is_refused_with_its_place() -> None:
    def strided(x: Tensor) -> Tensor:
        y = x.clone()
        y.as_strided((2,), (1,)).add_(1)
        return y

    with pytest.raises(CaptureError) as caught:
        capture(Writes(strided), torch.randn(2, 4))
    assert said(caught.value) == (
        "as_strided (as_strided.default) at test_capture_writes.py is written through, "
        "which has no functional form\n"
        "  remedy: write into the tensor itself, or join its parts with torch.cat"
    )


@pytest.mark.parametrize("name", ["data2vec-vision", "vit-mae", "deberta", "funnel", "xlm"])
def test_models_that_write_in_place(name: str) -> None:
    """Their captures were refused by canonicalize: they write through views."""
    model, inputs = ARCHITECTURES[name].make()
    program = capture(model, inputs)
    assert is_functional(program)
    with torch.no_grad():
        want = [leaf for leaf in model(**inputs).values() if isinstance(leaf, Tensor)]
    for got, wanted in zip(program.run(program.samples), want, strict=False):
        assert torch.equal(got, wanted)  # the same operators on the same numbers
