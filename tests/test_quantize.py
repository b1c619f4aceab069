"""quantize: which layers, on what codes, refusals, and what the rounding does to the numbers."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effopt.axis_rules import argument
from effopt.calibration import read_calibration
from effopt.capture import capture
from effopt.errors import PreconditionError, UsageError
from effopt.kernel import kernel
from effopt.passes.quantize import Quantize
from effopt.passes.rounding import Grid, round_weight
from effopt.pipeline import Pipeline, parse_passes, spec_of
from effopt.program import Program, module_path
from effopt.recipe import steps_of
from effopt.report import StepRecord
from effopt.target import target

OP = kernel("quantized_linear").op
WIDTH, TOKENS = 64, 10


class Block(nn.Module):
    """A pre-norm block whose MLP has a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (
            part(y).unflatten(2, (4, WIDTH // 4)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Net(nn.Module):
    """Two blocks and a head."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = Block()
        self.blocks = nn.ModuleList([first, first if shared else Block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():  # channels that stand out, as trained norms have
            for block in self.blocks:
                for norm in block.norms:
                    norm.weight[::16] *= 12

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def inputs(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def batches(count: int = 4) -> Iterator[Tensor]:
    return (inputs(4, seed) for seed in range(10, 10 + count))


def program(net: nn.Module, data: bool = True, machine: str = "cpu") -> Program:
    made = replace(capture(net.eval(), inputs(2)), target=target(machine))
    return replace(made, calibration=read_calibration(batches(), made)) if data else made


def quantized(
    spec: str, net: nn.Module | None = None, **kwargs: Any
) -> tuple[Program, StepRecord, Program]:
    """Return the quantized program, the record of the pass, and the program before it."""
    before = program(net or Net(), **kwargs)
    after, records = Pipeline(steps_of(spec)).run(before)
    return after, records[-1], before


def layers(made: Program) -> list[Any]:
    return [node for node in made.nodes() if node.target is OP]


def distance(made: Program, before: Program) -> float:
    """Return the relative squared error of the outputs on inputs that were not calibrated on."""
    x = inputs(16, 99)
    got, want = made.run((x,))[0], before.run((x,))[0]
    return float((got - want).square().sum() / want.square().sum())


BLOCK = ("q", "k", "v", "o", "up", "down")


def test_every_layer_but_the_head_is_quantized_and_listed() -> None:
    made, record, _ = quantized("quantize{scheme=int4-rtn}", data=False)
    paths = [f"blocks.{n}.{name}" for n in range(2) for name in BLOCK]
    assert sorted(row["path"] for row in record.facts["layers"]) == sorted(paths)
    assert record.facts["float"] == {"head": "it is a head: no other layer reads its output"}
    assert len(layers(made)) == len(paths)
    (note,) = record.notes
    assert note == "12 layers on 4-bit weights in blocks of 64 and 128, asymmetric; 1 stay in float"


def test_heads_and_small_layers_are_asked_for() -> None:
    _, record, _ = quantized("quantize{scheme=int4-rtn,heads=true}", data=False)
    assert "head" in [row["path"] for row in record.facts["layers"]]
    with pytest.raises(PreconditionError, match="fewer than 65 inputs or outputs"):
        quantized("quantize{scheme=int4-rtn,least=65}", data=False)


@torch.no_grad()
def _same_as_rounded(made: Program, net: Net, bits: int) -> None:
    """Compare with the float model after each of its weights was rounded, once."""
    for block in dict.fromkeys(net.blocks):
        for name in BLOCK:
            weight = getattr(block, name).weight
            grid = Grid(bits, min(128, weight.shape[1]), symmetric=bits == 8)
            weight.copy_(round_weight(weight, grid).dequantized())
    x = inputs(3)
    want = net.eval()(x)
    # The same products in the same order: 0.0 was measured; a library may sum in another.
    assert (made.run((x,))[0] - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
def test_a_bias_of_zeros_is_none() -> None:
    net = Net()
    for layer in (net.blocks[0].o, net.blocks[1].down):
        layer.bias.zero_()
    made, _, _ = quantized("quantize{scheme=int8-weight}", net, data=False)
    paths = [module_path(node) for node in layers(made) if argument(node, "bias") is None]
    assert paths == ["blocks.0.o", "blocks.1.down"]
    _same_as_rounded(made, net, 8)


@pytest.mark.parametrize(("scheme", "bits", "group"), [("int4-rtn", 4, 64), ("int8-weight", 8, 64)])
def test_rounding_to_nearest_is_the_float_model_on_rounded_weights(
    scheme: str, bits: int, group: int
) -> None:
    made, record, _ = quantized(f"quantize{{scheme={scheme}}}", data=False)
    _same_as_rounded(made, Net(), bits)
    assert {row["group"] for row in record.facts["layers"]} == {group, 128}


@pytest.mark.parametrize("scheme", ["int4-awq", "int4-gptq"])
def test_searched_weights_lose_less_than_rounded_ones(scheme: str) -> None:
    plain, _, before = quantized("quantize{scheme=int4-rtn}")
    made, _, _ = quantized(f"quantize{{scheme={scheme}}}")
    assert distance(made, before) < 0.8 * distance(plain, before)


def test_scales_are_folded_where_a_producer_takes_them() -> None:
    _, record, _ = quantized("quantize{scheme=int4-awq}")
    kinds = [(row["kind"], len(row["linears"])) for row in record.facts["groups"]]
    # q, k, v by a norm; o by v; up by a norm; down behind the GELU, by a multiplication.
    assert sorted(kinds) == sorted(2 * [("folded", 3), ("folded", 1), ("folded", 1), ("mul", 1)])
    assert all(row["loss"] <= row["rtn_loss"] for row in record.facts["groups"])


def test_outliers_move_into_int8_weights() -> None:
    with_data, record, before = quantized("quantize{scheme=int8-dynamic}")
    without, _, _ = quantized("quantize{scheme=int8-dynamic,alpha=0.0}")
    assert distance(with_data, before) < 0.5 * distance(without, before)
    assert {row["kind"] for row in record.facts["groups"]} == {"folded"}, "none costs time"


@torch.no_grad()
def test_data_lets_int8_weights_take_back_what_rounding_changes() -> None:
    """Of the weights alone, since what rounding activations changes is more here, and the same."""
    lost, x = list[float](), inputs(16, 99)
    for data in (False, True):
        net = Net().eval()
        want = net(x)
        made, record, _ = quantized("quantize{scheme=int8-dynamic,alpha=0.0}", net, data=data)
        for row, layer in zip(record.facts["layers"], layers(made), strict=True):
            weight = net.get_submodule(row["path"]).weight
            nearest = round_weight(weight, Grid(8, 0, symmetric=True))
            codes, scale = (made.weight(part) for part in layer.args[1:3])
            assert torch.equal(scale, nearest.scale)
            assert data or torch.equal(codes, nearest.codes), "to nearest without data"
            weight.copy_(codes * scale)
        lost.append(float((net(x) - want).square().sum()))
    assert lost[1] < 0.7 * lost[0]  # 0.51 was measured


def test_rows_lose_less_than_tensors() -> None:
    rows, _, before = quantized("quantize{scheme=int8-dynamic,activations=row}", data=False)
    whole, _, _ = quantized("quantize{scheme=int8-dynamic}", data=False)
    assert distance(rows, before) < distance(whole, before)


def test_static_ranges_come_from_calibration() -> None:
    made, _, before = quantized("quantize{scheme=int8-static}")
    steps = {(node.args[8], node.args[9]) for node in layers(made)}
    assert len(steps) > 4, "each value that layers read has a range of its own"
    assert distance(made, before) < 5e-3


def test_the_most_sensitive_layers_stay_in_float() -> None:
    net = Net()
    with torch.no_grad():  # one weight so large that all others of its row round to nothing
        net.blocks[1].up.weight[:, 3] *= 200
    _, record, _ = quantized("quantize{scheme=int4-rtn,group=0,keep-float=1}", net)
    assert record.facts["float"]["blocks.1.up"] == "one of the most sensitive layers"


def test_shared_layers_share_their_codes() -> None:
    made, _, _ = quantized("quantize{scheme=int4-rtn}", Net(shared=True))
    codes = [node.args[1] for node in layers(made)]
    assert len(codes) == 12
    assert len(set(codes)) == 6
    _same_as_rounded(made, Net(shared=True), 4)


def test_symmetric_is_what_the_target_asks_for() -> None:
    for machine, expected in (("cpu", False), ("onnx", True), ("a100", True)):
        _, record, _ = quantized("quantize{scheme=int4-rtn}", machine=machine)
        assert {row["symmetric"] for row in record.facts["layers"]} == {expected}
    _, record, _ = quantized("quantize{scheme=int4-rtn,symmetric=true}")
    assert all(row["symmetric"] for row in record.facts["layers"])


def test_quantization_composes_with_merging_in_one_order() -> None:
    made, _, _ = quantized("merge-tokens{r=2,sites=[0]},quantize{scheme=int4-awq}")
    merged, _, _ = quantized("merge-tokens{r=2,sites=[0]}")
    assert len(layers(made)) == 12
    assert distance(made, merged) < 0.1
    with pytest.raises(PreconditionError) as caught:
        quantized("quantize{scheme=int4-rtn},merge-tokens{r=2,sites=[0]}")
    assert "quantize last" in caught.value.remedy


def test_a_second_run_finds_nothing_to_do() -> None:
    made, _, _ = quantized("quantize{scheme=int4-rtn}")
    with pytest.raises(PreconditionError, match="no linear layer to quantize"):
        Pipeline(steps_of("quantize{scheme=int4-rtn}")).run(made)


@pytest.mark.parametrize("scheme", ["int4-awq", "int4-gptq", "int8-static"])
def test_schemes_that_need_data_refuse_without(scheme: str) -> None:
    with pytest.raises(PreconditionError) as caught:
        quantized(f"quantize{{scheme={scheme}}}", data=False)
    assert "has no data" in caught.value.reason
    assert "--calibration FILE" in caught.value.remedy


WRONG = {
    "scheme": ("quantize{scheme=int4-awk}", "int4-awq"),
    "group": ("quantize{scheme=int4-rtn,group=48}", "power of two"),
    "group of rows": ("quantize{scheme=int8-dynamic,group=64}", "leave group out"),
    "activations": ("quantize{scheme=int4-rtn,activations=row}", "int8-dynamic"),
    "observer": ("quantize{scheme=int8-static,observer=minimax}", "minmax"),
    "symmetric": ("quantize{scheme=int4-rtn,symmetric=maybe}", "auto, true or false"),
    "alpha": ("quantize{scheme=int8-dynamic,alpha=2.0}", "from 0 to 1"),
    "small group": ("quantize{scheme=int4-rtn,group=8}", "power of 2 from 16"),
    "negative group": ("quantize{scheme=int4-rtn,group=-5}", "leave it out"),
    "asymmetric int8": ("quantize{scheme=int8-static,symmetric=false}", "leave symmetric out"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused_with_what_is_right(name: str) -> None:
    spec, hint = WRONG[name]
    with pytest.raises(UsageError) as caught:
        parse_passes(spec)
    assert hint in f"{caught.value.reason} {caught.value.remedy}"


def test_an_option_reads_back_as_written() -> None:
    spec = "quantize{scheme=int4-awq,group=64,symmetric=true,clip=false,keep_float=2}"
    (one,) = parse_passes(spec)
    assert spec_of(one) == spec
    assert isinstance(one, Quantize)


def test_the_same_data_gives_the_same_bytes() -> None:
    first, _, _ = quantized("quantize{scheme=int4-awq}")
    second, _, _ = quantized("quantize{scheme=int4-awq}")
    for one, other in zip(layers(first), layers(second), strict=True):
        assert torch.equal(first.weight(one.args[1]), second.weight(other.args[1]))


def test_the_callers_model_is_left_as_it_was() -> None:
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    quantized("quantize{scheme=int4-awq}", net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_constant_channels_give_no_nan() -> None:
    net = Net()
    made = replace(capture(net.eval(), inputs(2)), target=target("cpu"))
    flat = [torch.zeros(4, TOKENS, WIDTH)]
    made = replace(made, calibration=read_calibration(flat, made))
    for scheme in ("int4-awq", "int4-gptq", "int8-static", "int8-dynamic"):
        after, _ = Pipeline(steps_of(f"quantize{{scheme={scheme}}}")).run(made)
        assert after.run((inputs(2),))[0].isfinite().all()


def test_weights_that_are_not_finite_are_named() -> None:
    net = Net()
    with torch.no_grad():
        net.blocks[0].up.weight[0, 0] = torch.nan
    with pytest.raises(PreconditionError, match="NaN") as caught:
        quantized("quantize{scheme=int4-rtn}", net, data=False)
    assert "blocks.0.up" in caught.value.node


def test_powers_of_two_are_what_the_weights_become() -> None:
    made, record, _ = quantized("quantize{scheme=pow2}", data=False)
    for row in record.facts["layers"]:
        held = getattr(made.module, f"{row['path'].replace('.', '_')}_weight_values")
        blocks = held.reshape(held.shape[0], -1, row["group"])
        exponents = (blocks.abs() / blocks.abs().amax(-1, keepdim=True)).log2()
        assert (exponents - exponents.round()).abs().max() <= 1e-5
        assert exponents.min() >= -7


def test_two_of_four_weights_are_left_and_fitted_to_data() -> None:
    fitted, record, before = quantized("quantize{scheme=2:4}")
    plain, _, _ = quantized("quantize{scheme=2:4}", data=False)
    held = fitted.module.blocks_0_up_weight_values.reshape(-1, 4)
    assert ((held != 0).sum(1) == 2).all()
    assert distance(fitted, before) < distance(plain, before)
    assert len(record.facts["layers"]) == 12
