"""The matcher: order of operands, numbers, captures by identity, and what must not match."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from effopt.capture import capture
from effopt.edit import Edit
from effopt.match import Call, Capture, Either, Pattern, match, number, product, total
from effopt.program import Program

aten = torch.ops.aten
A, B = Capture("a"), Capture("b")
SIGMOID = Call((aten.sigmoid.default,), (A,))


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y)


def last(function: Callable[[Tensor, Tensor], Tensor]) -> Node:
    """Capture a function of two tensors and return the node of its result."""
    (node,) = program(function).output().args[0]  # type: ignore[misc, union-attr]
    assert isinstance(node, Node)
    return node


def program(function: Callable[[Tensor, Tensor], Tensor]) -> Program:
    return capture(Apply(function), (torch.randn(2, 4), torch.randn(2, 4)))


def names(pattern: Pattern, function: Callable[[Tensor, Tensor], Tensor]) -> dict[str, object]:
    """Match at the result; nodes by their names."""
    found = match(pattern, last(function)) or {}
    return {key: arg.name if isinstance(arg, Node) else arg for key, arg in found.items()}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: 2 * x * y.sigmoid(),
        lambda x, y: y.sigmoid() * (x * 2),
        lambda x, y: x / 0.5 * y.sigmoid(),
        lambda x, y: -(x * y.sigmoid() * -2),
    ],
)
def test_a_product_is_one_in_any_order(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert names(product((SIGMOID, 1), (B, 1), scale=2), function) == {"a": "y", "b": "x"}


@pytest.mark.parametrize(
    "function",
    [lambda x, y: x**3, lambda x, y: x * x * x, lambda x, y: x * x.square(), lambda x, y: x * x**2],
)
def test_powers_are_repeated_factors(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert names(product((A, 3)), function) == {"a": "x"}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: y / (x.sigmoid() + 1).sqrt(),
        lambda x, y: (1 + x.sigmoid()).rsqrt() * y,
        lambda x, y: (1 + x.sigmoid()) ** -0.5 * y,
        lambda x, y: y * (1 + x.sigmoid()).sqrt().reciprocal(),
    ],
)
def test_roots_are_powers(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    pattern = product((total((SIGMOID, 1), constant="number"), -0.5), (B, 1))
    assert names(pattern, function) == {"number": 1.0, "a": "x", "b": "y"}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: 3 - x + y.sigmoid(),
        lambda x, y: y.sigmoid() - (x - 3),
        lambda x, y: -x + (y.sigmoid() + 3),
    ],
)
def test_a_sum_is_one_in_any_order(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert names(total((SIGMOID, 1), (B, -1), constant=3), function) == {"a": "y", "b": "x"}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x * y.sigmoid(),  # another tensor
        lambda x, y: x * x.sigmoid() * 1.00001,  # another number
        lambda x, y: x * x.sigmoid() * y,  # a factor more
        lambda x, y: x / x.sigmoid(),  # another exponent
        lambda x, y: x + x.sigmoid(),  # another operator
        lambda x, y: torch.div(x.sigmoid(), 1 / x, rounding_mode="floor"),  # it rounds
    ],
)
def test_what_differs_does_not_match(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert names(product((SIGMOID, 1), (A, 1)), function) == {}


def test_a_square_below_a_root_stays_closed() -> None:
    assert names(product((A, 1)), lambda x, y: (x * x).sqrt()) == {"a": "sqrt"}  # |x|, not x
    assert names(product((A, 1)), lambda x, y: x.sqrt() ** 2) == {"a": "pow_1"}  # NaN for x < 0


def test_a_scaled_addition_is_no_plain_sum() -> None:
    assert names(total((A, 1), (B, 1)), lambda x, y: torch.add(x, y, alpha=2)) == {}


def test_what_cancels_does_not_match() -> None:
    assert names(product((A, 1)), lambda x, y: x * y / y) == {"a": "div"}


def test_a_factor_that_is_a_product_itself_is_found_whole() -> None:
    def gated(x: Tensor, y: Tensor) -> Tensor:
        z = x * y
        return z * z.sigmoid()

    assert names(product((SIGMOID, 1), (A, 1)), gated) == {"a": "mul"}


def test_either_takes_the_first_and_a_capture_may_have_a_form() -> None:
    either = Either((Call((aten.tanh.default,), (A,)), Capture("whole", SIGMOID)))
    assert names(either, lambda x, y: x.tanh()) == {"a": "x"}
    assert names(either, lambda x, y: x.sigmoid()) == {"a": "x", "whole": "sigmoid"}
    assert names(either, lambda x, y: x.relu()) == {}


def test_a_constant_of_one_element_is_a_number() -> None:
    edit = Edit(program(lambda x, y: x * y), "test")

    def held(*values: complex) -> float | None:
        return number(edit.constant("held", torch.tensor(values)))

    assert (number(3), number(True), number(None)) == (3.0, None, None)
    assert (held(2.5), held(3)) == (2.5, 3.0)
    assert (held(2.5, 2.5), held(True), held(1j)) == (None, None, None)
    assert number(last(lambda x, y: x.new_ones(1))) is None, "it is computed"
