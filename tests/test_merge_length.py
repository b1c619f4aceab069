"""merge-tokens on texts: dynamic length, and padding that must not change anything."""

import pytest
import torch
from torch import Tensor

from tests import blocks, zoo
from tests.check import agree
from tests.eager import merge
from tests.programs import Inputs, made, reduced, run
from tests.thin import thin

ULPS = 32
"""Of the largest value, against the oracle in double precision: K for dot products of K = 32 terms.
Measured: at most 6."""
DYNAMIC = ("batch", "length")


def oracle(name: str, inputs: Inputs, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Merge in order; where the length is free, two tokens always stay."""
    protected = 0 if name == "bert_tokens" else 1
    steps = {block: merge(r, protected, ordered=True, least=2) for block, r in enumerate(counts)}
    return blocks.reference(name, made(name)[0], inputs, steps)


def padded_to(inputs: Inputs, length: int) -> Inputs:
    """Add padding at the end."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    more = length - ids.shape[1]
    return {
        "input_ids": torch.nn.functional.pad(ids, (0, more), value=1),
        "attention_mask": torch.nn.functional.pad(mask, (0, more)),
    }


@pytest.mark.parametrize("batch", thin([1, 3, 7]))
@pytest.mark.parametrize("length", [12, 25])
@pytest.mark.parametrize("name", ["bert", "roberta", "bert_tokens"])
def test_other_lengths_and_batches_agree_with_the_oracle(
    name: str, length: int, batch: int
) -> None:
    program, notes = reduced(name, "merge-tokens{r=2}", *DYNAMIC)
    assert notes[0] == "block 0: 2 tokens merge, at most half of what may leave"
    inputs = zoo.texts(batch, length, tuple(length - 2 * row % 5 for row in range(batch)))
    got, want = run(program, inputs), oracle(name, inputs, (2, 2, 2))
    seen = inputs["attention_mask"] == 1
    if name == "bert_tokens":
        got, want = (got[0][seen],), (want[0][seen],)
    agree(got, want, ULPS)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("name", ["bert", "bert_tokens"])
def test_short_texts_lose_at_most_half(name: str, length: int) -> None:
    program, _ = reduced(name, "merge-tokens{r=2}", *DYNAMIC)
    inputs = zoo.texts(3, length, (length, length, length))
    agree(run(program, inputs), oracle(name, inputs, (2, 2, 2)), ULPS)


@pytest.mark.parametrize("name", ["bert", "bert_tokens", "roberta"])
def test_padding_added_at_the_end_changes_nothing(name: str) -> None:
    program, _ = reduced(name, "merge-tokens{r=2}", *DYNAMIC)
    inputs = zoo.texts(3, 16, (16, 13, 14))
    plain = run(program, inputs)
    for length in (17, 20, 31):
        longer = run(program, padded_to(inputs, length))
        seen = inputs["attention_mask"] == 1
        if name == "bert_tokens":
            agree([longer[0][:, :16][seen]], [plain[0][seen]], ULPS)
        else:
            agree(longer, plain, ULPS)


def test_what_stands_at_padding_changes_nothing() -> None:
    program, _ = reduced("bert", "merge-tokens{r=6}")
    inputs = zoo.texts(3, 16, (16, 9, 4))
    other = dict(inputs)
    other["input_ids"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 77)
    for a, b in zip(run(program, inputs), run(program, other), strict=True):
        assert torch.equal(a, b)


def test_a_sample_with_nothing_but_its_class_token_is_finite() -> None:
    program, _ = reduced("bert", "merge-tokens{r=6}")
    inputs = zoo.texts(2, 16, (16, 1))
    agree(run(program, inputs), oracle("bert", inputs, (6, 6, 6)), ULPS)
