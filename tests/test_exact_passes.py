"""The exact passes: text before and after, numbers on every zoo model, idempotence, refusals."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from effopt.attention import SDPA, mask_of
from effopt.program import Program, shape, value
from tests import zoo
from tests.check import NORMAL, Check
from tests.programs import apply, captured, draw, normal, run


@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_normal_form_keeps_the_numbers(name: str) -> None:
    program, _ = apply(captured(name), "canonicalize,fold-constants,simplify-masks")
    for batch in (1, 5):
        inputs = draw(name, batch)
        for got, want in zip(run(program, inputs), run(captured(name), inputs), strict=True):
            # The same operators on the same numbers: measured 0.0 for every model.
            assert (got - want).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["vit", "bert", "encoder_padded"])
def test_the_normal_form_is_reached_once(name: str) -> None:
    again, _ = apply(normal(name), NORMAL)
    assert again.text() == normal(name).text()


def calls(program: Program) -> list[Tensor | None]:
    masks = [mask_of(node) for node in program.nodes() if node.target is SDPA]
    return [None if mask is None else value(mask) for mask in masks]


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "clip_vision", "encoder"])
def test_masks_that_are_always_true_go(name: str) -> None:
    assert calls(normal(name)) == [None] * 3


@pytest.mark.parametrize("name", ["bert", "bert_tokens", "roberta", "encoder_padded"])
def test_padding_masks_become_boolean_rows(name: str) -> None:
    length = 12 if name == "encoder_padded" else 16
    for mask in calls(normal(name)):
        assert mask is not None
        assert mask.dtype == torch.bool
        assert tuple(mask.shape[1:]) == (1, 1, length)


class Untidy(nn.Module):
    """Identities, a repeat, nested views and an in-place operator."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.contiguous().view(-1, 2, 3).reshape(-1, 6) * 1
        z = torch.relu(y) + nn.functional.dropout(torch.relu(y), 0.5, self.training)
        z.mul_(2)
        return z[:, :]


def test_canonicalize_drops_what_does_nothing() -> None:
    (
        Check(Untidy(), torch.randn(2, 6))
        .run("canonicalize")
        .after(
            """
            x[batch, 6]
            relu[batch, 6] = relu(x)
            add[batch, 6] = add(relu, relu)
            mul_[batch, 6] = mul(add, 2)
            return mul_
            """
        )
        .numbers(1)
        .idempotent("canonicalize")
    )


class Constant(nn.Module):
    """A constant expression of a weight, and one that grows: [1] to [1000, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        big = self.gain.expand(1000, 1000).clone()
        return x * (self.gain.exp() + 1) + big.sum()


def test_fold_constants_computes_what_is_small_and_no_input_changes() -> None:
    (
        Check(Constant(), torch.randn(2, 3))
        .run("canonicalize,fold-constants")
        .after(
            """
            x[batch, 3]
            expand[1000, 1000] = expand(@gain, [1000, 1000])
            mul[batch, 3] = mul(x, @folded_add)
            sum_1[] = sum(expand)
            add_1[batch, 3] = add(mul, sum_1)
            return add_1
            """
        )
        .numbers(1)
        .idempotent("fold-constants")
    )


class Masked(nn.Module):
    """Attention under a padding mask spelled as where(mask, 0, -inf), expanded to [B, 1, N, N]."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, n, _ = x.shape
        low = torch.where(mask[:, None, None, :], 0.0, -torch.inf).expand(b, 1, n, n)
        h = x.unsqueeze(1)
        return scaled_dot_product_attention(h, h, h, low).squeeze(1)


def test_simplify_masks_reads_the_condition_of_an_additive_mask() -> None:
    mask = torch.arange(6)[None] < torch.tensor([[6], [4]])
    check = Check(Masked(), (torch.randn(2, 6, 4), mask)).run("canonicalize,simplify-masks")
    (node,) = [node for node in check.program.nodes() if node.target is SDPA]
    found = mask_of(node)
    assert found is not None
    assert value(found).dtype == torch.bool
    assert tuple(shape(found)[1:]) == (1, 1, 6)
    check.numbers(4).idempotent("simplify-masks")


class Shifted(nn.Module):
    """A mask that is no constant: it stays."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = x.unsqueeze(1)
        return scaled_dot_product_attention(h, h, h, bias).squeeze(1)


def test_simplify_masks_leaves_a_bias_alone() -> None:
    inputs = (torch.randn(2, 6, 4), torch.randn(2, 1, 6, 6))
    check = Check(Shifted(), inputs).run("canonicalize").run("simplify-masks")
    check.kept("no mask to simplify")


class SometimesTrue(nn.Module):
    """A comparison of data with a number: true or not, by the input."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = x.unsqueeze(1)
        mask = (ids >= 0)[:, None, None, :]
        return scaled_dot_product_attention(h, h, h, mask).squeeze(1)


def test_a_mask_that_may_be_false_stays() -> None:
    inputs = (torch.randn(2, 6, 4), torch.randint(0, 9, (2, 6)))
    check = Check(SometimesTrue(), inputs).run("canonicalize,fold-constants,simplify-masks")
    assert all(mask is not None for mask in calls(check.program))
    ids = torch.tensor([[1, 2, -3, 4, -5, 6]])
    check.numbers(1, inputs=(torch.randn(1, 6, 4), ids))
