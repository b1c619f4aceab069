"""exit-early: the graph it makes, and what rows get at which exit, also by a reference by hand."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.functional import linear

from effopt.calibration import read_calibration
from effopt.capture import capture
from effopt.exits import NEVER, set_thresholds
from effopt.passes.exit_early import ExitEarly
from effopt.passes.exit_fit import returning
from effopt.program import Program
from effopt.target import target
from tests.check import NORMAL, Check
from tests.exit_nets import (
    TOKENS,
    Net,
    check,
    data,
    exited,
    exits_in,
    head_of,
    logits,
    record_of,
    zoo,
)
from tests.programs import apply, draw, made, normal, run


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave thresholds at infinity, where the pass puts them: what it does last is another test."""
    monkeypatch.delattr(ExitEarly, "finish")


# --- the graph --------------------------------------------------------------------------------

BEFORE = """
x[batch, 6, 4]
sym_size_int_1 = sym_size(x, 0)
expand[batch, 1, 4] = expand(@cls, [sym_size_int_1, -1, -1])
cat[batch, 7, 4] = cat([expand, x], 1)
linear[batch, 7, 4] = linear(cat, @qk.weight)
unsqueeze[batch, 1, 7, 4] = unsqueeze(linear, 1)
scaled_dot_product_attention[batch, 1, 7, 4] =
    scaled_dot_product_attention(unsqueeze, unsqueeze, unsqueeze)
squeeze[batch, 7, 4] = squeeze(scaled_dot_product_attention, 1)
add[batch, 7, 4] = add(cat, squeeze)
linear_1[batch, 7, 4] = linear(add, @up.weight)
add_1[batch, 7, 4] = add(add, linear_1)
linear_2[batch, 7, 4] = linear(add_1, @qk.weight)
unsqueeze_1[batch, 1, 7, 4] = unsqueeze(linear_2, 1)
scaled_dot_product_attention_1[batch, 1, 7, 4] =
    scaled_dot_product_attention(unsqueeze_1, unsqueeze_1, unsqueeze_1)
squeeze_1[batch, 7, 4] = squeeze(scaled_dot_product_attention_1, 1)
add_2[batch, 7, 4] = add(add_1, squeeze_1)
linear_3[batch, 7, 4] = linear(add_2, @up.weight)
add_3[batch, 7, 4] = add(add_2, linear_3)
layer_norm[batch, 7, 4] = layer_norm(add_3, [4], None, None, 1e-05, False)
select[batch, 4] = select(layer_norm, 1, 0)
linear_4[batch, 3] = linear(select, @head.weight, @head.bias)
return linear_4
"""

HEAD = """add_1[batch, 7, 4] = add(add, linear_1)
select_int[batch, 4] = select(add_1, 1, 0)
mean_dim[batch, 4] = mean(add_1, [1])
cat_default[batch, 8] = cat([select_int, mean_dim], 1)
linear_default[batch, 3] = linear(cat_default, @exit1_weight, @exit1_bias)
exit_score_default[batch] = exit_score([linear_default], margin)
"""

LENS = """add_1[batch, 7, 4] = add(add, linear_1)
linear_default[batch, 7, 4] = linear(add_1, @exit1_weight, @exit1_bias)
layer_norm_1[batch, 7, 4] = layer_norm(linear_default, [4], None, None, 1e-05, False)
select_1[batch, 4] = select(layer_norm_1, 1, 0)
linear_5[batch, 3] = linear(select_1, @head.weight, @head.bias)
exit_score_default[batch] = exit_score([linear_5], margin)
"""

END = """exit_index[batch] = exit_index([exit_score_default], @tau, {form})
choose_exit_default[batch, 3] = choose_exit([{answer}, linear_4], exit_index)
return choose_exit_default, exit_index
"""


@pytest.mark.parametrize(
    ("options", "head", "answer", "form"),
    [
        ("cuts=1", HEAD, "linear_default", "compact"),
        ("cuts=[0],head=lens,lower=compact", LENS, "linear_5", "compact"),
    ],
)
def test_an_exit_is_a_head_and_a_score_behind_its_block(
    options: str, head: str, answer: str, form: str
) -> None:
    after = BEFORE.replace("add_1[batch, 7, 4] = add(add, linear_1)\n", head)
    after = after.replace("return linear_4\n", END.format(form=form, answer=answer))
    tester = check(blocks=2).before(BEFORE)
    tester.run(f"exit-early{{epsilon=0.05,{options}}}").after(after)


def test_what_was_done_is_said() -> None:
    tester = check(blocks=2)
    found = record_of(tester, "cuts=1")
    (row,) = found.facts["exits"]
    assert found.notes == (
        "block 0, at 50% of the work: a ridge head on the first token and the mean, agrees with "
        f"the model on {row['agreement']:.1%} of held-out samples",
    )
    assert row.pop("agreement") >= 0.75  # 8 rows; all agreed
    assert row == {
        "block": 0,
        "path": "",
        "share": pytest.approx(0.495, abs=1e-3),
        "head": "ridge",
        "reads": "the first token and the mean",
        "lambda": row["lambda"],
        "fit_rows": 72,  # of 200, 0.4 fit, and a tenth of those choose
    }
    assert found.facts["outputs"] == [found.facts["scored"]] == list(row["lambda"])
    assert found.facts["position"] is None


def test_the_lowering_follows_the_target() -> None:
    tester = check()
    tester.program = replace(tester.program, target=target("a100"))
    assert exits_in(tester.run("exit-early{epsilon=0.05}").program).form == "split"
    assert exits_in(exited()).form == "compact"


# --- rows -------------------------------------------------------------------------------------


def tuple_of(net: Net, x: Tensor) -> Any:
    return x.mean(1), net.head(x[:, 0])


def dict_of(net: Net, x: Tensor) -> Any:
    return {"logits": net.head(x[:, 0]), "embedding": x[:, 0]}


@pytest.mark.parametrize("read", [logits, tuple_of, dict_of])
def test_outputs_stay_as_they_are_and_the_exit_stands_beside_them(read: Callable[..., Any]) -> None:
    x = torch.randn(5, TOKENS, 4)
    net, program = check(read).model, exited(read)
    want, got = net(x), program(x)
    if isinstance(want, dict):
        assert list(got) == [*want, "exit_index"]
        want, got = tuple(want.values()), tuple(got.values())
    *outputs, index = got
    for a, b in zip(want if isinstance(want, tuple) else (want,), outputs, strict=True):
        assert torch.equal(a, b), "bit for bit"
    assert index.tolist() == [3] * 5


def test_an_output_that_is_ready_earlier_is_left_alone() -> None:
    class Early(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x.mean(1)

    tester = Check(Early(logits), torch.randn(2, TOKENS, 4)).normal()
    tester.program.calibration = read_calibration(data(), tester.program)
    found = tester.run("exit-early{epsilon=0.05}").records[-1].facts
    assert len(found["outputs"]) == 1
    x = torch.randn(3, TOKENS, 4)
    set_thresholds(tester.program, [-NEVER] * 2)
    assert torch.equal(tester.program.run((x,))[1], x.mean(1))


@pytest.mark.parametrize("name", ["vit", "bert_tokens"])
def test_no_row_leaves_at_infinity_and_every_row_at_the_first_exit_below(name: str) -> None:
    program, given = zoo(name), draw(name, 3)
    for a, b in zip(run(normal(name), given), run(program, given)[:-1], strict=True):
        assert torch.equal(a, b), "bit for bit"
    exits = exits_in(program)
    first = returning(program, list(exits.exits[0].answers.values()))
    fork = program.fork()
    set_thresholds(fork, [-NEVER, -NEVER])
    *outputs, index = run(fork, given)
    assert index.tolist() == [1, 1, 1]
    for a, b in zip(first.run(fork.flatten((), dict(given))), outputs, strict=True):
        assert torch.equal(a, b)
    set_thresholds(program, [NEVER, NEVER])


# --- against a reference by hand --------------------------------------------------------------


def by_hand(
    answers: Sequence[Tensor], scores: Sequence[Tensor], tau: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Compute every answer, and take the first whose score reaches its threshold."""
    out, index = answers[-1], torch.full((len(answers[-1]),), len(answers))
    for place in reversed(range(len(tau))):
        leaves = scores[place] >= tau[place]
        out = torch.where(leaves.reshape(-1, *[1] * (out.ndim - 1)), answers[place], out)
        index = torch.where(leaves, place + 1, index)
    return out, index


def margin(z: Tensor) -> Tensor:
    first, second = z.sort(-1, descending=True).values.unbind(-1)[:2]
    return first - second


def thresholds_between(scores: Sequence[Tensor]) -> list[float]:
    """Thresholds that some rows reach and others do not."""
    return [float(one.median()) for one in scores]


def test_a_classifier_of_padded_text_agrees_with_a_reference_by_hand() -> None:
    program, given = zoo("bert").fork(), draw("bert", 7, seed=100)
    model = made("bert")[0]
    with torch.no_grad():
        seen = model(**given, output_hidden_states=True)
        answers = [linear(seen.hidden_states[n][:, 0], *head_of(program, n)) for n in (1, 2)]
    scores = [margin(z) for z in answers]
    tau = thresholds_between(scores)
    want, index = by_hand([*answers, seen.logits], scores, tau)
    set_thresholds(program, [t - 1e-5 for t in tau])  # the medians themselves are met
    got, at = run(program, given)
    assert at.tolist() == index.tolist()
    assert len(set(index.tolist())) > 1
    assert (got - want).abs().max() < 2e-6  # measured 0; values are up to 0.6
    set_thresholds(program, [NEVER, NEVER])


@functools.cache
def llama() -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 40},
        max_position_embeddings=64,
    )
    model = tf.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 40, (2, 9))
    program = capture(model, {"input_ids": ids}, dynamic=("batch",))
    program, _ = apply(program, NORMAL)
    texts = [{"input_ids": torch.randint(0, 40, (20, 9))} for _ in range(8)]
    program.calibration = read_calibration(texts, program)
    return model, program


def test_a_causal_language_model_is_scored_at_the_last_token() -> None:
    model, program = llama()
    program, _ = apply(program, "exit-early{epsilon=0.05,cuts=1}")
    ids = torch.randint(0, 40, (8, 9))
    with torch.no_grad():
        seen = model(ids, output_hidden_states=True, use_cache=False)
        mapped = linear(seen.hidden_states[1], *head_of(program, 1))
        answers = [model.lm_head(model.model.norm(mapped))]
    scores = [margin(answers[0][:, -1])]
    tau = thresholds_between(scores)
    want, index = by_hand([*answers, seen.logits], scores, tau)
    set_thresholds(program, [t - 1e-6 for t in tau])
    got, at = program.run((ids,))
    assert at.tolist() == index.tolist()
    assert len(set(index.tolist())) > 1
    assert (got - want).abs().max() < 2e-6  # measured 0; values are up to 0.3
