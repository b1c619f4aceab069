"""Masks as models write them: what hides padding is understood, and what only looks so is not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from effopt.errors import EffoptError
from tests.check import Check
from tests.oracle import faults, make_case
from tests.spellings import HEADS, WIDTH, ScaledBlock

TOKENS, HEAD = 12, WIDTH // HEADS
MERGE, PRUNE = "merge-tokens{r=2}", "prune-tokens{keep=0.6,sites=[0,1]}"
Weigh = Callable[[Tensor, Tensor], Tensor]
"""From logits [B, H, N, N] and a mask [B, N] of ones and zeros to attention weights."""


class MaskedBlock(ScaledBlock):
    """Attention by hand, whose weights are the test's own."""

    def __init__(self, weigh: Weigh) -> None:
        super().__init__()
        self.weigh = weigh

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        q, k, v = (
            part.unflatten(2, (HEADS, HEAD)).transpose(1, 2)
            for part in self.attn.qkv(self.norm1(x)).chunk(3, -1)
        )
        y = self.weigh(q @ k.transpose(2, 3) / HEAD**0.5, mask) @ v
        x = x + self.attn.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, weigh: Weigh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(MaskedBlock(weigh) for _ in range(3))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, attention_mask)
        return x[:, 0]


def _by_ten_thousand(logits: Tensor, mask: Tensor) -> Tensor:
    return (logits + (1 - mask[:, None, None].float()) * -10000.0).softmax(-1)


def _half(logits: Tensor, mask: Tensor) -> Tensor:
    low = torch.zeros_like(mask, dtype=logits.dtype).masked_fill(mask == 0, -6e4)
    return (logits + low[:, None, None]).softmax(-1)


def _query_and_key(logits: Tensor, mask: Tensor) -> Tensor:
    """As in DeBERTa: padded queries are hidden too, and then weigh nothing."""
    wide = mask[:, None, None]
    hidden = ~(wide * wide.squeeze(-2).unsqueeze(-1)).bool()
    weights = logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(-1)
    return weights.masked_fill(hidden, 0)


def _in_one_dimension(logits: Tensor, mask: Tensor) -> Tensor:
    """As in BART and Bloom: batch and heads are one dimension, and the mask is [B·H, 1, N]."""
    low = (1.0 - mask.float()) * torch.finfo(logits.dtype).min
    flat = logits.flatten(0, 1) + low.repeat_interleave(HEADS, 0)[:, None]
    return flat.softmax(-1).unflatten(0, (-1, HEADS))


def _truth_as_a_number(logits: Tensor, mask: Tensor) -> Tensor:
    """As in BEiT: a boolean that is added to the logits adds one, and hides nothing."""
    return (logits + mask[:, None, None].bool()).softmax(-1)


HIDES: dict[str, Weigh] = {
    "times -10000": _by_ten_thousand,
    "filled": _half,
    "query and key": _query_and_key,
}


def check_of(weigh: Weigh) -> Check:
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, 9:] = 0
    return Check(Model(weigh), (torch.randn(2, TOKENS, WIDTH), mask)).normal()


@pytest.mark.parametrize("name", HIDES)
def test_padding_is_found_in_every_spelling(name: str) -> None:
    check = check_of(HIDES[name])
    for spec in (MERGE, PRUNE):
        assert faults(make_case(check.original, check.program, spec)) == []


def test_a_boolean_that_is_added_is_a_bias_and_no_padding() -> None:
    check = check_of(_truth_as_a_number).numbers(16)
    for spec in (MERGE, PRUNE):
        assert faults(make_case(check.original, check.program, spec)) == []


def test_padding_with_batch_and_heads_in_one_dimension() -> None:
    check = check_of(_in_one_dimension).numbers(16)
    assert faults(make_case(check.original, check.program, PRUNE)) == []
    with pytest.raises(EffoptError, match="may hide tokens"):
        make_case(check.original, check.program, MERGE)


class Spread(nn.Module):
    """A table of positions [H, N, N], repeated for the batch to [B·H, N, N] and added there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(MaskedBlock(self.weigh) for _ in range(3))
        self.table = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def weigh(self, logits: Tensor, bias: Tensor) -> Tensor:
        return (logits.flatten(0, 1) + bias).softmax(-1).unflatten(0, (-1, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table.repeat(x.shape[0], 1, 1)
        for block in self.blocks:
            x = block(x, bias)
        return x[:, 0]


@pytest.mark.parametrize("spec", [MERGE, PRUNE])
def test_a_table_with_batch_and_heads_in_one_dimension_follows_the_tokens(spec: str) -> None:
    check = Check(Spread(), torch.randn(2, TOKENS, WIDTH)).normal()
    assert faults(make_case(check.original, check.program, spec)) == []
