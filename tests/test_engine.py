"""A loaded engine: what it takes, what it gives, what it refuses, and that it needs no torch."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from effopt.backend import as_array, backend
from effopt.backends.session import Session
from effopt.capture import capture
from effopt.engine import (
    Engine,
    bind,
    check,
    cosine,
    load,
    relative_difference,
)
from effopt.errors import UnsafeFileError, UsageError, VerificationError
from effopt.folder import Manifest, write
from effopt.reference import write_reference
from effopt.signature import Signature, TensorSpec
from effopt.target import target


class Model(nn.Module):
    """ids [B, N] int64 and weights [B, N] float32 to a sum over tokens, and per-token values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, weights: Tensor) -> dict[str, Any]:
        x = self.table(ids) * weights[..., None]
        return {"logits": self.head(x.sum(1)), "ids": ids + 1, "rest": (x, None)}


IDS, WEIGHTS = torch.arange(10).reshape(2, 5), torch.rand(2, 5) + 0.5


def save(path: Path, model: nn.Module, inputs: dict[str, Tensor], name: str = "cpu") -> Path:
    """Write an engine folder as the compiler does, with reference arrays."""
    program, row = capture(model, inputs), target(name)

    def fill(folder: Path) -> Manifest:
        made = backend(row.backend).build(program, row, folder)
        outputs = tuple(
            replace(s, port=made.ports.get(s.name, s.port)) for s in program.signature.outputs
        )
        signature = replace(program.signature, outputs=outputs)
        names = [spec.name for spec in outputs]
        wanted = dict(zip(names, map(as_array, program.run(program.samples)), strict=True))
        samples = zip(signature.inputs, program.samples, strict=True)
        write_reference(folder, {s.name: as_array(x) for s, x in samples}, wanted, wanted)
        return Manifest("0.1.0", row.name, row.backend, signature, facts=dict(made.facts))

    return write(path, fill)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "out"
    return save(path, Model(), {"ids": IDS, "weights": WEIGHTS})


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load(folder)


def refused(engine: Engine, *arrays: Any, **named: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        engine(*arrays, **named)
    return caught.value


# --- results ----------------------------------------------------------------------------------


def test_outputs_nest_as_the_model_does(engine: Engine) -> None:
    for rows in (1, 2, 3):
        ids, weights = torch.arange(5 * rows).reshape(rows, 5) % 10, torch.rand(rows, 5)
        got, want = engine(ids, weights), Model()(ids, weights)
        assert list(got) == ["logits", "ids", "rest"]
        assert got["rest"][1] is None
        np.testing.assert_array_equal(got["ids"], want["ids"])
        scale = float(want["logits"].detach().abs().max())
        assert np.abs(got["logits"] - want["logits"].detach().numpy()).max() < 1e-5 * scale
        np.testing.assert_array_equal(got["rest"][0], want["rest"][0].detach())


def test_all_spellings_of_the_inputs(engine: Engine) -> None:
    want = engine(IDS, WEIGHTS)["logits"]
    ids, weights = IDS.numpy(), WEIGHTS.numpy()
    for got in (
        engine(ids, weights),
        engine(ids=ids, weights=weights),
        engine(ids, weights=weights),
        engine(ids.tolist(), weights.tolist()),
        engine(ids.astype(np.int32), weights.astype(np.float32)),
        engine(np.asfortranarray(ids), weights[::-1][::-1]),
        engine(IDS, WEIGHTS.clone().requires_grad_()),
    ):
        np.testing.assert_array_equal(got["logits"], want)
    ones = engine(ids, np.ones_like(weights))["logits"]
    np.testing.assert_array_equal(engine(ids, [[1] * 5] * 2)["logits"], ones)


def test_a_bare_tensor_comes_in_a_tuple(tmp_path: Path) -> None:
    engine = load(save(tmp_path / "out", nn.Linear(4, 2), {"input": torch.ones(2, 4)}))
    got = engine(torch.ones(3, 4))
    assert isinstance(got, tuple)
    assert [part.shape for part in got] == [(3, 2)]


def test_an_output_named_like_an_input_keeps_its_name(engine: Engine) -> None:
    port = next(spec.port for spec in engine.signature.outputs if spec.name == "ids")
    assert port == "ids_out"
    assert "ids" in engine(IDS, WEIGHTS)


def test_the_portable_folder_of_a_gpu_runs_here(tmp_path: Path) -> None:
    path = save(tmp_path / "out", nn.Linear(4, 2), {"input": torch.ones(2, 4)}, "a100")
    assert load(path)(torch.ones(1, 4))[0].shape == (1, 2)


def test_the_manifest_is_read_only(engine: Engine) -> None:
    assert engine.manifest["target"] == "cpu"
    assert engine.manifest["facts"]["opset"] == 20
    with pytest.raises(TypeError):
        engine.manifest["target"] = "a100"  # type: ignore[index]


def test_running_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from effopt.engine import check, load\n"
        f"engine = load({str(folder)!r})\n"
        "print(engine([[1, 2, 3, 4, 5]], [[1, 1, 1, 1, 1]])['ids'].tolist())\n"
        "print(all(figure.ok for figure in check(engine)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == "[[2, 3, 4, 5, 6]]\nTrue\n"


# --- refusals ---------------------------------------------------------------------------------

REMEDY = "the inputs are: ids int64 [batch, 5], weights float32 [batch, 5]"


def test_names(engine: Engine) -> None:
    for error, reason in (
        (refused(engine, IDS), "input 'weights' is missing"),
        (refused(engine, IDS, WEIGHTS, IDS), "3 inputs were given"),
        (refused(engine, IDS, WEIGHTS, ids=IDS), "input 'ids' is given twice"),
        (refused(engine, input_ids=IDS, weights=WEIGHTS), "there is no input 'input_ids'"),
    ):
        assert (error.reason, error.remedy) == (reason, REMEDY)


def test_types(engine: Engine) -> None:
    for value, got in (
        (WEIGHTS.double(), "float64"),
        (WEIGHTS.numpy().astype(np.complex64), "complex64"),
        (IDS, "int64"),
        ([[True] * 5] * 2, "bool"),
        ([["a"] * 5] * 2, "str32"),
        (None, "object"),
    ):
        error = refused(engine, IDS, value)
        assert error.reason == f"input 'weights' must be float32, got {got}"
        assert error.remedy == "convert it first, e.g. x.astype('float32')"
    for value, got in ((WEIGHTS, "float32"), (WEIGHTS.tolist(), "float64"), (IDS > 3, "bool")):
        assert refused(engine, value, WEIGHTS).reason == f"input 'ids' must be int64, got {got}"
    ragged = refused(engine, [[1, 2], [3]], WEIGHTS)
    assert ragged.reason.startswith("input 'ids' is no array: ")
    assert ragged.remedy == "ids int64 [batch, 5]"


def test_sizes(engine: Engine) -> None:
    assert refused(engine, IDS[0], WEIGHTS).reason == "input 'ids' has shape [5]"
    wide = refused(engine, IDS[:, :4], WEIGHTS)
    assert wide.reason == "input 'ids' has shape [2, 4]"
    assert wide.remedy == "pass ids int64 [batch, 5], no size 0"
    uneven = refused(engine, IDS, WEIGHTS[:1])
    assert uneven.reason == "input 'weights' has shape [1, 5], but batch is 2 in 'ids'"
    assert refused(engine, IDS[:0], WEIGHTS[:0]).reason == "input 'ids' has shape [0, 5]"


def test_a_value_that_the_model_cannot_take(engine: Engine) -> None:
    error = refused(engine, IDS + 5, WEIGHTS)
    assert error.reason.startswith("onnxruntime cannot run on these inputs: ")
    assert "check that the values and sizes" in error.remedy


def _one(dtype: str, shape: tuple[Any, ...]) -> Signature:
    return Signature((TensorSpec("x", dtype, shape, "x"),), (), None)


@pytest.mark.parametrize(
    ("dtype", "value", "fits"),
    [
        ("int8", [127], True), ("int8", [128], False), ("int8", np.array([1]), False),
        ("uint8", [-1], False), ("int64", np.array([1], np.int8), True),
        ("float32", [0.1], True), ("float16", [1], True), ("float32", np.float16([1]), True),
        ("float32", np.array([1]), False), ("int32", [1.0], False), ("bool", [True], True),
        ("bool", [1], False), ("int64", [2**63], False), ("bfloat16", [1.0], False),
    ],
)  # fmt: skip
def test_only_casts_that_keep_the_value(dtype: str, value: Any, fits: bool) -> None:
    signature = _one(dtype, ("batch",))
    if fits:
        assert bind(signature, (value,), {})[0].dtype.name == dtype
    else:
        with pytest.raises(UsageError, match=f"input 'x' must be {dtype}, got"):
            bind(signature, (value,), {})


def test_one_name_twice_in_one_input() -> None:
    square = _one("float32", ("length", "length"))
    bind(square, (np.zeros((3, 3), np.float32),), {})
    with pytest.raises(UsageError, match=r"input 'x' has shape \[3, 2\]"):
        bind(square, (np.zeros((3, 2), np.float32),), {})


# --- folders that are not what they were ------------------------------------------------------


def test_a_changed_model_is_not_opened(tmp_path: Path) -> None:
    path = save(tmp_path / "out", nn.Linear(4, 2), {"input": torch.ones(2, 4)})
    data = bytearray((path / "model.onnx").read_bytes())
    data[-1] ^= 1
    (path / "model.onnx").write_bytes(data)
    with pytest.raises(UnsafeFileError, match="its hash differs"):
        load(path)


def test_a_hostile_model_with_right_hashes_is_not_opened(tmp_path: Path) -> None:
    import onnx

    (tmp_path / "secret.bin").write_bytes(b"0" * 8)

    def fill(folder: Path) -> Manifest:
        tensor = onnx.TensorProto(name="w", data_type=1, dims=[2], data_location=1)
        tensor.external_data.add(key="location", value="hard.bin")
        graph = onnx.helper.make_graph([], "g", [], [], [tensor])
        (folder / "model.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
        (folder / "hard.bin").write_bytes(b"0" * 8)
        return Manifest("0.1.0", "cpu", "ort", _one("float32", (2,)))

    path = write(tmp_path / "out", fill)
    os.unlink(path / "hard.bin")
    os.link(tmp_path / "secret.bin", path / "hard.bin")  # same bytes, same hash
    with pytest.raises(UnsafeFileError, match="hard link"):
        load(path)


def test_a_folder_whose_backend_is_unknown(tmp_path: Path) -> None:
    record = Manifest("0.1.0", "cpu", "os:system", _one("float32", (2,)))
    with pytest.raises(UsageError, match="unknown backend 'os:system'"):
        load(write(tmp_path / "out", lambda folder: record))


# --- verification -----------------------------------------------------------------------------


def test_check_compares_with_what_was_stored(folder: Path, engine: Engine) -> None:
    figures = {figure.output: figure for figure in check(engine)}
    assert list(figures) == ["logits", "ids", "rest.0"]
    assert all(figure.ok for figure in figures.values())
    assert figures["logits"].difference < 1e-6 < figures["logits"].tolerance
    assert figures["logits"].cosine == pytest.approx(1, abs=1e-6)
    assert figures["ids"].tolerance == 0


def test_check_finds_another_model(tmp_path: Path, engine: Engine) -> None:
    torch.manual_seed(0)
    other = Model()
    with torch.no_grad():
        other.head.weight[0, 0] += 0.01  # one weight of 24, by 3 % of the largest
    path = save(tmp_path / "out", other, {"ids": IDS, "weights": WEIGHTS.detach()})
    changed = Engine(engine.folder, engine._manifest, load(path)._runner)
    figures = {figure.output: figure for figure in check(changed)}
    assert not figures["logits"].ok
    assert figures["rest.0"].ok


def test_check_without_reference(tmp_path: Path) -> None:
    class Nothing:
        def run(self, inputs: list[Any]) -> list[Any]:
            raise AssertionError("not to be run")

    record = Manifest("0.1.0", "cpu", "ort", _one("float32", (2,)))
    path = write(tmp_path / "out", lambda folder: record)
    with pytest.raises(UsageError, match="holds no reference inputs"):
        check(Engine(path, record, Nothing()))


def test_check_without_the_reference_of_an_output(tmp_path: Path, engine: Engine) -> None:
    spec = TensorSpec("x", "float32", (2,), "x")
    signature = Signature((spec,), (replace(spec, name="y"),), 0)
    record, x = Manifest("0.1.0", "cpu", "ort", signature), np.zeros(2, np.float32)

    class Same:
        def run(self, inputs: list[Any]) -> list[Any]:
            return inputs

    def fill(folder: Path) -> Manifest:
        write_reference(folder, {"x": x}, {"y": x}, {"z": x})
        return record

    path = write(tmp_path / "out", fill)
    with pytest.raises(UsageError, match=r"no reference 'optimized\.y'"):
        check(Engine(path, record, Same()))


def test_outputs_of_other_names_than_the_signatures_are_refused(engine: Engine) -> None:
    outputs = tuple(replace(spec, port="else") for spec in engine.signature.outputs)
    with pytest.raises(VerificationError, match="gives"):
        Session(engine.folder / "model.onnx", replace(engine.signature, outputs=outputs))


def test_figures() -> None:
    zero, nan = np.zeros(3), np.full(3, np.nan)
    assert relative_difference(zero, zero) == 0
    assert relative_difference(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5
    assert not relative_difference(nan, zero) <= 1e9
    assert not relative_difference(zero, nan) <= 1e9
    assert cosine(np.array([1.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(0.5**0.5)
    assert np.isnan(cosine(zero, zero))
    assert np.isnan(cosine(zero, np.ones(4)))


def test_what_is_hidden_in_both_outputs_is_equal() -> None:
    """Logits of -inf made the difference of engines with any rounding no number."""
    one, other = (np.array([1.0, -np.inf, end]) for end in (2.0, 2.5))
    assert relative_difference(one, other) == 0.2
    assert cosine(one, one) == pytest.approx(1)
    assert relative_difference(one, np.array([1.0, 3.0, 2.0])) == np.inf
    assert not relative_difference(np.array([1.0, 3.0, 2.0]), one) <= 1e9
