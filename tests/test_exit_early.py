"""exit-early: the graph it makes, what rows get at which exit, what it refuses, what composes."""

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from textwrap import dedent
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from effopt.backends.kernels.exit_index import FORMS
from effopt.backends.kernels.exit_score import KINDS
from effopt.calibration import read_calibration
from effopt.capture import capture
from effopt.errors import PreconditionError, UsageError
from effopt.exits import NEVER, Exits, find_exits, set_thresholds
from effopt.passes.exit_early import LOWER, SCORES, ExitEarly
from effopt.passes.exit_fit import returning
from effopt.pipeline import parse_passes
from effopt.program import Program
from effopt.report import StepRecord
from effopt.target import target
from tests.check import NORMAL, Check
from tests.programs import apply, draw, made, normal, run

TOKENS = 6


class Net(nn.Module):
    """A class token ahead of six, residual attention and a layer in each block; and a read."""

    def __init__(self, read: Callable[..., Any], blocks: int = 3, seen: Tensor | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.qk, self.up = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.cls, self.head = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 3)
        self.read, self.blocks, self.seen = read, blocks, seen

    def forward(self, x: Tensor) -> Any:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        for _ in range(self.blocks):
            h = self.qk(x).unsqueeze(1)
            x = x + scaled_dot_product_attention(h, h, h, self.seen).squeeze(1)
            x = x + self.up(x)
        return self.read(self, layer_norm(x, [4]))


def logits(net: Net, x: Tensor) -> Tensor:
    return net.head(x[:, 0])


def data(count: int = 200, batch: int = 20) -> list[Tensor]:
    given = torch.randn(count, TOKENS, 4, generator=torch.Generator().manual_seed(7))
    return list(given.split(batch))


def check(read: Callable[..., Any] = logits, count: int = 200, **options: Any) -> Check:
    """A small model in normal form, with samples to calibrate on."""
    return copy.copy(_checked(read, count, **options))


@functools.cache
def _checked(read: Callable[..., Any], count: int, **options: Any) -> Check:
    tester = Check(Net(read, **options), torch.randn(2, TOKENS, 4)).normal()
    if count:
        tester.program.calibration = read_calibration(data(count), tester.program)
    return tester


def exited(read: Callable[..., Any] = logits, spec: str = "cuts=2") -> Program:
    return check(read).run(f"exit-early{{epsilon=0.05,{spec}}}").program


def record_of(tester: Check, spec: str) -> StepRecord:
    return tester.run(f"exit-early{{epsilon=0.05,{spec}}}").records[-1]


def exits_in(program: Program) -> Exits:
    found = program.get(find_exits)
    assert found is not None
    return found


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
        ("cuts=1", HEAD, "linear_default", "if"),
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
        "no row leaves until thresholds are calibrated",
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
    assert exits_in(exited()).form == "if"


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


@functools.cache
def zoo(name: str, spec: str = "exit-early{epsilon=0.05}") -> Program:
    """A zoo model with exits; it has 182 samples."""
    program = normal(name).fork()
    batches = [draw(name, 7, seed=seed) for seed in range(26)]
    program.calibration = read_calibration(batches, program)
    return apply(program, spec)[0]


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


def head_of(program: Program, place: int) -> tuple[Tensor, Tensor]:
    """The weight and bias of an exit's head."""
    node = next(n for n in program.nodes() if str(n.target) == f"exit{place}_weight")
    reader = next(iter(node.users))
    return program.weight(node), program.weight(reader.args[2])  # type: ignore[arg-type]


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


# --- scores, heads and pools ------------------------------------------------------------------


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


# --- with other passes ------------------------------------------------------------------------

SPEC = "exit-early{epsilon=0.05}"


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("vit", "prune-tokens{keep=0.5}"),
        ("vit", "merge-tokens{r=2},quantize{scheme=int8-dynamic,least=8}"),
        ("bert_tokens", "merge-tokens{r=2},quantize{scheme=int8-dynamic,least=8}"),
    ],
)
def test_what_follows_does_to_the_model_what_it_does_without_exits(name: str, rest: str) -> None:
    both, given = zoo(name, f"{SPEC},{rest}"), draw(name, 3)
    alone, _ = apply(replace(normal(name), calibration=both.calibration), rest)
    *outputs, index = run(both, given)
    for a, b in zip(run(alone, given), outputs, strict=True):
        assert torch.equal(a, b), "bit for bit"
    assert index.tolist() == [3, 3, 3]
    set_thresholds(both, [-NEVER] * 2)
    early = run(both, given)
    set_thresholds(both, [NEVER] * 2)
    assert early[-1].tolist() == [1, 1, 1]
    # measured 0.007 to 0.23 of the norm: what merged tokens and narrow weights change
    plain = run(returning(zoo(name), list(exits_in(zoo(name)).exits[0].answers.values())), given)
    assert all((a - b).norm() < 0.5 * b.norm() for a, b in zip(early, plain, strict=False))


def test_heads_of_exits_stay_in_float() -> None:
    steps = "quantize{scheme=int8-dynamic,least=8}"
    program, records = run_steps("bert_tokens", f"{SPEC},{steps}")
    left = records[-1].facts["float"]
    assert list(left.values()).count("it is the head of an exit") == 2
    alone = apply(normal("bert_tokens"), steps)[0]
    counted = [sum("quantized" in str(n.target) for n in p.nodes()) for p in (program, alone)]
    assert counted[0] == counted[1]
    taken = run_steps("bert_tokens", f"{SPEC},quantize{{scheme=int8-dynamic,least=8,heads=true}}")
    assert "it is the head of an exit" not in taken[1][-1].facts["float"].values()


def run_steps(name: str, spec: str) -> tuple[Program, tuple[StepRecord, ...]]:
    from effopt.pipeline import Pipeline, Step

    start = replace(normal(name).fork(), calibration=zoo(name).calibration)
    return Pipeline([Step(one) for one in parse_passes(spec)]).run(start)


def test_exits_of_a_pruned_model() -> None:
    program = normal("vit").fork()
    program.calibration = zoo("vit").calibration
    pruned, _ = apply(program, "prune-tokens{keep=0.5,sites=[0]}")
    found, _ = apply(pruned, SPEC)
    given = draw("vit", 3)
    assert torch.equal(run(found, given)[0], run(pruned, given)[0])


# --- refusals ---------------------------------------------------------------------------------


def refuses(tester: Check, message: str, options: str = "epsilon=0.05") -> None:
    """Expect a message; a line indented deeper than its remedy's continues the last."""
    joined = re.sub(r"\n {2,}(?! *remedy)", " ", dedent(message).strip())
    tester.refuses(f"exit-early{{{options}}}", joined)


def test_no_data() -> None:
    refuses(
        check(count=0),
        """
        model: exits are fitted to data and calibrated on it, and there is none
          remedy: pass calibration=, or --calibration FILE
        """,
    )


def test_exits_that_there_are() -> None:
    tester = check().run("exit-early{epsilon=0.05}")
    refuses(
        tester,
        """
        model: there is an output 'exit_index' already
          remedy: insert exits once, and rename an output of that name
        """,
    )


def test_too_few_cuts() -> None:
    refuses(
        check(),
        """
        model: 3 cuts are asked for, and there are 2 (blocks 0, 1)
          remedy: choose fewer or other cuts: `effopt inspect` lists them
        """,
        "cuts=3",
    )
    refuses(
        check(),
        """
        model: there is no cut behind block 2: there are behind 0, 1
          remedy: choose fewer or other cuts: `effopt inspect` lists them
        """,
        "cuts=[0,2]",
    )


def test_no_cut() -> None:
    class Straight(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ torch.ones(4, 3)).mean(1)

    class Towers(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * super().forward(x.flip(1))

    reasons = {
        "there is no attention call, so no block to stop behind": Straight(),
        "the only cut is behind the last block (0)": Net(logits, blocks=1),
        "no value carries all that outputs need: some leave early, or by a way of their own": (
            Towers(logits)
        ),
    }
    for reason, net in reasons.items():
        tester = Check(net, torch.randn(2, TOKENS, 4)).normal()
        refuses(tester, f"model: {reason}\n  remedy: leave exit-early out", "cuts=1")


class Leaving(Net):
    """An output of its own behind the first block."""

    def forward(self, x: Tensor) -> Any:
        first = x + self.up(self.attended(x))
        second = first + self.up(self.attended(first))
        return first[:, 0], self.head(second[:, 0])

    def attended(self, x: Tensor) -> Tensor:
        h = self.qk(x).unsqueeze(1)
        return scaled_dot_product_attention(h, h, h).squeeze(1)


def test_the_last_cut_may_have_blocks_behind_it() -> None:
    tester = Check(Leaving(logits), torch.randn(2, TOKENS, 4)).normal()
    tester.program.calibration = read_calibration(data(), tester.program)
    refuses(
        tester,
        """
        add (add.Tensor) at test_exit_early.py: a lens maps to the value behind the last block,
          where there is no cut
          remedy: use head=ridge
        """,
        "cuts=1,head=lens,epsilon=0.05",
    )
    assert [row["block"] for row in record_of(tester, "cuts=1").facts["exits"]] == [0]


def test_outputs_that_no_head_gives() -> None:
    def label(net: Net, x: Tensor) -> Tensor:
        return net.head(x[:, 0]).argmax(-1)

    refuses(
        check(label),
        """
        argmax (argmax.default) at test_exit_early.py: output 'output' is int64: no head is fitted
          to that
          remedy: let the model return its scores in place of what is read off them
        """,
    )

    def turned(net: Net, x: Tensor) -> Tensor:
        return net.head(x[:, 0]).T

    refuses(
        check(turned),
        """
        numpy_t (numpy_T.default) at test_exit_early.py: the first dimension of output 'output' is
          not the batch
          remedy: let the model return one row for each sample
        """,
    )


def test_an_output_without_classes_is_scored_by_features_alone() -> None:
    def one(net: Net, x: Tensor) -> Tensor:
        return net.head(x[:, 0])[:, :1]

    refuses(
        check(one),
        """
        model: no output gives scores of classes (output)
          remedy: use score=saturation, which compares features
        """,
    )
    found = record_of(check(one), "cuts=[1],score=saturation")
    assert found.facts["exits"][0]["agreement"] is None


def test_saturation_at_the_first_block() -> None:
    refuses(
        check(),
        """
        add_1 (add.Tensor) at test_exit_early.py: saturation compares with the block before, and
          the first exit has none
          remedy: name later cuts, or another score
        """,
        "cuts=[0],score=saturation,epsilon=0.05",
    )


def test_a_ridge_head_for_tokens() -> None:
    refuses(
        check(lambda net, x: net.head(x)),
        """
        linear_6 (linear.default) in head at linear.py: output 'output' has tokens: a ridge head
          gives one answer a sample
          remedy: use head=lens
        """,
        "head=ridge,epsilon=0.05",
    )


def test_pools_that_cannot_be_told() -> None:
    say = "say what heads read (pool=first, last, mean or first-mean), or use head=lens"
    seen = torch.ones(TOKENS + 1, TOKENS + 1, dtype=torch.bool).tril()
    place = "add_5 (add.Tensor) at test_exit_early.py"
    refuses(
        check(lambda net, x: net.head(x.mean(1)), seen=seen),
        f"{place}: outputs average over tokens, and a mask that differs from query to query has "
        f"no merged form\n  remedy: {say}",
    )
    refuses(
        check(lambda net, x: net.head(x[:, :2].flatten(1)[:, :4])),
        f"{place}: outputs neither pick tokens nor average over them\n  remedy: {say}",
    )


def test_a_place_that_inputs_say() -> None:
    class Marked(Net):
        def forward(self, x: Tensor) -> Any:
            place = x[:, :, 0].argmax(1) + 1
            self.read = lambda net, h: net.head(h[torch.arange(h.shape[0]), place])
            return super().forward(x)

    tester = Check(Marked(logits), torch.randn(2, TOKENS, 4)).normal()
    tester.program.calibration = read_calibration(data(), tester.program)
    refuses(
        tester,
        """
        add_6 (add.Tensor) at test_exit_early.py: outputs read a token at a place that the inputs
          say
          remedy: say what heads read (pool=first, last, mean or first-mean), or use head=lens
        """,
    )
    assert record_of(tester, "pool=mean").changed


def test_too_few_samples() -> None:
    refuses(
        check(count=20),
        """
        add_1 (add.Tensor) at test_exit_early.py: a head of 8 features wants as many samples to
          fit, and of the 20 of the calibration data 7 fit
          remedy: give more samples, raise share, or read less (pool=first or mean)
        """,
    )
    refuses(
        check(count=90),
        """
        model: ltt with epsilon=0.05 needs 59 samples to calibrate, and of the 90 of the
          calibration data 54 are left for it
          remedy: give more samples, lower share, or allow a larger epsilon
        """,
    )
    refuses(
        check(count=150),
        """
        model: crc with epsilon=0.01 needs 99 samples to calibrate, and of the 150 of the
          calibration data 90 are left for it
          remedy: give more samples, lower share, or allow a larger epsilon
        """,
        "rule=crc",
    )


def test_too_few_tokens_for_a_lens() -> None:
    refuses(
        check(count=2),
        """
        add_5 (add.Tensor) at test_exit_early.py: 0 rows that are no padding fit a head of 4
          features
          remedy: give more calibration samples
        """,
        "head=lens,epsilon=0.9,rule=crc,share=0.2",
    )


def test_polish_of_a_lens() -> None:
    refuses(
        check(lambda net, x: net.head(x)),
        """
        add_1 (add.Tensor) at test_exit_early.py: polish trains ridge heads, and outputs have
          tokens, which a lens serves
          remedy: leave polish out
        """,
        "polish=5,epsilon=0.05",
    )


def test_values_that_are_no_numbers() -> None:
    tester = check(lambda net, x: net.head(x[:, 0]) / 0 * 0)
    with pytest.raises(PreconditionError, match="NaN or infinity"):
        tester.run("exit-early{epsilon=0.05}")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"score": "margins"}, "unknown score 'margins'"),
        ({"head": "linear"}, "unknown head 'linear'"),
        ({"pool": "max"}, "unknown pool 'max'"),
        ({"rule": "naive"}, "unknown rule 'naive'"),
        ({"loss": "mse"}, "unknown loss 'mse'"),
        ({"reference": "labels"}, "unknown reference 'labels'"),
        ({"unit": "batch"}, "unknown unit 'batch'"),
        ({"lower": "loop"}, "unknown lower 'loop'"),
        ({"cuts": 0}, "cuts is 0"),
        ({"cuts": ()}, "cuts is ()"),
        ({"cuts": (1, 1)}, "cuts is (1, 1)"),
        ({"cuts": (-1,)}, "cuts is (-1,)"),
        ({"share": 1.0}, "share is 1.0"),
        ({"polish": -1}, "polish is -1"),
        ({"head": "lens", "pool": "mean"}, "a lens reads every token, and pool is mean"),
        ({"head": "lens", "polish": 9}, "polish trains ridge heads, and head is lens"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        ExitEarly(**options)
    assert caught.value.reason == reason
    assert caught.value.remedy


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"epsilon": 2.0}, {"delta": 0.0}])
def test_promises_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ExitEarly(**options)


def test_a_rule_without_delta_does_not_read_it() -> None:
    assert ExitEarly(rule="crc", delta=7.0).level is None
