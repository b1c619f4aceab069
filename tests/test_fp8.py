"""fp8: E4M3 weights and activations, from the codes by hand to the file that an engine runs."""

from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import effopt
from effopt.backend import Runner, backend
from effopt.backends.kernels.quantized_linear import ROUNDED
from effopt.backends.onnx_check import check_file
from effopt.backends.readiness import readiness
from effopt.capture import capture
from effopt.errors import PreconditionError, UsageError
from effopt.kernel import kernel
from effopt.passes.rounding import Grid, e4m3_step, fake, round_weight
from effopt.pipeline import parse_passes
from effopt.program import Program
from effopt.target import target
from tests.test_quantize import Net, batches, distance, inputs, layers, quantized
from tests.test_quantized_forms import opened, read, same

OP = kernel("quantized_linear").op
E4M3 = torch.float8_e4m3fn
SPEC = "quantize{scheme=fp8}"
Arrays = Any
"""Arrays of float64."""
Built = tuple[Program, Path, Runner]

EXACT = 4e-6
"""Bound relative to the largest value where the engine has the same codes, and sums of products in
float32 differ (measured: 4e-7). A code off by one in one activation gives 2e-4 or more."""
HALF = 4e-3
"""The same for one layer in float16, where scales and sums are rounded to 11 bits, and so is what
lies near the middle of two codes (measured: 8e-4). Behind it codes differ, each by 1/16."""


# --- what E4M3 is, by hand --------------------------------------------------------------------


def every_float() -> Arrays:
    """All finite E4M3 numbers, from the definition: 4 bits of exponent around 7, 3 of mantissa."""
    exponents, mantissas = np.meshgrid(np.arange(16), np.arange(8), indexing="ij")
    normal = 2.0 ** (exponents - 7) * (1 + mantissas / 8)
    values = np.where(exponents == 0, 2.0**-6 * mantissas / 8, normal)
    finite = values.reshape(-1)[:-1]  # the last one stands for NaN
    return np.concatenate([-finite[:0:-1], finite])


FLOATS = every_float()


def nearest(values: Arrays) -> Arrays:
    """Return the nearest E4M3 number of each value, of two the one with an even mantissa."""
    within = np.clip(values, -448, 448)
    distances = np.abs(within[..., None] - FLOATS)
    tied = distances == distances.min(axis=-1, keepdims=True)
    even = np.abs(np.arange(len(FLOATS)) - len(FLOATS) // 2) % 2 == 0
    found: Arrays = FLOATS[np.argmax(tied * (1 + even), axis=-1)]
    return found


def test_there_are_253_floats_up_to_448() -> None:
    assert len(FLOATS) == 253
    assert FLOATS.max() == 448
    assert np.array_equal(FLOATS.astype(ml_dtypes.float8_e4m3fn).astype(np.float64), FLOATS)


def test_codes_by_hand() -> None:
    """Near 1 floats are 1/8 apart, near 300 they are 32 apart, the least one is 2^-9."""
    weight = torch.tensor([[448.0, -300.0, 1.06, 0.0], [0.448, 0.0011, 0.3, -0.000001]])
    made = round_weight(weight, Grid(8, 0, symmetric=True, floating=True))
    assert made.codes.dtype == E4M3
    assert made.scale.tolist() == [[1.0], [pytest.approx(0.001)]]
    assert made.zero is None
    assert made.codes.float().tolist() == [[448, -288, 1, 0], [448, 1.125, 288, -(2.0**-9)]]


def test_ties_go_to_the_even_mantissa() -> None:
    x = torch.tensor([1.0625, 1.1875, 17.0, 19.0, -1.0625, 2.0**-10, 3 * 2.0**-10])
    got = ROUNDED["fp8"](x, 1.0, 0).tolist()
    assert got == [1.0, 1.25, 16.0, 20.0, -1.0, 0.0, 2.0**-8]


def test_activations_beyond_the_range_saturate() -> None:
    x = torch.tensor([1e9, 449.0, 465.0, -1e9, torch.inf, torch.nan])
    got = ROUNDED["fp8"](0.5 * x, 0.5, 0)
    assert got[:5].tolist() == [224.0, 224.0, 224.0, -224.0, 224.0]
    assert got[5].isnan()


def test_each_output_has_a_scale_of_its_own() -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    weight *= torch.tensor([1e-4, 1.0, 30.0, 0.0, 1e-12])[:, None]
    made = round_weight(weight, Grid(8, 0, symmetric=True, floating=True))
    most = weight.abs().amax(1).clamp_min(1e-8)
    assert torch.equal(made.scale[:, 0], most / 448)
    assert (made.codes.float().abs().amax(1)[:3] == 448).all()
    # Half of the distance of two neighbours: 1/16 of a number, and half of the least one below.
    change = (made.dequantized() - weight).abs()
    assert (change <= weight.abs() / 16 + made.scale * 2.0**-10).all()


def test_the_two_ways_to_round_agree() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    grid = Grid(8, 0, symmetric=True, floating=True)
    assert torch.equal(fake(weight, grid), round_weight(weight, grid).dequantized())


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, False)])
def test_there_is_no_other_grid_of_floats(bits: int, symmetric: bool) -> None:
    with pytest.raises(UsageError, match="8 bits and symmetric"):
        Grid(bits, 0, symmetric, floating=True)


def test_steps_are_numbers_of_the_type_they_are_stored_in() -> None:
    assert e4m3_step(448.0, torch.float32) == 1.0
    assert e4m3_step(0.0, torch.float16) == 1.0
    half = e4m3_step(0.3, torch.float16)
    assert half == float(np.float16(half)) == pytest.approx(0.3 / 448, rel=1e-3)
    # A float16 of 1e-6 / 448 is 0, and x / 0 no number: the least normal one instead.
    assert e4m3_step(1e-6, torch.float16) == torch.finfo(torch.float16).tiny


# --- the operator -----------------------------------------------------------------------------


def arguments(**changes: Any) -> dict[str, Any]:
    """A linear [5, 64] on random codes of all magnitudes, but for the changes."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randn(5, 64, generator=draw) * 10 ** torch.randn(5, 64, generator=draw)
    given: dict[str, Any] = {
        "x": 3 * torch.randn(2, 3, 64, generator=draw), "codes": codes.clamp(-448, 448).to(E4M3),
        "scale": torch.rand(5, 1, generator=draw) + 0.5, "zero": None,
        "bias": torch.randn(5, generator=draw), "bits": 8, "group": 64, "activations": "fp8",
        "step": 0.02, "origin": 0,
    }  # fmt: skip
    return {**given, **changes}


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_meaning(rank: int, bias: bool) -> None:
    x = 4 * torch.randn(*(2, 3, 4)[: rank - 1], 64, generator=torch.Generator().manual_seed(rank))
    given = arguments(x=x, **({} if bias else {"bias": None}))
    # In float32, as the operator divides: in float64 a value can lie on the other side of a tie.
    scaled = x.numpy() / np.float32(0.02)
    weight = given["codes"].double().numpy() * given["scale"].double().numpy()
    want = 0.02 * nearest(scaled.astype(np.float64)) @ weight.T
    want = want + (given["bias"].double().numpy() if bias else 0)
    got = OP(**given)
    assert (scaled > 448).any(), "nothing is clamped"
    assert got.dtype == torch.float32
    # Sums of 64 products in another order and precision (measured: 1e-7).
    assert np.abs(got.numpy() - want).max() <= 2e-6 * np.abs(want).max()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"bits": 4}, "'fp8' needs 8 bits, and no zero"),
    ({"zero": torch.zeros(5, 1, dtype=torch.uint8)}, "'fp8' needs 8 bits, and no zero"),
    ({"codes": torch.ones(5, 64, dtype=torch.int8)}, "codes are torch.int8: .*float8_e4m3fn for"),
    ({"activations": "static"}, "codes are torch.float8_e4m3fn: int8, or uint8 with a zero"),
    ({"group": 32, "scale": torch.ones(5, 2)}, "'fp8' needs group == 64"),
    ({"origin": 128}, "origin has no say in 'fp8'"),
    ({"step": 0.0}, "step 0.0 or origin 0 is out of range"),
    ({"step": float("nan")}, "step nan or origin 0 is out of range"),
]


@pytest.mark.parametrize(("changes", "reason"), WRONG)
def test_arguments_that_contradict_each_other(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        OP(**arguments(**changes))


# --- the pass ---------------------------------------------------------------------------------


def test_every_layer_is_on_floats_of_8_bits() -> None:
    made, record, before = quantized(SPEC, machine="h100")
    assert len(layers(made)) == 12
    (note,) = record.notes
    words = "12 layers on 8-bit float weights and activations (E4M3), calibrated ranges"
    assert note == f"{words}; 1 stay in float"
    assert {(row["bits"], row["symmetric"]) for row in record.facts["layers"]} == {(8, True)}
    for node in layers(made):
        codes, scale = (made.weight(part) for part in node.args[1:3])
        assert codes.dtype == E4M3
        assert (codes.float().abs().amax(1) == 448).all()
        assert scale.shape == (len(codes), 1)
    assert distance(made, before) < 0.02  # measured: 0.0083, and 0.0026 with int8-static


def test_steps_reach_the_largest_input_that_was_seen() -> None:
    made, _, _ = quantized(SPEC, machine="l4")
    first = Net().eval().blocks[0].norms[0]
    with torch.no_grad():
        most = max(float(first(x).abs().max()) for x in batches())
    node = layers(made)[0]
    assert node.args[7:10] == ("fp8", pytest.approx(most / 448, rel=1e-6), 0)
    narrow, _, _ = quantized("quantize{scheme=fp8,observer=percentile}", machine="l4")
    assert layers(narrow)[0].args[8] < node.args[8]


def test_layers_that_calibration_left_silent_stay_numbers() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(x * 0))
            return out

    made, record, _ = quantized("quantize{scheme=fp8,heads=true}", Silent(), machine="h100")
    assert any("only zeros" in note for note in record.notes)
    assert layers(made)[0].args[8] == 1.0
    assert made.run((inputs(2),))[0].isfinite().all()


def test_sensitive_layers_stay_in_float() -> None:
    whole, _, before = quantized(SPEC, machine="h100")
    most, record, _ = quantized("quantize{scheme=fp8,keep-float=4}", machine="h100")
    kept = [path for path, why in record.facts["float"].items() if "most sensitive" in why]
    assert len(kept) == 4
    assert distance(most, before) < 0.7 * distance(whole, before)  # measured: 0.49


def test_outputs_keep_within_a_budget() -> None:
    made, record, before = quantized("quantize{scheme=fp8,max-loss=0.003}", machine="h100")
    x = next(batches(1))  # what the budget was measured on, with ranges of that batch alone
    (got,), (want,) = made.run((x,)), before.run((x,))
    assert 0 < float((got - want).square().sum() / want.square().sum()) <= 0.003
    assert 1 < len(record.facts["float"]) < 13


@pytest.mark.parametrize("machine", ["a100", "t4", "orin", "cpu", "onnx"])
def test_machines_without_such_floats_refuse(machine: str) -> None:
    with pytest.raises(PreconditionError) as caught:
        quantized(SPEC, machine=machine)
    assert caught.value.node == machine
    words = "no product of fp8 weights and calibrated activations in 8-bit floats"
    assert caught.value.reason == words
    assert "int8-static" in caught.value.remedy
    assert "fp8" not in caught.value.remedy


def test_it_needs_data() -> None:
    with pytest.raises(PreconditionError, match="fp8 chooses by what flows") as caught:
        quantized(SPEC, machine="h100", data=False)
    assert "--calibration FILE" in caught.value.remedy


@pytest.mark.parametrize("option", ["group=64", "symmetric=true", "alpha=0.5", "activations=row"])
def test_options_that_mean_nothing_are_refused(option: str) -> None:
    with pytest.raises(UsageError, match="fp8 has no option"):
        parse_passes(f"quantize{{scheme=fp8,{option}}}")


# --- the file ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Return a quantized program for h100, the folder of its file, and what runs that."""
    made, _, _ = quantized(SPEC, machine="h100")
    folder = tmp_path_factory.mktemp("h100")
    return made, folder, opened(made, folder, "h100")


def test_the_file_is_pairs_of_floats_around_products(built: Built) -> None:
    made, folder, runner = built
    for rows in (1, 5):
        same(runner, made, (inputs(rows, seed=50 + rows),), EXACT)
    model = read(folder / "model.onnx")
    made_by = {name: node for node in model.graph.node for name in node.output}
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    products = [n for n in model.graph.node if "quantized" in n.name and n.op_type == "MatMul"]
    assert len(products) == 12
    for product in products:
        x, weight = (made_by[name] for name in product.input)
        codes = made_by[x.input[0]]
        assert (x.op_type, weight.op_type, codes.op_type) == (
            *["DequantizeLinear"] * 2, "QuantizeLinear",
        )  # fmt: skip
        stored = [*codes.input[2:], *x.input[2:], weight.input[0]]
        assert {kinds[name] for name in stored} == {TensorProto.FLOAT8E4M3FN}
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["QuantizeLinear"] == 8, "q, k and v share the codes of what they read"
    assert counts["DequantizeLinear"] == 24
    assert {entry.domain for entry in model.opset_import} == {""}
    zeros = [t for t in model.graph.initializer if not t.dims and t.data_type not in (1, 7)]
    assert all(float(numpy_helper.to_array(zero)) == 0 for zero in zeros)
    weights = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert max(np.prod(t.dims) for t in weights) <= 64 * 64, "more than the head is in float"


def test_onnxruntime_saturates_as_the_operator_does(built: Built) -> None:
    made, _, runner = built
    far = inputs(2)
    far[0, 0, :] = 1e6 * torch.linspace(-1, 1, 64)
    same(runner, made, (far,), EXACT)


def test_half_precision_has_half_scales(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net, data = nn.Sequential(nn.Linear(64, 64)).half().eval(), [x.half() for x in batches()]
    spec = "quantize{scheme=fp8,heads=true}"
    made = effopt.optimize(net, data[0], target="h100", recipe=spec, calibration=data).program
    runner = opened(made, tmp_path, "h100")
    for x in data:
        same(runner, made, (x,), HALF)
    kinds = {t.data_type for t in read(tmp_path / "model.onnx").graph.initializer}
    assert kinds == {TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN}


def test_readiness_is_as_the_units_are(built: Built, tmp_path: Path) -> None:
    made, folder, _ = built
    for name in ("l4", "rtx4090", "h100", "h200", "b200"):
        assert not readiness(folder / "model.onnx", target(name))
    for name in ("a100", "t4", "orin"):
        found = readiness(folder / "model.onnx", target(name))
        assert found[0].reason == "8-bit floats need sm_89"
    with pytest.raises(PreconditionError, match="8-bit floats need sm_89"):
        backend("onnx").build(made, target("a100"), tmp_path)


def test_kinds_of_machine_without_a_form_name_the_linear(tmp_path: Path) -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = OP(x, self.codes, self.scale, None, None, 8, 64, "fp8", 0.1, 0)
            return y

    net = One()
    net.register_buffer("codes", torch.ones(5, 64).to(E4M3))
    net.register_buffer("scale", torch.ones(5, 1))
    program = capture(net, {"x": torch.randn(2, 64)})
    for name in ("cpu", "onnx"):
        with pytest.raises(PreconditionError, match="no product of fp8 weights") as caught:
            backend("onnx").build(program, target(name), tmp_path)
        assert caught.value.node.startswith("quantized_linear (quantized_linear.default)")


def test_an_engine_folder_is_saved_and_runs(tmp_path: Path) -> None:
    data = list(batches())
    made = effopt.optimize(Net().eval(), inputs(2), target="h100", recipe=SPEC, calibration=data)
    made.save(tmp_path / "out")
    check = check_file(tmp_path / "out" / "model.onnx")
    assert TensorProto.FLOAT8E4M3FN in check
    x = inputs(3, 60)
    got, want = effopt.load(tmp_path / "out")(x.numpy()), made(x).detach().numpy()
    assert np.abs(got - want).max() <= EXACT * np.abs(want).max()


def test_why_the_pairs_are_left_where_they_are(built: Built) -> None:
    """onnxruntime's own rewriting of pairs takes the floats for integers, and then refuses.

    When this fails, a new onnxruntime runs the file as it is: drop `pairs` from the session.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match=r"tensor\(float8e4m3fn\).* is invalid"):
        onnxruntime.InferenceSession(str(built[1] / "model.onnx"), options)
