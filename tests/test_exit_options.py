"""exit-early: scores, heads, what heads read, and where exits go, as the options say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.backends.kernels.exit_index import FORMS
from effopt.backends.kernels.exit_score import KINDS
from effopt.calibration import read_calibration
from effopt.exits import NEVER, set_thresholds
from effopt.passes.exit_early import LOWER, SCORES, ExitEarly
from effopt.passes.exit_fit import returning
from tests.check import Check
from tests.exit_nets import TOKENS, Net, check, data, exited, exits_in, head_of, logits, record_of


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave thresholds at infinity, where the pass puts them: what it does last is another test."""
    monkeypatch.delattr(ExitEarly, "finish")


def test_the_options_are_those_of_the_operators() -> None:
    assert set(SCORES) == set(KINDS)
    assert ("auto", *FORMS) == LOWER


def test_patience_counts_the_exits_that_agree() -> None:
    program = exited(spec="score=patience")
    exits = exits_in(program)
    assert [len(one.score.args[0]) for one in exits.exits] == [1, 2]  # type: ignore[arg-type]
    scores = returning(program, [one.score for one in exits.exits]).run(tuple(data(20)))
    assert scores[0].tolist() == [1.0] * 20
    assert set(scores[1].tolist()) <= {1.0, 2.0}


def test_saturation_compares_what_heads_read_with_the_block_before() -> None:
    program = exited(spec="score=saturation,cuts=[1]")
    values = exits_in(program).exits[0].score.args[0]
    before, now, score = returning(program, [*values, exits_in(program).exits[0].score]).run(  # type: ignore[misc]
        tuple(data(20))
    )
    assert before.shape == now.shape == (20, 8)
    want = torch.cosine_similarity(before, now)
    assert (score - want).abs().max() < 1e-6  # measured 1.2e-7


def test_a_shared_head_has_one_weight_for_all_exits() -> None:
    program = exited(spec="shared=true")
    heads = [one.answers["output"] for one in exits_in(program).exits]
    assert heads[0].args[1:] == heads[1].args[1:]
    rows = record_of(check(), "shared=true").facts["exits"]
    assert [row["fit_rows"] for row in rows] == [144, 144]


def test_features_can_be_normalized() -> None:
    text = exited(spec="norm=true,cuts=[0]").text()
    assert "layer_norm_default" in text
    assert "linear(layer_norm_default, @exit1_weight" in text


def test_a_model_in_half_precision_has_heads_and_scores_in_single() -> None:
    half = torch.bfloat16
    tester = Check(Net(logits).to(half), torch.randn(2, TOKENS, 4, dtype=half)).normal()
    batches = [batch.to(half) for batch in data()]
    tester.program.calibration = read_calibration(batches, tester.program)
    program = tester.run("exit-early{epsilon=0.05}").program
    assert head_of(program, 1)[0].dtype == torch.float32
    scored = exits_in(program).exits[0].score.args[0][0]  # type: ignore[index]
    assert scored.meta["val"].dtype == torch.float32
    set_thresholds(program, [-NEVER] * 2)
    assert program.run((batches[0],))[0].dtype == half


def test_a_batch_of_fixed_size() -> None:
    tester = Check(Net(logits), torch.randn(4, TOKENS, 4), dynamic=()).normal()
    tester.program.calibration = read_calibration(data(200, 4), tester.program)
    row = record_of(tester, "cuts=1").facts["exits"][0]
    free = record_of(check(), "cuts=1").facts["exits"][0]
    assert row["fit_rows"] == free["fit_rows"]
    assert row["lambda"] == free["lambda"]


@pytest.mark.parametrize(
    ("read", "reads"),
    [
        (logits, "the first token and the mean"),
        (lambda net, x: net.head(x.mean(1)), "the mean"),
        (lambda net, x: net.head(x[:, -1]), "the last token and the mean"),
        (lambda net, x: net.head(x[:, 0] + x[:, 2]), "the first token and token 2 and the mean"),
        (lambda net, x: net.head(x), "every token"),
    ],
)
def test_heads_read_what_outputs_read(read: Callable[..., Any], reads: str) -> None:
    found = record_of(check(read), "cuts=1").facts["exits"][0]
    assert found["reads"] == reads
    assert found["head"] == ("lens" if reads == "every token" else "ridge")


def test_the_mean_is_not_read_where_attention_hides_tokens() -> None:
    seen = torch.ones(TOKENS + 1, TOKENS + 1, dtype=torch.bool).tril()
    found = record_of(check(lambda net, x: net.head(x[:, -1]), seen=seen), "cuts=1")
    assert found.facts["exits"][0]["reads"] == "the last token"


@pytest.mark.parametrize("pool", ["first", "last", "mean", "first-mean"])
def test_what_heads_read_can_be_said(pool: str) -> None:
    words = {"first": "first token", "last": "last token", "mean": "mean"}
    found = record_of(check(), f"cuts=1,pool={pool}").facts["exits"][0]["reads"]
    assert found == " and ".join(f"the {words[part]}" for part in pool.split("-"))


def test_outputs_of_other_ranks_have_heads_of_their_own() -> None:
    def read(net: Net, x: Tensor) -> Any:
        table = net.head(x[:, 0])
        return {"one": table[:, 0], "pairs": torch.stack([table, table + 1], 1), "logits": table}

    program = exited(read)
    x = torch.randn(4, TOKENS, 4)
    set_thresholds(program, [-NEVER] * 2)
    got = program(x)
    assert got["one"].shape == (4,)
    assert got["pairs"].shape == (4, 2, 3)
    assert record_of(check(read), "cuts=1").facts["scored"] == "pairs"


def test_polish_agrees_as_often_at_least() -> None:
    plain, polished = (
        [row["agreement"] for row in record_of(check(), spec).facts["exits"]]
        for spec in ("cuts=2", "cuts=2,polish=30")
    )
    assert all(b >= a for a, b in zip(plain, polished, strict=True))


def test_exits_are_spread_by_work_or_named() -> None:
    def blocks(spec: str, count: int) -> list[int]:
        rows = record_of(check(blocks=count), spec).facts["exits"]
        return [row["block"] for row in rows]

    assert blocks("cuts=1", 4) == [1]
    assert blocks("cuts=2", 6) == [1, 3]
    assert blocks("cuts=3", 4) == [0, 1, 2]
    assert blocks("cuts=[2,0]", 4) == [0, 2]
