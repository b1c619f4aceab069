"""4-bit layers of few rows are nodes of our plugin in files for a GPU; all others stay."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from effopt.backend import as_array
from effopt.backends.onnx_lower import lower
from effopt.backends.quantized import FEW_ROWS
from effopt.capture import capture
from effopt.exits import set_thresholds
from effopt.pipeline import Pipeline
from effopt.program import Program
from effopt.recipe import steps_of
from tests.exited import built, with_heads
from tests.test_quantized_forms import EXACT, FLOAT4, LEVEL_4, Quantized, opened, read, same
from tests.thin import thin

GROUP, WIDTH, TOKENS = FLOAT4 | {"group": 64}, 64, 12


class Reader(nn.Module):
    """An encoder layer over all tokens; a head on their mean, and on the last token as decoders."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Quantized(GROUP, 0, k=WIDTH, n=WIDTH)
        self.pooled = Quantized(GROUP, 1, k=WIDTH, n=24)
        self.next = Quantized(GROUP, 2, bias=False, k=WIDTH, n=40)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.layer(x)
        return self.pooled(x.mean(1)), self.next(x[:, -1:])


def nodes(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in read(path / "model.onnx").graph.node)


def test_few_rows_are_launched_and_many_are_not(tmp_path: Path) -> None:
    program = capture(Reader(), {"x": torch.randn(2, TOKENS, WIDTH)})
    for name, few in (("a100", 2), ("a100{plugins=off}", 0)):
        folder = tmp_path / name
        folder.mkdir()
        runner = opened(program, folder, name)
        for rows in (1, 3):
            same(runner, program, (torch.randn(rows, TOKENS, WIDTH),), LEVEL_4)
        counts = nodes(folder)
        assert (counts["Int4Linear"], counts["DequantizeLinear"]) == (few, 3 - few)


class Rows(nn.Module):
    """One layer on so many rows a sample; on all rows of the batch where `flat`."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.layer, self.flat = Quantized(GROUP, 0, k=WIDTH, n=16), flat

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, WIDTH) if self.flat else x).reshape(*x.shape[:-1], 16)


def launched(program: Program) -> int:
    return sum(n.op_type == "Int4Linear" for n in lower(program, "gpu", plugins=True).graph)


@pytest.mark.parametrize(
    ("shape", "dynamic", "flat", "count"),
    [
        ((2, WIDTH), ("batch",), False, 1),
        ((2, 1, FEW_ROWS, WIDTH), ("batch",), False, 1),
        ((2, 3, FEW_ROWS, WIDTH), ("batch",), False, 0),
        ((2, FEW_ROWS + 1, WIDTH), ("batch",), False, 0),
        ((2, TOKENS, WIDTH), ("batch",), True, 0),
        ((2, 4, WIDTH), (), False, 1),
        ((TOKENS, WIDTH), (), False, 0),
    ],
    ids=["pooled", "eight", "heads", "nine", "flattened", "fixed", "fixed rows"],
)
def test_rows_of_a_sample_are_what_counts(
    shape: tuple[int, ...], dynamic: tuple[str, ...], flat: bool, count: int
) -> None:
    program = capture(Rows(flat), {"x": torch.randn(shape)}, dynamic=dynamic)
    assert launched(program) == count


def test_the_file_has_half_a_byte_for_each_weight_and_exact_products(tmp_path: Path) -> None:
    """The function multiplies floats: nothing is rounded (measured: 3e-7)."""
    program = capture(Quantized(GROUP, 0, k=256, n=24), {"x": torch.randn(2, 256)})
    runner = opened(program, tmp_path, "a100")
    for rows in (1, 11):
        same(runner, program, (torch.randn(rows, 256),), EXACT)
    weights = {t.name: t for t in read(tmp_path / "model.onnx").graph.initializer}
    codes = weights["quantized_linear.codes"]
    assert (codes.data_type, list(codes.dims)) == (TensorProto.INT32, [24, 32])
    model = onnx.load(str(tmp_path / "model.onnx"))
    assert [function.name for function in model.functions] == ["Int4Linear"]


def test_half_precision_keeps_its_type(tmp_path: Path) -> None:
    model = Quantized(GROUP, 0, k=WIDTH, n=24)
    assert model.bias is not None
    model.bias.data = model.bias.data.half()
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(5)).half()
    program = capture(model, {"x": x})
    (got,) = opened(program, tmp_path, "a100").run([x.numpy()])
    assert got.dtype == np.float16
    (want,) = program.run((x,))
    assert np.abs(got.astype(np.float32) - want.float().numpy()).max() <= 2**-10 * want.abs().max()
    assert nodes(tmp_path)["Int4Linear"] == 1


class Early(nn.Module):
    """Three layers over four tokens; exits are meant behind tanh and behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first, second, third = self.layers
        h = torch.tanh(first(x))
        return {"score": self.head(third(second(h).relu() + h).mean(1))}


@pytest.mark.parametrize("form", thin(["if", "split"]))
def test_layers_behind_an_exit_are_launched_too(form: str, tmp_path: Path) -> None:
    """In the branch of an If, and in a file of their own (measured: 2e-7; heads stay floats)."""
    torch.manual_seed(0)
    program = capture(Early(), {"x": torch.randn(3, 4, WIDTH)})
    aten = torch.ops.aten
    behind = {n: 1 for n in program.nodes() if n.target in (aten.tanh.default, aten.add.Tensor)}
    with_heads(program, behind, "score", form)
    spec = "quantize{scheme=int4-rtn,group=64,least=1,symmetric=true}"
    program, _ = Pipeline(steps_of(spec)).run(program)
    runner = built(program, tmp_path, "a100")
    x = torch.randn(5, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    for tau, exit_ in ((-np.inf, 1), (np.inf, 3)):
        set_thresholds(program, [tau, tau])
        want = [as_array(part) for part in program.run((x,))]
        got = runner.run([as_array(x), np.full(2, tau, np.float32)])
        assert got[-1].tolist() == [exit_] * 5
        for one, other in zip(got, want, strict=True):
            assert np.abs(one - other).max() <= EXACT * np.abs(other).max()
    models = [onnx_ir.load(path) for path in tmp_path.glob("*.onnx")]
    found = [node.op_type for model in models for node in model.graph.all_nodes()]
    assert found.count("Int4Linear") == 3
