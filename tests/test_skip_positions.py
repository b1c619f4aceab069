"""skip-positions: budgets by position, against loops in torch over real models; what it refuses."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from effopt.backend import as_array
from effopt.calibration import read_calibration
from effopt.capture import capture
from effopt.cuts import find_cuts
from effopt.errors import PreconditionError, UsageError
from effopt.exits import find_exits, without_exits
from effopt.passes.skip_positions import SkipPositions
from effopt.program import Program
from tests import exited
from tests.check import NORMAL, Check, agree
from tests.programs import apply, normal, run

WIDTH, TOKENS, LAYERS = 16, 9, 4
HALF = "skip-positions{least=0.5}"
RAN = [9, 1, 5, 9]
"""How many of nine tokens run through each of four blocks, where the last runs through half."""


class Net(nn.Module):
    """Blocks of attention that looks back, if `causal`, and of what `inner` makes of the stream."""

    def __init__(
        self, inner: Callable[[Tensor], Tensor] = torch.tanh, causal: bool = True, blocks: int = 3
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qk = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(blocks))
        self.inner, self.causal, self.head = inner, causal, nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for qk in self.qk:
            h = qk(x).unsqueeze(1)
            x = x + scaled_dot_product_attention(h, h, h, is_causal=self.causal).squeeze(1)
            x = x + self.inner(x)
        return self.head(x)


def check(**options: Any) -> Check:
    dynamic = options.pop("dynamic", ("batch",))
    return Check(Net(**options), torch.randn(2, 5, 4), dynamic=dynamic).normal()


# --- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [0.1, 0.25, 0.4, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("blocks", [2, 3, 4, 12, 32])
def test_budgets_fall_linearly_and_are_spent_on_the_first_and_the_last_blocks(
    least: float, blocks: int
) -> None:
    tokens, budgeted = 50, SkipPositions(least=least)
    ran = [budgeted.ran(block, blocks, tokens) for block in range(blocks)]
    assert ran[0] == ran[-1] == tokens
    assert ran[1:] == sorted(ran[1:])
    for place in range(tokens):
        own = [place < count for count in ran]
        budget = int(blocks * (1 - (1 - least) * place / (tokens - 1)) + 1e-6)
        budget = max(budget, min(blocks, 2))
        assert own == [n == 0 or n > blocks - budget for n in range(blocks)], place


@pytest.mark.parametrize("least", [0.0, -1.0, 1.5, True])
def test_a_share_out_of_range(least: float) -> None:
    with pytest.raises(UsageError) as caught:
        SkipPositions(least=least)
    assert caught.value.remedy == "give a share above 0, up to 1"


# --- the graph --------------------------------------------------------------------------------

AFTER = """
x[batch, 5, 4]
linear[batch, 5, 4] = linear(x, @qk.0.weight)
unsqueeze[batch, 1, 5, 4] = unsqueeze(linear, 1)
scaled_dot_product_attention[batch, 1, 5, 4] =
    scaled_dot_product_attention(unsqueeze, unsqueeze, unsqueeze, None, 0.0, True)
squeeze[batch, 5, 4] = squeeze(scaled_dot_product_attention, 1)
add[batch, 5, 4] = add(x, squeeze)
tanh[batch, 5, 4] = tanh(add)
add_1[batch, 5, 4] = add(add, tanh)
slice_tensor[batch, 1, 4] = slice(add_1, 1, 0, 1)
linear_1[batch, 1, 4] = linear(slice_tensor, @qk.1.weight)
unsqueeze_1[batch, 1, 1, 4] = unsqueeze(linear_1, 1)
scaled_dot_product_attention_1[batch, 1, 1, 4] =
    scaled_dot_product_attention(unsqueeze_1, unsqueeze_1, unsqueeze_1, None, 0.0, True)
squeeze_1[batch, 1, 4] = squeeze(scaled_dot_product_attention_1, 1)
add_2[batch, 1, 4] = add(slice_tensor, squeeze_1)
tanh_1[batch, 1, 4] = tanh(add_2)
add_6[batch, 1, 4] = add(add_2, tanh_1)
slice_tensor_1[batch, 4, 4] = slice(add_1, 1, 1, 9223372036854775807)
cat_default[batch, 5, 4] = cat([add_6, slice_tensor_1], 1)
linear_2[batch, 5, 4] = linear(cat_default, @qk.2.weight)
unsqueeze_2[batch, 1, 5, 4] = unsqueeze(linear_2, 1)
scaled_dot_product_attention_2[batch, 1, 5, 4] =
    scaled_dot_product_attention(unsqueeze_2, unsqueeze_2, unsqueeze_2, None, 0.0, True)
squeeze_2[batch, 5, 4] = squeeze(scaled_dot_product_attention_2, 1)
add_4[batch, 5, 4] = add(cat_default, squeeze_2)
tanh_2[batch, 5, 4] = tanh(add_4)
add_5[batch, 5, 4] = add(add_4, tanh_2)
linear_3[batch, 5, 3] = linear(add_5, @head.weight)
return linear_3
"""


def test_a_block_runs_on_a_slice_and_the_other_tokens_pass_by() -> None:
    tester = check().run(HALF).after(AFTER).noted("block 1: 1 of 5 tokens")
    assert tester.records[-1].facts == {
        "skipped": [{"block": 1, "path": "", "ran": 1, "of": 5}],
        "loss": None,
    }


def test_all_blocks_for_all_tokens_is_the_model_itself() -> None:
    check().run("skip-positions{least=1.0}").kept("every token runs through every block")


def test_what_is_lost_is_measured_where_there_is_data() -> None:
    tester = check()
    before, batches = tester.program, [torch.randn(8, 5, 4), torch.randn(3, 5, 4)]
    before.calibration = read_calibration(batches, before)
    after = tester.run(HALF).program
    x = torch.cat(batches)
    got, want = (program.run((x,))[0].double() for program in (after, before))
    loss = float((got - want).square().sum() / want.square().sum())
    assert tester.records[-1].facts["loss"] == pytest.approx(loss, rel=1e-6)
    assert tester.records[-1].notes[-1] == (
        f"the outputs change by {loss:.2g} of their energy, on all samples"
    )


def test_a_token_depends_on_no_later_one() -> None:
    program = check(blocks=5).run(HALF).program
    x = torch.randn(2, 5, 4)
    other = torch.cat([x[:, :3], torch.randn(2, 2, 4)], 1)
    got, same = (program.run((one,))[0] for one in (x, other))
    assert torch.equal(got[:, :3], same[:, :3])
    assert not torch.equal(got[:, 3:], same[:, 3:])


# --- against torch ----------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "use_cache": False,
}
ROTARY = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 32}


def gpt2() -> nn.Module:
    config = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 64}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**config, vocab_size=40, use_cache=False))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**ROTARY)), "model.layers"),
    "windows": (
        lambda: tf.MistralForCausalLM(tf.MistralConfig(**ROTARY, sliding_window=4)),
        "model.layers",
    ),
    "gpt2": (gpt2, "transformer.h"),
    "opt": (
        lambda: tf.OPTForCausalLM(tf.OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=WIDTH)),
        "model.decoder.layers",
    ),
    "biases-by-distance": (
        lambda: tf.BloomForCausalLM(
            tf.BloomConfig(hidden_size=WIDTH, n_layer=LAYERS, n_head=2, vocab_size=40)
        ),
        "transformer.h",
    ),
}
"""Causal models, and where their blocks are."""


def texts(rows: int, real: tuple[int, ...]) -> dict[str, Tensor]:
    ids = torch.randint(0, 40, (rows, TOKENS))
    mask = torch.zeros_like(ids)
    for row, count in enumerate(real):
        mask[row, TOKENS - count :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def model(name: str) -> tuple[nn.Module, Program]:
    """Return a model with random weights and its program, padded on the left."""
    torch.manual_seed(0)
    made = MODELS[name][0]().eval()
    made.config.use_cache = False  # type: ignore[union-attr,assignment]
    for weight in made.parameters():
        nn.init.normal_(weight, 0.0, 0.3)
    program = capture(made, texts(2, (9, 6)), dynamic=("batch",))
    return made, apply(program, NORMAL)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama"])
def test_it_is_a_loop_over_blocks_with_a_mask_by_position(name: str) -> None:
    module, program = model(name)
    program, notes = apply(program, HALF)
    assert notes == ("block 1: 1 of 9 tokens", "block 2: 5 of 9 tokens")
    inputs, looped = texts(3, (9, 6, 8)), copy.deepcopy(module)
    for layer, count in zip(looped.get_submodule(MODELS[name][1]), RAN, strict=True):  # type: ignore[arg-type]
        layer.register_forward_hook(functools.partial(pass_by, count), with_kwargs=True)
    with torch.no_grad():
        want = looped(**inputs).logits
    real = inputs["attention_mask"] == 1
    agree([run(program, inputs)[0][real]], [want[real]], 8)  # measured at most 2.4


def pass_by(count: int, layer: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
    """Give tokens from `count` on the value that they had ahead of a layer."""
    before = args[0] if args else kwargs["hidden_states"]
    after = out[0] if isinstance(out, tuple) else out
    runs = torch.arange(TOKENS)[None, :, None] < count
    kept = torch.where(runs, after, before)
    return (kept, *out[1:]) if isinstance(out, tuple) else kept


def test_llama_by_hand() -> None:
    """Without hooks: each token runs the first block, and the last of those in its budget."""
    module, program = model("llama")
    inner, inputs = module.model, texts(2, (9, 9))  # type: ignore[union-attr]
    places = torch.arange(TOKENS)
    seen = torch.zeros(TOKENS, TOKENS).masked_fill(places[None] > places[:, None], -torch.inf)
    budgets = [int(LAYERS * (1 - 0.5 * place / (TOKENS - 1))) for place in range(TOKENS)]
    with torch.no_grad():
        x = inner.embed_tokens(inputs["input_ids"])
        turns = inner.rotary_emb(x, places[None])
        for place, layer in enumerate(inner.layers):
            runs = torch.tensor([place == 0 or place > LAYERS - budget for budget in budgets])
            out = layer(x, attention_mask=seen[None, None], position_embeddings=turns)
            x = torch.where(runs[None, :, None], out, x)
        want = module.lm_head(inner.norm(x))  # type: ignore[operator]
    agree(run(apply(program, HALF)[0], inputs), [want], 8)  # measured at most 2.4


@pytest.mark.slow
def test_an_engine_computes_the_same(tmp_path: Path) -> None:
    program, x = check(blocks=4).run(HALF).program, torch.randn(3, 5, 4)
    (got,) = exited.built(program, tmp_path).run([as_array(x)])
    agree([torch.from_numpy(got)], program.run((x,)), 8)  # measured 2


# --- refusals ---------------------------------------------------------------------------------


def test_attention_to_what_comes_later() -> None:
    check(causal=False).refuses(
        HALF,
        """
        scaled_dot_product_attention_1 (scaled_dot_product_attention.default) at test_skip_positions.py: attention sees tokens that come later
          remedy: leave this pass out
        """,  # noqa: E501
    )


def test_an_encoder_is_refused() -> None:
    with pytest.raises(PreconditionError, match="attention sees tokens that come later"):
        apply(normal("bert"), HALF)


def test_an_operator_that_needs_every_token() -> None:
    check(inner=lambda x: x.cumsum(1)).refuses(
        HALF,
        """
        cumsum_1 (cumsum.default) at test_skip_positions.py: it depends on the order of the tokens
          remedy: leave this pass out
        """,
    )


def test_an_open_length() -> None:
    with pytest.raises(PreconditionError) as caught:
        check(dynamic=("batch", "length")).run(HALF)
    assert "is dynamic, and a prefix is a share of it" in caught.value.reason
    assert caught.value.remedy == "leave 'length' out of dynamic"


def test_one_block_alone() -> None:
    check(blocks=1).refuses(
        HALF,
        """
        model: a block lies between two cuts, and there are no two
          remedy: leave skip-positions out
        """,
    )


# --- composition ------------------------------------------------------------------------------


def test_cuts_are_found_where_tokens_come_together_again() -> None:
    program, _ = apply(model("llama")[1], HALF)
    assert [cut.block for cut in find_cuts(program)] == [0, 1, 2, 3]
    shares = [cut.share for cut in find_cuts(program)]
    assert all(share is not None for share in shares)
    first, second, third, last = shares  # type: ignore[misc]
    assert second - first < third - second < last - third, "fewer tokens are less work"  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        f"drop-layers{{blocks=[3]}},{HALF}",
        f"{HALF},drop-layers{{blocks=[3]}}",
        f"{HALF},quantize{{scheme=int8-dynamic,least=8}}",
    ],
)
def test_it_composes(spec: str) -> None:
    program, _ = apply(model("llama")[1], spec)
    out = run(program, texts(3, (9, 6, 8)))[0]
    assert out.shape == (3, TOKENS, 40)
    assert out.isfinite().all()


@pytest.mark.parametrize("first", [True, False])
def test_with_exits_no_row_that_stays_changes(first: bool) -> None:
    program = model("llama")[1].fork()
    batches = [texts(20, (9,) * 20) for _ in range(6)]
    program.calibration = read_calibration(batches, program)
    steps = [HALF, "exit-early{epsilon=0.1,cuts=1}"]
    after, _ = apply(program, ",".join(steps if first else steps[::-1]))
    plain, _ = apply(program, HALF)
    assert after.get(find_exits) is not None
    inputs = texts(3, (9, 6, 8))
    assert torch.equal(run(without_exits(after), inputs)[0], run(plain, inputs)[0])
