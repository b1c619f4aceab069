"""unify-attention: one call for every spelling, with its mask and scale, and the same numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from effopt.attention import SDPA, mask_of, scale_of
from effopt.edit import Edit
from effopt.errors import VerificationError
from effopt.program import Program, module_path, shape, value
from tests.architectures import ARCHITECTURES
from tests.attention_spellings import (
    FIRST,
    HEADS,
    LOW,
    ROWS,
    SPEC,
    SPELLINGS,
    TOKENS,
    WHOLE,
    WIDTH,
    drawn,
    made,
    one,
)
from tests.check import Check
from tests.thin import thin


def calls(program: Program) -> list[tuple[int, ...]]:
    """The ranks of the operands of each attention call; no softmax may be left."""
    assert not [node.name for node in program.nodes() if "softmax" in str(node.target)]
    found = [node for node in program.nodes() if node.target is SDPA]
    return [tuple(len(shape(arg)) for arg in node.args[:3]) for node in found]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", thin([*SPELLINGS, *WHOLE]))
def test_every_spelling_becomes_one_call(name: str) -> None:
    done = Check(made(name), drawn(ROWS)).run(FIRST).run(SPEC)
    if name != "MultiheadAttention":  # torch writes that one as a call by itself
        assert done.records[-1].notes == ("2 attention calls unified",)
    assert calls(done.program) == [(4, 4, 4)] * 2
    for rows in (1, 2, 5):
        # Products and sums in another order: 1.4 ulps of the largest output were measured.
        done.numbers(12, inputs=drawn(rows))
    done.idempotent(SPEC)
    done.run("simplify-masks,canonicalize,fold-constants").numbers(12, inputs=drawn(5))


class Bare(nn.Module):
    """No projections: short enough to read."""

    def __init__(self, attend: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.attend(x, keep)


def padded(x: Tensor, keep: Tensor) -> Tensor:
    q = x.view(-1, TOKENS, HEADS, WIDTH).transpose(1, 2)
    logits = (q @ q.transpose(2, 3) / 2).masked_fill(~keep[:, None, None], LOW)
    return softmax(logits, -1) @ q


def test_a_filled_mask_becomes_a_condition() -> None:
    (
        Check(Bare(padded), drawn(ROWS))
        .run(FIRST)
        .before(
            """
            x[batch, 6, 8]
            keep[batch, 6]
            view[batch, 6, 2, 4] = reshape(x, [-1, 6, 2, 4])
            transpose[batch, 2, 6, 4] = transpose(view, 1, 2)
            transpose_1[batch, 2, 4, 6] = transpose(transpose, 2, 3)
            matmul[batch, 2, 6, 6] = matmul(transpose, transpose_1)
            div[batch, 2, 6, 6] = div(matmul, 2)
            unsqueeze[batch, 1, 6] = unsqueeze(keep, 1)
            unsqueeze_1[batch, 1, 1, 6] = unsqueeze(unsqueeze, 2)
            bitwise_not[batch, 1, 1, 6] = bitwise_not(unsqueeze_1)
            masked_fill[batch, 2, 6, 6] = masked_fill(div, bitwise_not, -3.4028234663852886e+38)
            softmax[batch, 2, 6, 6] = softmax(masked_fill, -1)
            matmul_1[batch, 2, 6, 4] = matmul(softmax, transpose)
            return matmul_1
            """
        )
        .run(SPEC)
        .after(
            """
            x[batch, 6, 8]
            keep[batch, 6]
            view[batch, 6, 2, 4] = reshape(x, [-1, 6, 2, 4])
            transpose[batch, 2, 6, 4] = transpose(view, 1, 2)
            unsqueeze[batch, 1, 6] = unsqueeze(keep, 1)
            unsqueeze_1[batch, 1, 1, 6] = unsqueeze(unsqueeze, 2)
            attention[batch, 2, 6, 4] = scaled_dot_product_attention(transpose, transpose,
                transpose, unsqueeze_1)
            return attention
            """
        )
        .numbers(12)
    )


def one_head(x: Tensor, keep: Tensor) -> Tensor:
    bias = torch.where(keep, 0.0, -1e9)[:, None]
    return torch.bmm(softmax(torch.bmm(x, x.transpose(1, 2)) * 0.25 + bias, -1), x)


def test_one_head_in_three_dimensions_gets_a_fourth() -> None:
    (
        Check(Bare(one_head), drawn(ROWS))
        .run(FIRST)
        .before(
            """
            x[batch, 6, 8]
            keep[batch, 6]
            where[batch, 6] = where(keep, 0.0, -1000000000.0)
            unsqueeze[batch, 1, 6] = unsqueeze(where, 1)
            transpose[batch, 8, 6] = transpose(x, 1, 2)
            bmm[batch, 6, 6] = bmm(x, transpose)
            mul[batch, 6, 6] = mul(bmm, 0.25)
            add[batch, 6, 6] = add(mul, unsqueeze)
            softmax[batch, 6, 6] = softmax(add, -1)
            bmm_1[batch, 6, 8] = bmm(softmax, x)
            return bmm_1
            """
        )
        .run(SPEC)
        .after(
            """
            x[batch, 6, 8]
            keep[batch, 6]
            where[batch, 6] = where(keep, 0.0, -1000000000.0)
            unsqueeze[batch, 1, 6] = unsqueeze(where, 1)
            unsqueeze_default[batch, 1, 6, 8] = unsqueeze(x, 1)
            unsqueeze_default_1[batch, 1, 6, 8] = unsqueeze(x, 1)
            unsqueeze_default_2[batch, 1, 6, 8] = unsqueeze(x, 1)
            unsqueeze_default_3[batch, 1, 1, 6] = unsqueeze(unsqueeze, 1)
            attention[batch, 1, 6, 8] = scaled_dot_product_attention(unsqueeze_default,
                unsqueeze_default_1, unsqueeze_default_2, unsqueeze_default_3, scale=0.25)
            squeeze_dim[batch, 6, 8] = squeeze(attention, 1)
            return squeeze_dim
            """
        )
        .numbers(12)
    )


def test_a_condition_is_small_and_a_scale_is_written_only_if_it_is_another() -> None:
    for name, expected in (("scale after", {}), ("another scale", {"scale": 0.3})):
        done = one(SPELLINGS[name]).run(SPEC)
        (call,) = (node for node in done.program.nodes() if node.target is SDPA)
        assert call.kwargs == expected
        assert scale_of(call) == (0.3 if expected else 0.5)
    done = one(SPELLINGS["masked_fill"]).run(SPEC)
    (call,) = (node for node in done.program.nodes() if node.target is SDPA)
    mask = mask_of(call)
    assert mask is not None
    assert value(mask).dtype == torch.bool
    assert shape(mask)[1:] == (1, 1, TOKENS)


def test_an_attempt_that_fails_leaves_no_trace() -> None:
    program = one(SPELLINGS["masked_fill"]).program
    before, edit = program.text(), Edit(program, "test")
    x = program.inputs()[0]
    (weights,) = (node for node in program.nodes() if node.target is torch.ops.aten.softmax.int)

    def attempt(*dim: int) -> None:
        with edit.attempt(weights):
            made = edit.call(torch.ops.aten.neg.default, x)
            edit.call(torch.ops.aten.unsqueeze.default, made, *dim)

    with pytest.raises(VerificationError):
        attempt(7)
    assert (edit.count, program.text()) == (0, before)
    attempt(1)
    assert edit.count == 2


def test_the_call_names_the_module_of_its_softmax() -> None:
    done = Check(made("3-D"), drawn(ROWS)).run(FIRST).run(SPEC)
    found = [module_path(node) for node in done.program.nodes() if node.target is SDPA]
    assert found == ["layers.0", "layers.1"]


EAGER = {
    **{"bert": 3, "t5-encoder": 3, "mpnet": 3, "deberta-v2": 3},
    **{"gpt2": 3, "bart": 6, "bloom": 3, "layoutlmv3": 3},
}
"""Transformers models with their eager attention, and how many calls they make."""
FAST = ("bert", "gpt2")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in EAGER]
)
def test_models_with_eager_attention(name: str) -> None:
    model, given = ARCHITECTURES[name].make()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # type: ignore[operator]
    done = Check(model, given).run(FIRST).run(SPEC)
    assert calls(done.program) == [(4, 4, 4)] * EAGER[name]
    samples = done.program.samples
    for rows in (1, 2, 5):
        inputs = [torch.cat([sample] * 3)[:rows] for sample in samples]
        done.numbers(16, inputs=inputs)  # 6.9 ulps of the largest output were measured
