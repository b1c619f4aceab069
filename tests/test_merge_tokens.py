"""merge-tokens on models of the zoo: agreement with the eager oracle, schedules, no-ops, text."""

import pytest
import torch
from torch import Tensor

from effopt.errors import EffoptError, UsageError
from effopt.passes.merge_tokens import MergeTokens
from effopt.passes.schedule import linear
from tests import blocks, eager
from tests.check import Check, agree, text
from tests.programs import draw, made, normal, reduced, run, without_padding
from tests.thin import thin

PROTECTED = {
    **{"vit": 1, "deit": 2, "dinov2": 1, "clip_vision": 1, "bert": 1, "bert_tokens": 0},
    **{"roberta": 1, "encoder": 0, "encoder_padded": 0},
}
PADDED = ("bert", "bert_tokens", "roberta", "encoder_padded")
ULPS = 32
"""Of the largest value, against the oracle in double precision: K for dot products of K = 32 terms.
Measured over all cases here: at most 9.6."""

SPECS = {
    "merge-tokens{r=2}": (2, 2, 2),
    "merge-tokens{r=2,schedule=linear,inflect=-1}": (4, 2, 0),
    "merge-tokens{r=[3,0,4]}": (3, 0, 4),
    "merge-tokens{r=5,sites=[1]}": (0, 5, 0),
    "merge-tokens{r=[4,1],sites=[0,2]}": (4, 0, 1),
    "merge-tokens{r=3,first=1,last=-2}": (0, 3, 0),
    "merge-tokens{r=6}": (6, 6, 6),
}


def oracle(
    name: str, inputs: dict[str, Tensor], counts: tuple[int, ...], proportional: bool = True
) -> tuple[Tensor, ...]:
    ordered = name in PADDED
    steps = {block: eager.merge(r, PROTECTED[name], ordered) for block, r in enumerate(counts) if r}
    return blocks.reference(name, made(name)[0], inputs, steps, proportional)


@pytest.mark.parametrize("spec", thin(SPECS))
@pytest.mark.parametrize("name", PROTECTED)
def test_merging_agrees_with_the_eager_oracle(name: str, spec: str) -> None:
    program, _ = reduced(name, spec)
    for batch in (1, 5):
        inputs = draw(name, batch)
        got, want = run(program, inputs), oracle(name, inputs, SPECS[spec])
        assert all(out.isfinite().all() for out in got)
        agree(without_padding(got, inputs), without_padding(want, inputs), ULPS)


@pytest.mark.parametrize("name", ["dinov2", "bert"])
def test_without_proportional_attention_sizes_only_hide_padding(name: str) -> None:
    program, _ = reduced(name, "merge-tokens{r=3,proportional=false}")
    inputs = draw(name, 5)
    agree(run(program, inputs), oracle(name, inputs, (3, 3, 3), proportional=False), ULPS)
    both = (run(reduced(name, "merge-tokens{r=3}")[0], inputs)[0], run(program, inputs)[0])
    assert (both[0] - both[1]).abs().max() > 1e-3, "the option would have no effect"


@pytest.mark.parametrize("name", PROTECTED)
def test_the_oracle_without_reductions_is_the_model(name: str) -> None:
    model, inputs = made(name)
    with torch.no_grad():
        want = [x for x in _leaves(model(**inputs)) if x is not None]
    agree([x.float() for x in blocks.reference(name, model, inputs, {})], want, ULPS)


def _leaves(output: object) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output.to_tuple())  # type: ignore[attr-defined]


def test_at_later_sites_at_most_half_of_the_unprotected_leave() -> None:
    assert reduced("vit", "merge-tokens{r=8}")[1] == (
        "block 0: 17 -> 9 tokens",
        "block 1: 9 -> 5 tokens",
        "block 2: 5 -> 3 tokens",
    )
    assert reduced("deit", "merge-tokens{r=8}")[1] == (
        "block 0: 18 -> 10 tokens",
        "block 1: 10 -> 6 tokens",
        "block 2: 6 -> 4 tokens",
    )
    assert reduced("bert", "merge-tokens{r=8}")[1] == (
        "block 0: 16 -> 9 tokens",
        "block 1: 9 -> 5 tokens",
        "block 2: 5 -> 3 tokens",
    )


def test_a_share_is_of_the_tokens_at_its_site() -> None:
    assert reduced("vit", "merge-tokens{r=0.25,sites=[0,1]}")[1] == (
        "block 0: 17 -> 13 tokens",
        "block 1: 13 -> 10 tokens",
    )


def test_depths_name_the_usable_block_at_that_share() -> None:
    assert reduced("vit", "merge-tokens{r=1,sites=[0.0,0.67]}")[1] == (
        "block 0: 17 -> 16 tokens",
        "block 2: 16 -> 15 tokens",
    )


def test_linear_schedule_is_that_of_the_paper() -> None:
    assert linear(13, -1.0, 12) == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]
    assert linear(8, 0.0, 3) == [8, 8, 8]
    assert linear(13, 1.0, 12) == [0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 26]


def test_linear_schedule_is_not_ignored_for_shares() -> None:
    constant = reduced("vit", "merge-tokens{r=0.2}")[1]
    try:
        linear_ = reduced("vit", "merge-tokens{r=0.2,schedule=linear,inflect=-1}")[1]
    except UsageError:
        return
    assert linear_ != constant


def test_linear_schedule_never_asks_for_less_than_nothing() -> None:
    try:
        notes = reduced("vit", "merge-tokens{r=3,schedule=linear,inflect=2}")[1]
    except UsageError:
        return
    assert notes[0] == "block 0: 17 -> 17 tokens"


def test_counts_belong_to_the_blocks_they_are_written_with() -> None:
    try:
        notes = reduced("vit", "merge-tokens{r=[2,1],sites=[1,0]}")[1]
    except UsageError:
        return
    assert notes == ("block 0: 17 -> 16 tokens", "block 1: 16 -> 14 tokens")


@pytest.mark.parametrize("range_", ["first=9", "first=2,last=1"])
def test_a_range_without_blocks_gives_its_reason(range_: str) -> None:
    try:
        program, notes = reduced("vit", f"merge-tokens{{r=1,{range_}}}")
    except EffoptError:
        return
    assert text(program) == text(normal("vit"))
    assert notes, "a pass that does nothing says why"


def test_merging_nothing_leaves_graph_and_outputs_as_they_are() -> None:
    check = Check(*made("vit")).normal()
    before = text(check.program)
    check.run("merge-tokens{r=0}").kept("r = 0: nothing to merge").before(before)
    check.run(MergeTokens(r=(0, 0, 0))).kept("r = 0: nothing to merge")
    for got, want in zip(check.program.run(check.program.samples), check.want, strict=True):
        assert torch.equal(got, want)


def test_one_program_serves_every_batch_and_order_of_samples() -> None:
    program, _ = reduced("deit", "merge-tokens{r=2}")
    inputs = draw("deit", 7)
    turned = {key: x.flip(0) for key, x in inputs.items()}
    for a, b in zip(run(program, inputs), run(program, turned), strict=True):
        agree([b.flip(0)], [a], ULPS)


def test_r_of_a_wrong_kind_is_told() -> None:
    with pytest.raises(UsageError, match="r of merge-tokens is -1"):
        MergeTokens(r=-1)
    with pytest.raises(UsageError, match=r"r of merge-tokens is 1\.5"):
        MergeTokens(r=1.5)
    with pytest.raises(UsageError, match="r lists 2 values for 3 sites"):
        reduced("vit", "merge-tokens{r=[1,2]}")
