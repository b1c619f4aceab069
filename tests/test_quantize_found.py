"""What review found in quantize: each is a test by its name."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from effopt.backends.quantized import FORMS
from effopt.calibration import read_calibration
from effopt.capture import capture
from effopt.errors import PreconditionError
from effopt.passes.quantize import Quantize
from effopt.passes.sensitivity import Trial
from effopt.pipeline import Pipeline
from effopt.products import PRODUCTS, Limit
from effopt.recipe import steps_of
from effopt.target import target
from tests.test_quantize import (
    TOKENS,
    WIDTH,
    Net,
    batches,
    distance,
    inputs,
    layers,
    program,
    quantized,
)


class Chained(Net):
    """A layer that reads another at once; outputs that are conditions, and that hide by -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for block in self.blocks:
            x = block(x + self.high(self.low(x)))
        logits = self.head(self.norm(x[:, 0]))
        hidden = torch.arange(WIDTH) % 2 == 0
        return logits, logits.masked_fill(hidden, -torch.inf), logits > 0


@pytest.mark.parametrize("scheme", ["int4-rtn", "int4-awq", "int8-static"])
def test_layers_in_a_row_and_outputs_of_all_kinds(scheme: str) -> None:
    made, record, before = quantized(f"quantize{{scheme={scheme}}}", Chained())
    names = [row["path"].split(" ")[0] for row in record.facts["layers"]]
    assert names.count("low") == names.count("high") == 2
    assert distance(made, before) < 0.5


def test_half_precision_models_are_folded_within_their_precision() -> None:
    net = Net().half().eval()
    made = replace(capture(net, inputs(2).half()), target=target("cpu"))
    made = replace(made, calibration=read_calibration((x.half() for x in batches()), made))
    after, records = Pipeline(steps_of("quantize{scheme=int4-awq}")).run(made)
    assert records[-1].facts["groups"]
    assert after.run((inputs(2).half(),))[0].dtype == torch.float16


class Rates(Net):
    """One number a sample, and one for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Linear(WIDTH, 1)
        with torch.no_grad():  # one weight beside which all others of its row round to nothing
            self.blocks[1].up.weight[:, 3] *= 200

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = block(x)
        rates = self.rate(self.norm(x[:, 0]))
        return rates, rates.mean()


def test_sensitivity_of_one_number_a_sample() -> None:
    _, record, _ = quantized("quantize{scheme=int4-rtn,group=0,keep-float=1}", Rates())
    assert record.facts["float"]["blocks.1.up"] == "one of the most sensitive layers"


class Picks(Net):
    """Only the place of the largest logit, which no small change moves."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(-1)


def test_sensitivity_that_no_output_shows_is_refused() -> None:
    with pytest.raises(PreconditionError, match="no floating output"):
        quantized("quantize{scheme=int4-rtn,keep-float=1}", Picks())


def test_a_float_layer_for_every_layer_is_refused() -> None:
    with pytest.raises(PreconditionError, match="leaves none of 12 layers"):
        quantized("quantize{scheme=int4-rtn,keep-float=12}")


REFUSED = {
    "quantize{scheme=int8-dynamic}": "choose int8-static, int8-weight, int4-rtn, int4-awq, ",
    "quantize{scheme=int4-rtn,symmetric=false}": "use symmetric weights",
    "quantize{scheme=int4-rtn,group=32}": "blocks of 64 weights or more",
    "quantize{scheme=int8-weight,group=64}": "group=0",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_what_a_gpu_cannot_run_is_refused_before_any_work(spec: str) -> None:
    with pytest.raises(PreconditionError) as caught:
        quantized(spec, machine="a100")
    assert REFUSED[spec] in caught.value.remedy


def test_a_gpu_gets_ranges_around_zero_and_whole_rows() -> None:
    made, _, _ = quantized("quantize{scheme=int8-static}", machine="a100")
    assert {node.args[9] for node in layers(made)} == {128}
    _, record, _ = quantized("quantize{scheme=int8-weight}", machine="a100")
    assert {row["group"] for row in record.facts["layers"]} == {WIDTH, 2 * WIDTH}


def test_scaling_without_data_is_said() -> None:
    _, record, _ = quantized("quantize{scheme=int8-dynamic}", data=False)
    assert record.notes[1] == "no calibration data: outliers stay in the activations"


def test_a_shared_weight_is_fitted_to_all_its_inputs() -> None:
    plain, _, before = quantized("quantize{scheme=int4-rtn}", Net(shared=True))
    fitted, record, _ = quantized("quantize{scheme=int4-gptq}", Net(shared=True))
    assert {row["measured_on"] for row in record.facts["layers"]} >= {"320 tokens"}
    assert distance(fitted, before) < distance(plain, before)


def test_layers_of_one_module_are_listed_apart() -> None:
    encoder = nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, batch_first=True)
    made, record, _ = quantized("quantize{scheme=int4-rtn,heads=true}", encoder)  # type: ignore[arg-type]
    paths = [row["path"] for row in record.facts["layers"]]
    assert len(paths) == len(set(paths)) == len(layers(made))
    assert sum(path.startswith("self_attn (") for path in paths) == 2


class Encoder(Net):
    """Hidden states behind the last block: no head."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TwoHeads(Net):
    """Two heads that are averaged: neither comes from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        made: Tensor = (self.head(x[:, 0]) + self.other(x[:, 1])) / 2
        return made


def test_the_end_of_the_last_block_is_no_head() -> None:
    _, record, _ = quantized("quantize{scheme=int4-rtn}", Encoder(), data=False)
    assert "blocks.1.down" in [row["path"] for row in record.facts["layers"]]
    assert record.facts["float"] == {}


def test_heads_that_are_added_are_heads() -> None:
    _, record, _ = quantized("quantize{scheme=int4-rtn}", TwoHeads(), data=False)
    assert sorted(record.facts["float"]) == ["head", "other"]


def test_sensitivity_is_measured_on_calibration_data() -> None:
    """Where the example inputs are zeros, they do not tell."""
    made = replace(program(Net()), samples=(torch.zeros(2, TOKENS, WIDTH),))
    plan = Quantize("int4-rtn")._plan(made)
    assert not isinstance(plan, Limit)
    (batch, *_) = made.calibration or ()
    torch.testing.assert_close(Trial(made, plan).inputs, batch)


class Parallel(nn.Module):
    """A block of two branches from one norm, on embeddings that are the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.one, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.one(y) + self.down(self.up(y).relu())


def test_the_branches_of_a_parallel_block_are_no_heads() -> None:
    _, record, _ = quantized("quantize{scheme=int4-rtn}", Parallel(), data=False)
    assert record.facts["float"] == {}


def test_rows_of_weights_that_do_not_split_into_fours_stay_dense() -> None:
    net = nn.Sequential(nn.Linear(66, 64), nn.GELU(), nn.Linear(64, 66), nn.Linear(66, 66))
    made = replace(capture(net.eval(), torch.randn(2, 66)), target=target("cpu"))
    _, records = Pipeline(steps_of("quantize{scheme=2:4,heads=true}")).run(made)
    assert [row["path"] for row in records[-1].facts["layers"]] == ["2"]
    assert "runs of four" in records[-1].facts["float"]["0"]


@pytest.mark.parametrize("spec", ["int8-dynamic", "int4-rtn,keep-float=1", "int4-awq"])
def test_a_weight_that_is_no_number_is_named_whoever_reads_it_first(spec: str) -> None:
    net = Net()
    with torch.no_grad():
        net.blocks[1].down.weight[0, 0] = torch.nan
    with pytest.raises(PreconditionError, match="NaN") as caught:
        quantized(f"quantize{{scheme={spec}}}", net)
    assert "blocks.1.down" in caught.value.node


def test_alpha_without_data_is_refused() -> None:
    with pytest.raises(PreconditionError, match="no data"):
        quantized("quantize{scheme=int8-dynamic,alpha=0.5}", data=False)
    quantized("quantize{scheme=int8-dynamic,alpha=0}", data=False)


def test_every_product_of_a_machine_has_its_form() -> None:
    assert set(PRODUCTS) == set(FORMS)
