"""The ONNX forms of quantized linears: numbers, layout, what engines make of it, refusals."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from effopt.backend import Runner, as_array, backend
from effopt.backends import onnx_file, onnx_size, quantized, quantized_draft, session
from effopt.backends.fused_check import FUSED, check_fused, check_graphs
from effopt.backends.onnx_check import check_file
from effopt.backends.packing import pack_pairs
from effopt.backends.quantized_draft import Draft, Linear
from effopt.backends.readiness import readiness
from effopt.capture import capture
from effopt.errors import PreconditionError, UnsafeFileError, VerificationError
from effopt.kernel import kernel
from effopt.program import Program
from effopt.target import target
from tests.thin import thin

OP = kernel("quantized_linear").op
Words = dict[str, Any]
K, N = 256, 24

LEVEL_4 = 2e-2
"""Bound relative to the largest value where the engine rounds activations to 8 bits itself,
block by block (measured: 8e-3)."""
EXACT = 8e-6
"""The same where engine and operator have the same integers, and only sums of K products in
float32 differ (measured: 7e-7). A code off by one in one activation gives 1e-4 or more."""


class Quantized(nn.Module):
    """A linear K -> N on random codes, of which some are of each extreme."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, words: Words, seed: int, bias: bool = True, k: int = K, n: int = N) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        bits, group = words.get("bits", 8), words.get("group", k)
        low, kind = (
            (0, torch.uint8) if words.get("asymmetric") else (-(1 << (bits - 1)), torch.int8)
        )
        codes = torch.randint(low, low + (1 << bits), (n, k), generator=draw).to(kind)
        zero = torch.randint(0, 1 << bits, (n, k // group), generator=draw).to(torch.uint8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.rand(n, k // group, generator=draw) * 0.01 + 0.001)
        self.register_buffer("zero", zero if words.get("asymmetric") else None)
        self.bias = nn.Parameter(torch.randn(n, generator=draw)) if bias else None
        self.words = (
            bits,
            group,
            words["activations"],
            words.get("step", 1.0),
            words.get("origin", 0),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = OP(x, self.codes, self.scale, self.zero, self.bias, *self.words)
        return y


class Four(nn.Module):
    """Two linears that read one tensor of rank 3, without bias and with; two of rank 2."""

    def __init__(self, words: Words) -> None:
        super().__init__()
        self.query, self.key = Quantized(words, 0, bias=False), Quantized(words, 1)
        self.pooled, self.bare = Quantized(words, 2), Quantized(words, 3, bias=False)

    def forward(self, x: Tensor, pooled: Tensor) -> tuple[Tensor, ...]:
        return self.query(x), self.key(x), self.pooled(pooled), self.bare(pooled)


class Each(nn.Module):
    """Four linears of each scheme, all of the same two tensors."""

    def __init__(self, *schemes: Words) -> None:
        super().__init__()
        self.fours = nn.ModuleList([Four(words) for words in schemes])

    def forward(self, x: Tensor, pooled: Tensor) -> tuple[Tensor, ...]:
        return tuple(y for four in self.fours for y in four(x, pooled))


def draw(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    some = torch.Generator().manual_seed(10 * rows + seed)
    return torch.randn(rows, 5, K, generator=some), torch.randn(rows, K, generator=some)


def captured(*schemes: Words) -> Program:
    return capture(Each(*schemes), dict(zip(("x", "pooled"), draw(2), strict=True)))


def opened(program: Program, folder: Path, name: str) -> Runner:
    made = backend(target(name).backend)
    artifact = made.build(program, target(name), folder)
    return made.load(folder, program.signature.with_ports(artifact.ports), artifact.facts)


def same(runner: Runner, program: Program, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    got = runner.run([as_array(x) for x in inputs])
    for one, other in zip(got, map(as_array, program.run(inputs)), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        difference = np.abs(one.astype(np.float64) - other).max()
        assert difference <= tolerance * np.abs(other.astype(np.float64)).max()


def read(path: Path) -> onnx.ModelProto:
    return onnx.load(str(path), load_external_data=False)


def optimized(folder: Path, into: Path) -> Counter[str]:
    """Count what onnxruntime runs: products, and what stands between floats and integers."""
    session.optimize(folder / "model.onnx", into)
    kept = {*FUSED, "MatMulInteger", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
    kept |= {"MatMul", "Gemm", "FusedMatMul", "Cast", "Transpose"}
    return Counter(n.op_type for n in read(into).graph.node if n.op_type in kept)


FLOAT4, FLOAT8 = ({"activations": "float", "bits": bits} for bits in (4, 8))
TENSOR, ROW = ({"activations": name} for name in ("tensor", "row"))
STATIC = {"activations": "static", "step": 0.02, "origin": 120}
FLOATS = (
    FLOAT4 | {"group": 64}, FLOAT4 | {"group": 64, "asymmetric": True}, FLOAT4,
    FLOAT8 | {"group": 128}, FLOAT8 | {"group": 32, "asymmetric": True}, FLOAT8,
)  # fmt: skip
Row = tuple[str, tuple[Words, ...], float, int, dict[str, int]]
FORMS: dict[str, Row] = {
    "cpu weights": ("cpu", FLOATS, LEVEL_4, 20, {"MatMulNBits": 24}),
    "onnx weights": ("onnx", FLOATS, LEVEL_4, 21, {"MatMulNBits": 24}),
    "onnx 8-bit rows": ("onnx", (FLOAT8,), LEVEL_4, 20, {"MatMulNBits": 4}),
    "gpu weights": (
        "a100{plugins=off}", (FLOAT4 | {"group": 64}, FLOAT4, FLOAT8), LEVEL_4, 21,
        {"MatMulNBits": 12},
    ),
    "cpu activations": (
        "cpu", (TENSOR, ROW, STATIC), EXACT, 20,
        {"DynamicQuantizeLinear": 2, "QuantizeLinear": 4, "MatMulIntegerToFloat": 12},
    ),
    # Of rows, and of a static product with bias and rank 2, onnxruntime leaves the integer product.
    "onnx activations": (
        "onnx", (TENSOR, ROW, STATIC), EXACT, 20,
        {
            "DynamicQuantizeLinear": 2, "QuantizeLinear": 4, "MatMulIntegerToFloat": 7,
            "MatMulInteger": 5, "Cast": 5,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", thin(FORMS))
def test_numbers_and_what_the_engine_makes_of_it(tmp_path: Path, row: str) -> None:
    name, schemes, tolerance, opset, expected = FORMS[row]
    program = captured(*schemes)
    (tmp_path / "engine").mkdir()
    runner = opened(program, tmp_path / "engine", name)
    for rows in (1, 3):
        same(runner, program, draw(rows), tolerance)
    assert optimized(tmp_path / "engine", tmp_path / "optimized.onnx") == expected
    model = read(tmp_path / "engine" / "model.onnx")
    domains = {entry.domain: entry.version for entry in model.opset_import}
    assert domains.pop("") == opset
    assert set(domains) <= ({"com.microsoft"} if name == "cpu" else set())
    floats = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert max(np.prod(t.dims) for t in floats) <= N * K // 32, "a weight in float is in the file"


@pytest.mark.parametrize(
    ("name", "schemes"),
    [("cpu", (FLOATS[1], TENSOR)), ("onnx", (FLOAT4, STATIC)), ("a100", (FLOAT4 | {"group": 64},))],
)
def test_weights_made_when_they_are_written_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, schemes: tuple[Words, ...]
) -> None:
    """Inside the file and beside it; tensors of less than 1 MiB are made at once."""
    program, files = captured(*schemes), list[dict[str, bytes]]()
    for large in (0, 1 << 20):
        monkeypatch.setattr(quantized_draft, "LARGE", large)
        for beside in (0, 1 << 30):
            monkeypatch.setattr(onnx_file, "EXTERNAL_FROM", beside)
            folder = tmp_path / f"{large}-{beside}"
            folder.mkdir()
            backend("onnx").build(program, target(name), folder)
            files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(files[0]) == 2
    assert len(files[1]) == 1
    assert files[:2] == files[2:]


def test_static_on_a_gpu_is_signed_pairs(tmp_path: Path) -> None:
    program = captured(STATIC | {"origin": 128})
    runner = opened(program, tmp_path, "a100")
    same(runner, program, draw(3), EXACT)
    graph = read(tmp_path / "model.onnx").graph
    assert Counter(node.op_type for node in graph.node) == {
        "QuantizeLinear": 2, "DequantizeLinear": 8, "MatMul": 4, "Add": 2,
    }  # fmt: skip
    assert {t.data_type for t in graph.initializer} == {TensorProto.FLOAT, TensorProto.INT8}
    assert not readiness(tmp_path / "model.onnx", target("a100"))


def test_each_product_has_a_dequantized_weight_of_its_own(tmp_path: Path) -> None:
    """Linears of one weight share the initializer, never the DequantizeLinear: it must fuse."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Quantized(FLOAT4 | {"group": 64}, 0)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            total: Tensor = self.inner(x) + self.inner(y)
            return total

    x = draw(2)[0]
    program = capture(Tied(), {"x": x, "y": 2 * x})
    same(opened(program, tmp_path, "onnx"), program, (x, -x), LEVEL_4)
    graph = read(tmp_path / "model.onnx").graph
    sources = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert sources == ["quantized_linear.codes"] * 2
    cpu = tmp_path / "cpu"
    cpu.mkdir()
    same(opened(program, cpu, "cpu"), program, (x, -x), LEVEL_4)


def test_rows_that_no_block_divides(tmp_path: Path) -> None:
    sizes = (40, 96, 200)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pairs = [(k, words) for k in sizes for words in (FLOAT4, FLOAT8)]
            self.linears = nn.ModuleList([Quantized(words, k, k=k) for k, words in pairs])

        def forward(self, inputs: list[Tensor]) -> list[Tensor]:
            return [linear(inputs[place // 2]) for place, linear in enumerate(self.linears)]

    inputs = [torch.randn(2, k, generator=torch.Generator().manual_seed(k)) for k in sizes]
    program = capture(Odd(), {"inputs": inputs})
    same(opened(program, tmp_path, "cpu"), program, tuple(inputs), LEVEL_4)


def test_half_precision_on_the_cpu_is_computed_in_float32(tmp_path: Path) -> None:
    model = nn.Sequential(Quantized(TENSOR, 0, n=K), Quantized(FLOAT4 | {"group": 64}, 1))
    x = draw(2)[0].half()
    program = capture(model, {"input": x})
    same(opened(program, tmp_path, "cpu"), program, (x,), LEVEL_4)
    kinds = {t.data_type for t in read(tmp_path / "model.onnx").graph.initializer}
    assert TensorProto.FLOAT16 not in kinds


def test_half_precision_on_a_gpu_has_half_scales(tmp_path: Path) -> None:
    x = draw(2)[0].half()
    program = capture(_with_full_scales(Quantized(FLOAT4 | {"group": 64}, 0)), {"x": x})
    backend("onnx").build(program, target("a100{plugins=off}"), tmp_path)
    tensors = {t.name: t.data_type for t in read(tmp_path / "model.onnx").graph.initializer}
    assert tensors["quantized_linear.scale"] == TensorProto.FLOAT16
    assert tensors["quantized_linear.codes"] == TensorProto.INT4


def _with_full_scales(model: Quantized) -> Quantized:
    assert model.bias is not None
    model.bias.data = model.bias.data.half()
    return model


@pytest.mark.parametrize("name", ["cpu", "onnx", "a100"])
def test_a_4_bit_file_has_half_a_byte_for_each_weight(tmp_path: Path, name: str) -> None:
    size = 1024
    program = capture(
        Quantized(FLOAT4 | {"group": 128}, 0, k=size, n=size), {"x": torch.randn(2, size)}
    )
    backend("onnx").build(program, target(name), tmp_path)
    codes, scales, rest = size * size // 2, 4 * size * size // 128, 4 * size + 4096
    assert codes + scales < (tmp_path / "model.onnx").stat().st_size < codes + scales + rest


def test_weights_that_the_file_blows_up_are_weighed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4-bit weights as floats take 8 times their bytes, which is no attack; a fill of zeros is."""
    monkeypatch.setattr(onnx_size, "MAX_FOLDED", 4000)
    backend("onnx").build(captured(FLOAT4 | {"group": 64}), target("onnx"), tmp_path)
    check_file(tmp_path / "model.onnx")
    monkeypatch.setattr(onnx_size, "_WIDENED", 1)
    with pytest.raises(UnsafeFileError, match=r"\(DequantizeLinear\) is a constant of"):
        check_file(tmp_path / "model.onnx")


# --- refusals ---------------------------------------------------------------------------------

REFUSED: list[tuple[str, Words, str]] = [
    ("a100", TENSOR, "no product of int8 weights and activations whose ranges are found at run"),
    ("a100", ROW, "no product of int8 weights and activations whose ranges are found row by row"),
    ("a100", FLOAT4 | {"group": 64, "asymmetric": True}, "takes no zero points"),
    ("a100", FLOAT4 | {"group": 32}, "blocks of 32 weights are no multiple of 128 or 64"),
    ("a100", FLOAT8 | {"group": 64}, "it takes one scale a row of weights, not one for 64"),
    ("a100", STATIC, "it takes activations around code 128 alone, not 120"),
    ("cpu", FLOAT4 | {"group": 8}, "blocks of 8 weights are no multiple of 256 or 128"),
    (
        "cpu",
        TENSOR | {"bits": 4},
        "no product of int4 weights and activations whose ranges are found at run time",
    ),
    ("onnx", ROW | {"asymmetric": True}, "takes no zero points"),
]


@pytest.mark.parametrize(("name", "words", "reason"), REFUSED)
def test_refusals_name_the_linear(tmp_path: Path, name: str, words: Words, reason: str) -> None:
    program = capture(nn.Sequential(Quantized(words, 0)), {"input": draw(2)[1]}, dynamic=())
    with pytest.raises(PreconditionError) as caught:
        backend("onnx").build(program, target(name), tmp_path)
    assert reason in caught.value.reason
    assert caught.value.remedy
    assert caught.value.node.startswith("quantized_linear (quantized_linear.default) in 0 at ")
    assert not list(tmp_path.iterdir())


# --- the check of what the engine made --------------------------------------------------------


def transposed(draft: Draft, linear: Linear) -> ir.Value:
    """Write weights as [N, K] and turn them at run time: what no engine fuses."""
    packed = ir.PackedTensor(pack_pairs(linear.codes), ir.DataType.INT4, shape=linear.codes.shape)
    codes = draft.weight(linear, "codes", lambda: packed)
    scale = draft.weight(linear, "scale", lambda: linear.scale)
    weight = draft.op("DequantizeLinear", codes, scale, axis=1, block_size=linear.group)
    turned = draft.op("Transpose", weight, perm=[1, 0])
    return draft.op("MatMul", linear.x, turned, name=linear.name)


def test_a_linear_that_stays_in_parts_fails_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = quantized.Form(transposed, opset=21)
    monkeypatch.setattr(quantized, "FORMS", {**quantized.FORMS, ("cpu", "int4", "float"): slow})
    with pytest.raises(VerificationError) as caught:
        backend("ort").build(captured(FLOAT4 | {"group": 64}), target("cpu"), tmp_path)
    assert "(quantized_linear.default) in fours.0." in caught.value.reason
    assert "onnxruntime left it as DequantizeLinear, slower than in float" in caught.value.reason


def test_a_linear_without_constant_weights_fails_the_build(tmp_path: Path) -> None:
    class Late(nn.Module):
        def forward(self, x: Tensor, codes: Tensor) -> Tensor:
            y: Tensor = OP(x, codes, torch.ones(N, 1), None, None, 8, K, "float", 1.0, 0)
            return y

    codes = torch.ones(N, K, dtype=torch.int8)
    program = capture(Late(), {"x": draw(2)[1], "codes": codes}, dynamic=())
    with pytest.raises(VerificationError, match="runs 0 of 1 quantized linears on integers"):
        backend("ort").build(program, target("cpu"), tmp_path)
    runner = opened(program, tmp_path, "onnx")  # where it is right, and nobody promised speed
    same(runner, program, (draw(2)[1], codes), EXACT)


def test_branches_are_read_too() -> None:
    """A dequantized weight inside an If branch, held by the outer graph."""
    weight = numpy_helper.from_array(np.ones((4, 4), dtype=np.int8), "deep.codes")
    inner = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["deep.codes", "s"], ["w"])], "b", [], []
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph([node], "g", [], [], [weight])
    with pytest.raises(
        VerificationError, match=r"deep in layer\.3: onnxruntime left it as Dequant"
    ):
        check_graphs([graph], {"deep": "deep in layer.3"})


def test_linears_that_are_lost_are_named(tmp_path: Path) -> None:
    program = captured(TENSOR)
    backend("onnx").build(program, target("cpu"), tmp_path)
    names = [node.name for node in quantized.linears(program)]
    check_fused([tmp_path / "model.onnx"], {name: name for name in names})
    with pytest.raises(VerificationError, match="other: onnxruntime runs 4 of 5"):
        check_fused([tmp_path / "model.onnx"], {name: name for name in (*names, "other")})
