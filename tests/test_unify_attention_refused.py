"""unify-attention: what is no plain attention is left alone, and the note says why."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from tests.attention_spellings import FIRST, ROWS, SPEC, Attend, drawn, one
from tests.check import Check

LEFT: dict[str, tuple[Attend, str]] = {
    "capped": (
        lambda m, q, k, v, _: softmax(torch.tanh(q @ k.mT / 50) * 50, -1) @ v,
        "tanh (tanh.default) lies between the product and its softmax",
    ),
    "a sink": (
        lambda m, q, k, v, _: (
            softmax(torch.cat([q @ k.mT, m.table[..., :1].expand(q.shape[0], -1, -1, -1)], -1), -1)[
                ..., :-1
            ]
            @ v
        ),
        "cat (cat.default) lies between the product and its softmax",
    ),
    "two products": (
        lambda m, q, k, v, _: softmax(q @ k.mT + k @ q.mT, -1) @ v,
        "disentangled: several products are added up before the softmax",
    ),
    "weights that are changed": (
        lambda m, q, k, v, _: (softmax(q @ k.mT, -1) * m.table) @ v,
        "its weights are read by mul, not by a product",
    ),
    "weights that are read": (
        lambda m, q, k, v, _: (w := softmax(q @ k.mT, -1)) @ v + w.mean((-1, -2), keepdim=True),
        "its weights are read by mean",
    ),
    "logits that are read": (
        lambda m, q, k, v, _: softmax(w := q @ k.mT, -1) @ v + w.mean((-1, -2), keepdim=True),
        "its logits are read by mean",
    ),
    "no product": (
        lambda m, q, k, v, _: softmax(m.table + q.sum(-1, keepdim=True), -1) @ v,
        "its logits are no product of queries and keys",
    ),
    "a mask that is not low": (
        lambda m, q, k, v, _: softmax(torch.where(m.causal, q @ k.mT, -1.0), -1) @ v,
        "where (where.ScalarOther) lies between the product and its softmax",
    ),
    "a mask of weights": (
        lambda m, q, k, v, _: softmax(q @ k.mT * m.table, -1) @ v,
        "mul (mul.Tensor) lies between the product and its softmax",
    ),
    "five dimensions": (
        lambda m, q, k, v, _: (softmax(q[:, None] @ k[:, None].mT, -1) @ v[:, None])[:, 0],
        "its product has 5 dimensions",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_plain_attention_is_left_alone(name: str) -> None:
    attend, reason = LEFT[name]
    done = one(attend).run(SPEC)
    assert not done.records[-1].changed
    first, *rest = done.records[-1].notes
    assert first == "no attention to unify"
    assert [re.sub(r"^softmax \(softmax.int\) at \S+: ", "", note) for note in rest] == [reason]


def test_weights_that_are_an_output_stay() -> None:
    class Shown(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            weights = softmax(x @ x.transpose(1, 2), -1)
            return weights @ x, weights

    done = Check(Shown(), drawn(ROWS)[0]).run(FIRST).run(SPEC)
    assert done.records[-1].notes[1].endswith("its weights are an output")
