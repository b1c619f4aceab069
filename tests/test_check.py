"""The tester itself: what it must not let pass."""

import pytest
import torch
from torch import Tensor, nn

from tests.check import Check, agree, said

X = torch.randn(2, 6)


class Twice(nn.Module):
    """relu, computed twice."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * torch.relu(x)


def fails(message: str) -> pytest.RaisesExc[BaseException]:
    return pytest.raises((AssertionError, pytest.fail.Exception), match=message)


def test_a_bound_that_anything_meets_is_refused() -> None:
    one = [torch.ones(3)]
    for ulps, atol in ((0, 0.0), (1e6, 0.0), (1, 0.5)):
        with fails("vacuous bound"):
            agree(one, one, ulps, atol)
    with fails("vacuous bound"):
        agree([torch.zeros(3)], [torch.zeros(3)], 4)


def test_differences_do_not_broadcast() -> None:
    with fails("a difference would broadcast"):
        agree([torch.ones(3, 1)], [torch.ones(3, 3)], 4)


def test_every_output_is_compared() -> None:
    right, wrong = torch.ones(3), torch.ones(3) + 1e-3
    agree([right, right], [right, right], 4)
    with fails("output 1 differs by 0.00"):
        agree([right, wrong], [right, right], 4)
    with pytest.raises(AssertionError):
        agree([right], [right, right], 4)


def test_nan_is_no_agreement() -> None:
    with fails("output 0 is not finite"):
        agree([torch.tensor([torch.nan, 1.0])], [torch.ones(2)], 4)


def test_text_that_differs_and_runs_that_change_nothing() -> None:
    check = Check(Twice(), X)
    with pytest.raises(AssertionError):
        check.before("x[batch, 6]")
    check.run("canonicalize")
    with fails("something changed"):
        check.kept("already normal")
    check.run("canonicalize").kept("already normal")
    with fails("nothing changed"):
        check.after(
            """
            x[batch, 6]
            relu[batch, 6] = relu(x)
            mul[batch, 6] = mul(relu, relu)
            return mul
            """
        )


def test_what_is_not_refused_and_another_message() -> None:
    check = Check(Twice(), X)
    with fails("DID NOT RAISE"):
        check.refuses("canonicalize", "no")
    with pytest.raises(AssertionError):
        check.refuses("merge-tokens{r=2}", "another message")


def test_places_in_messages_lose_their_folder_and_line() -> None:
    error = ValueError("relu (relu.default) in a.b at /home/x/some-model.py:31: no")
    assert said(error) == "relu (relu.default) in a.b at some-model.py: no"
