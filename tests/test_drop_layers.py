"""drop-layers: models without some blocks, which ones a search takes, refusals, composition."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from effopt.attention import SDPA
from effopt.calibration import read_calibration
from effopt.capture import capture
from effopt.errors import PreconditionError, UsageError
from effopt.exits import find_exits, set_thresholds, without_exits
from effopt.passes.drop_layers import DropLayers
from effopt.passes.output_change import FEW, change
from effopt.program import Program
from effopt.report import StepRecord
from tests import exited
from tests.check import NORMAL, Check, agree
from tests.programs import apply, draw, made, normal, run

TOKENS = 6


class Net(nn.Module):
    """Attention and a layer in each block, weights of its own; a read of the class token."""

    def __init__(self, read: Callable[["Net", Tensor], Any], blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qk = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(blocks))
        self.up = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(blocks))
        self.head, self.read = nn.Linear(4, 3, bias=False), read

    def forward(self, x: Tensor) -> Any:
        for qk, up in zip(self.qk, self.up, strict=True):
            h = qk(x).unsqueeze(1)
            x = x + scaled_dot_product_attention(h, h, h).squeeze(1)
            x = x + up(x)
        return self.read(self, layer_norm(x, [4]))


def logits(net: Net, x: Tensor) -> Tensor:
    return net.head(x[:, 0])


def given(count: int = 96, batch: int = 16) -> list[Tensor]:
    draws = torch.randn(count, TOKENS, 4, generator=torch.Generator().manual_seed(7))
    return list(draws.split(batch))


def check(
    read: Callable[[Net, Tensor], Any] = logits, data: Sequence[Tensor] = (), blocks: int = 3
) -> Check:
    """A small model in normal form, with samples to search on."""
    tester = copy.copy(_checked(read, blocks))
    tester.program = tester.program.fork()
    if data:
        tester.program.calibration = read_calibration(data, tester.program)
    return tester


@functools.cache
def _checked(read: Callable[[Net, Tensor], Any], blocks: int) -> Check:
    return Check(Net(read, blocks), torch.randn(2, TOKENS, 4)).normal()


def record_of(tester: Check, spec: str) -> StepRecord:
    return tester.run(spec).records[-1]


# --- the graph --------------------------------------------------------------------------------

BEFORE = """
x[batch, 6, 4]
linear[batch, 6, 4] = linear(x, @qk.0.weight)
unsqueeze[batch, 1, 6, 4] = unsqueeze(linear, 1)
scaled_dot_product_attention[batch, 1, 6, 4] =
    scaled_dot_product_attention(unsqueeze, unsqueeze, unsqueeze)
squeeze[batch, 6, 4] = squeeze(scaled_dot_product_attention, 1)
add[batch, 6, 4] = add(x, squeeze)
linear_1[batch, 6, 4] = linear(add, @up.0.weight)
add_1[batch, 6, 4] = add(add, linear_1)
linear_2[batch, 6, 4] = linear(add_1, @qk.1.weight)
unsqueeze_1[batch, 1, 6, 4] = unsqueeze(linear_2, 1)
scaled_dot_product_attention_1[batch, 1, 6, 4] =
    scaled_dot_product_attention(unsqueeze_1, unsqueeze_1, unsqueeze_1)
squeeze_1[batch, 6, 4] = squeeze(scaled_dot_product_attention_1, 1)
add_2[batch, 6, 4] = add(add_1, squeeze_1)
linear_3[batch, 6, 4] = linear(add_2, @up.1.weight)
add_3[batch, 6, 4] = add(add_2, linear_3)
layer_norm[batch, 6, 4] = layer_norm(add_3, [4], None, None, 1e-05, False)
select[batch, 4] = select(layer_norm, 1, 0)
linear_4[batch, 3] = linear(select, @head.weight)
return linear_4
"""

AFTER = """
x[batch, 6, 4]
linear[batch, 6, 4] = linear(x, @qk.0.weight)
unsqueeze[batch, 1, 6, 4] = unsqueeze(linear, 1)
scaled_dot_product_attention[batch, 1, 6, 4] =
    scaled_dot_product_attention(unsqueeze, unsqueeze, unsqueeze)
squeeze[batch, 6, 4] = squeeze(scaled_dot_product_attention, 1)
add[batch, 6, 4] = add(x, squeeze)
linear_1[batch, 6, 4] = linear(add, @up.0.weight)
add_1[batch, 6, 4] = add(add, linear_1)
layer_norm[batch, 6, 4] = layer_norm(add_1, [4], None, None, 1e-05, False)
select[batch, 4] = select(layer_norm, 1, 0)
linear_4[batch, 3] = linear(select, @head.weight)
return linear_4
"""


def test_what_follows_a_block_reads_what_is_ahead_of_it() -> None:
    tester = check(blocks=2).before(BEFORE).run("drop-layers{blocks=[1]}").after(AFTER)
    assert not any("qk.1" in name for name, _ in tester.program.module.named_parameters())


def test_the_attention_of_a_block_that_leaves_goes_with_it() -> None:
    """Dead-code elimination keeps attention calls, as torch counts them as random."""
    program, _ = apply(normal("vit"), "drop-layers{blocks=[1,2]}")
    assert sum(node.target is SDPA for node in program.nodes()) == 1


# --- numbers ----------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "use_cache": False,
}


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=1, intermediate_size=32))


def opt() -> nn.Module:
    return tf.OPTForCausalLM(tf.OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16))


def drawn(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for weight in model.parameters():
        nn.init.normal_(weight, 0.0, 0.3)
    return model.eval()


def language_model(make: Callable[[], nn.Module]) -> tuple[nn.Module, Program, dict[str, Tensor]]:
    model = drawn(make())
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    inputs = {"input_ids": torch.randint(0, 40, (2, 9)), "attention_mask": mask}
    return model, apply(capture(model, inputs, dynamic=("batch",)), NORMAL)[0], inputs


@pytest.mark.parametrize("blocks", [(2,), (1, 2)])
@pytest.mark.parametrize(("name", "path"), [("vit", "vit.layers"), ("bert", "bert.encoder.layer")])
def test_an_encoder_is_as_if_its_modules_had_been_removed(
    name: str, path: str, blocks: tuple[int, ...]
) -> None:
    without = copy.deepcopy(made(name)[0])
    remove(without, path, blocks)
    program, _ = apply(normal(name), f"drop-layers{{blocks={list(blocks)}}}")
    inputs = draw(name, 5)
    with torch.no_grad():
        want = without(**inputs).logits
    agree(run(program, inputs), [want], 4)  # measured 0; on other machines kernels may differ


@pytest.mark.parametrize(("make", "path"), [(llama, "model.layers"), (opt, "model.decoder.layers")])
def test_a_language_model_is_as_if_its_modules_had_been_removed(
    make: Callable[[], nn.Module], path: str
) -> None:
    """OPT flattens batch and tokens around its MLP: its blocks end in the view back."""
    model, program, inputs = language_model(make)
    remove(model, path, (1, 3))
    program, _ = apply(program, "drop-layers{blocks=[1,3]}")
    with torch.no_grad():
        want = model(**inputs).logits
    real = inputs["attention_mask"] == 1
    agree([run(program, inputs)[0][real]], [want[real]], 4)  # measured 0


def remove(model: nn.Module, path: str, blocks: Sequence[int]) -> None:
    layers = model.get_submodule(path)
    kept = [layer for place, layer in enumerate(layers) if place not in blocks]  # type: ignore[arg-type]
    model.set_submodule(path, nn.ModuleList(kept))


# --- the search -------------------------------------------------------------------------------


class Idle(Net):
    """Block 2 of four adds nothing to the stream."""

    def __init__(self) -> None:
        super().__init__(logits, 4)
        for layers in (self.qk, self.up):
            nn.init.zeros_(layers[2].weight)


@pytest.mark.parametrize("option", ["count=1", "max-loss=1e-9"])
def test_the_block_that_does_nothing_leaves_at_no_loss(option: str) -> None:
    tester = Check(Idle(), torch.randn(2, TOKENS, 4)).normal()
    tester.program.calibration = read_calibration(given(), tester.program)
    found = record_of(tester, f"drop-layers{{{option}}}")
    assert found.facts == {
        "blocks": 4,
        "dropped": [{"block": 2, "path": "", "loss": 0.0}],
        "loss": 0.0,
    }
    assert found.notes == (
        "block 2 leaves: the outputs change by 0",
        "1 of 4 blocks leave; the outputs change by 0 of their energy, on all samples",
    )
    tester.numbers(1)


def test_each_step_takes_the_block_that_changes_outputs_least() -> None:
    tester = check(data=given(64), blocks=4)
    whole, left, gone = tester.program, {1, 2, 3}, list[int]()
    found = record_of(copy.copy(tester), "drop-layers{count=3}").facts["dropped"]
    for row in found:
        losses = {block: loss_of(whole, [*gone, block]) for block in left}
        gone.append(min(losses, key=lambda block: losses[block]))
        left.remove(gone[-1])
        assert row["block"] == gone[-1]
        assert row["loss"] == pytest.approx(losses[gone[-1]], rel=1e-6)
    assert len(found) == 3


def loss_of(program: Program, blocks: Sequence[int]) -> float:
    """Say by hand how much outputs change without some blocks."""
    other, _ = apply(program, f"drop-layers{{blocks={sorted(blocks)}}}")
    x = torch.cat(given(64))
    got, want = (one.run((x,))[0].double() for one in (other, program))
    return float((got - want).square().sum() / want.square().sum())


def test_a_budget_takes_blocks_while_it_lasts() -> None:
    tester = check(data=given(64), blocks=4)
    rows = record_of(copy.copy(tester), "drop-layers{count=3}").facts["dropped"]
    most = (rows[1]["loss"] + rows[2]["loss"]) / 2
    assert rows[1]["loss"] < most < rows[2]["loss"]
    found = record_of(copy.copy(tester), f"drop-layers{{max-loss={most}}}").facts
    assert found["dropped"] == rows[:2]
    assert found["loss"] == pytest.approx(rows[1]["loss"], rel=1e-6)


def test_nothing_within_the_budget_leaves_the_graph_as_it_is() -> None:
    tester = check(data=given(64))
    least = record_of(copy.copy(tester), "drop-layers{count=1}").facts["loss"]
    note = f"no block leaves: the outputs change by {least:.2g} of their energy or more"
    tester.run("drop-layers{max-loss=1e-9}").kept(note)


def test_a_budget_holds_on_all_data_and_not_on_the_first_batches_alone() -> None:
    """On the first samples all blocks add nothing, as they are 0; later ones tell."""
    ahead = [torch.zeros(FEW, TOKENS, 4)]
    tester = check(lambda net, x: net.head(x[:, 0]) + 1, data=[*ahead, *given(64)])
    tester.run("drop-layers{max-loss=1e-6}")
    assert not tester.records[-1].changed
    assert "no block leaves" in tester.records[-1].notes[0]


def test_named_blocks_need_no_data_and_are_measured_where_there_is_some() -> None:
    found = record_of(check(), "drop-layers{blocks=[2,1]}")
    assert found.facts["dropped"] == [
        {"block": 1, "path": "", "loss": None},
        {"block": 2, "path": "", "loss": None},
    ]
    assert found.notes == ("block 1 leaves", "block 2 leaves", "2 of 3 blocks leave")
    tester = check(data=given(64))
    rows = record_of(copy.copy(tester), "drop-layers{blocks=[2,1]}").facts["dropped"]
    wanted = [loss_of(tester.program, [1]), loss_of(tester.program, [1, 2])]
    assert [row["loss"] for row in rows] == pytest.approx(wanted, rel=1e-6)


def test_a_change_is_that_of_the_worst_floating_output_over_all_batches() -> None:
    one, two, count = torch.ones(2), torch.full((2,), 2.0), torch.arange(2)
    same, other = (one, one, count), (one, two, count + 1)
    # the second output changes by 2 of 2 in the first batch, and by none of 8 in the other
    assert change([(other, same), ((one, 2 * one, count), (one, two, count))]) == 0.2
    hidden = torch.tensor([1.0, -torch.inf])
    assert change([((hidden,), (hidden,))]) == 0.0
    assert change([((one,), (hidden,))]) == torch.inf


# --- refusals ---------------------------------------------------------------------------------


def test_a_search_needs_data() -> None:
    check().refuses(
        "drop-layers{count=1}",
        """
        model: what the outputs lose is measured on data, and there is none
          remedy: pass calibration=, or --calibration FILE, or name blocks
        """,
    )


def test_a_search_needs_an_output_that_tells() -> None:
    tester = check(lambda net, x: net.head(x[:, 0]).argmax(-1), data=given(16))
    tester.refuses(
        "drop-layers{count=1}",
        """
        model: no output is a floating number, so none tells what it loses
          remedy: let the model return its scores, too, or name blocks
        """,
    )
    assert record_of(tester, "drop-layers{blocks=[1]}").facts["loss"] is None


def test_one_block_alone_cannot_leave() -> None:
    check(blocks=1).refuses(
        "drop-layers{blocks=[0]}",
        """
        model: a block lies between two cuts, and there are no two
          remedy: leave drop-layers out
        """,
    )


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (0, "nothing to read is ahead of block 0: 1, 2 may be named"),
        (3, "no block ends at attention call 3: 1, 2 may be named"),
    ],
)
def test_a_block_that_is_not_there(block: int, reason: str) -> None:
    check().refuses(
        f"drop-layers{{blocks=[{block}]}}", f"model: {reason}\n  remedy: name other blocks"
    )


def test_a_block_in_which_tokens_leave_must_stay() -> None:
    tester = check(data=given(16)).run("merge-tokens{r=2,sites=[1]}")
    reason = (
        "block 1 turns float32[batch, 6, 4] into float32[batch, 4, 4]: "
        "what follows does not fit what is ahead"
    )
    with pytest.raises(PreconditionError) as caught:
        tester.run("drop-layers{blocks=[1]}")
    assert caught.value.reason == reason
    with pytest.raises(PreconditionError) as caught:
        tester.run("drop-layers{count=2}")
    assert caught.value.reason == f"of 2 blocks behind the first 1 may leave ({reason})"
    assert record_of(tester, "drop-layers{count=1}").facts["dropped"][0]["block"] == 2


def test_a_block_that_says_which_tokens_stayed_must_stay() -> None:
    """A fused token stands for one that left, so there are as many, and masks follow them."""
    tester = Check(*made("bert")).normal().run("prune-tokens{keep=0.9,fuse=true,sites=[1]}")
    with pytest.raises(PreconditionError) as caught:
        tester.run("drop-layers{blocks=[1]}")
    assert caught.value.reason.startswith("block 1 hands on more than the stream: what follows")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"count": 1, "max_loss": 0.1},
        {"count": -1},
        {"max_loss": -0.1},
        {"blocks": (1, 1)},
        {"blocks": (-1,)},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        DropLayers(**options)
    assert caught.value.remedy


# --- composition ------------------------------------------------------------------------------


def with_exits(name: str, exits: int) -> Program:
    program = exited.of_zoo(name, exits=exits)
    program.calibration = read_calibration([draw(name, 7, seed=n) for n in range(3)], program)
    return program


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_block_behind_an_exit_leaves_and_the_exit_stays_as_it_is(name: str) -> None:
    program = with_exits(name, 1)
    after, notes = apply(program, "drop-layers{count=1}")
    (number,) = {n for n in (1, 2) if notes[0].startswith(f"block {n} ")}
    plain, _ = apply(normal(name), f"drop-layers{{blocks=[{number}]}}")
    inputs = draw(name, 3)
    assert torch.equal(run(after, inputs)[0], run(plain, inputs)[0])
    for one in (program, after):
        set_thresholds(one, [-torch.inf])
    assert torch.equal(run(after, inputs)[0], run(program, inputs)[0])
    assert run(after, inputs)[-1].tolist() == [1, 1, 1]


def test_an_exit_keeps_the_block_to_which_its_head_was_fitted() -> None:
    program = with_exits("vit", 2)
    with pytest.raises(PreconditionError) as caught:
        apply(program, "drop-layers{blocks=[1]}")
    reason = "an exit stands behind block 1, and its head was fitted there"
    assert caught.value.reason == reason
    assert "ahead of exit-early" in caught.value.remedy
    _, notes = apply(program, "drop-layers{count=1}")
    assert notes[0].startswith("block 2 (vit.layers.2) leaves")


@pytest.mark.slow
def test_drop_merge_exit_and_quantize_in_one_recipe() -> None:
    """Outputs without exits are those of the recipe without exit-early."""
    ahead, behind = (
        "drop-layers{count=1},merge-tokens{r=1,sites=[0]}",
        "quantize{scheme=int8-dynamic,least=4}",
    )
    tester = check(data=given(200, 20), blocks=4)
    whole = copy.copy(tester).run(f"{ahead},exit-early{{epsilon=0.1,cuts=1}},{behind}")
    plain = copy.copy(tester).run(f"{ahead},{behind}")
    assert whole.program.get(find_exits) is not None
    x = torch.randn(5, TOKENS, 4)
    assert torch.equal(without_exits(whole.program).run((x,))[0], plain.program.run((x,))[0])
    names = [record.spec.partition("{")[0] for record in whole.records if record.changed]
    assert names[:4] == ["drop-layers", "merge-tokens", "exit-early", "quantize"]
