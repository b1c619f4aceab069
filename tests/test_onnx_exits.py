"""Exits in one ONNX file: a chain of If, on whole batches and on the rows that are left."""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from effopt.backend import Runner, as_array, backend
from effopt.errors import PreconditionError
from effopt.exits import find_exits, set_thresholds
from effopt.program import Program
from effopt.target import target
from tests.exited import built, compare, net, of_zoo

FORMS = ("if", "compact")
TOLERANCE = 1e-4
"""What differs at most, in float: 4e-6 was the largest seen."""

INTEGER = {"int8-dynamic": 0.05, "int4-rtn": 0.05}
"""What differs at most on integers, where a value in the middle of two codes falls to either side,
and ranges of activations are those of the rows that are left."""


def formed(program: Program, form: str) -> Program:
    """Return a fork of a program whose exits have another form."""
    fork = program.fork()
    exits = fork.get(find_exits)
    assert exits is not None
    exits.index.args = (*exits.index.args[:2], form)
    fork.changed()
    fork.compile()
    return fork


MODELS: dict[str, Callable[[], Program]] = {
    "layouts": net,
    "bert-padded": lambda: of_zoo("bert"),
    "vit": lambda: of_zoo("vit"),
}
SLOW = [
    pytest.param(name, marks=pytest.mark.slow) if name != "layouts" else name for name in MODELS
]


@functools.cache
def engine(name: str, form: str) -> tuple[Program, Path, Runner]:
    """Build a model of MODELS once for all tests."""
    program = formed(MODELS[name](), form)
    folder = Path(tempfile.mkdtemp(dir=_SCRATCH.name))
    return program, folder, built(program, folder)


_SCRATCH = tempfile.TemporaryDirectory(prefix="effopt-")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SLOW)
def test_every_row_keeps_its_own_exit_in_every_batch(name: str, form: str) -> None:
    program, _, runner = engine(name, form)
    for batch in (1, 3, 16):
        worst, seen = compare(program, runner.run, rows(program, batch))
        assert worst < TOLERANCE
        assert batch == 1 or seen == {1, 2, 3}


def rows(program: Program, count: int) -> tuple[torch.Tensor, ...]:
    """Draw so many rows of inputs like the samples, no two alike: else their scores are ties."""
    draw = torch.Generator().manual_seed(count)
    made = []
    for spec, sample in zip(program.signature.inputs, program.samples, strict=True):
        if "batch" not in spec.shape:
            made.append(sample)
            continue
        taken = sample[torch.arange(count) % len(sample)]
        if taken.is_floating_point():
            taken = taken + torch.randn(taken.shape, generator=draw)
        elif spec.name == "input_ids":
            taken = torch.randint(3, 90, taken.shape, generator=draw)
        made.append(taken)
    return tuple(made)


@pytest.mark.slow
def test_standard_operators_alone_say_it_too(tmp_path: Path) -> None:
    program = formed(net(), "compact")
    runner = built(program, tmp_path, "onnx")
    worst, seen = compare(program, runner.run, rows(program, 5))
    assert worst < TOLERANCE
    assert seen == {1, 2, 3}
    domains = {entry.domain for entry in onnx.load(tmp_path / "model.onnx").opset_import}
    assert domains == {""}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cpu", "onnx"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", INTEGER)
def test_integers_load_and_agree(scheme: str, form: str, kind: str, tmp_path: Path) -> None:
    check_integers(scheme, form, kind, tmp_path)


@pytest.mark.slow
def test_four_bit_weights_lie_within_their_branch(tmp_path: Path) -> None:
    """onnxruntime joins them with the product behind them, and looks in the branch alone."""
    check_integers("int4-rtn", "if", "onnx", tmp_path)


def check_integers(scheme: str, form: str, kind: str, folder: Path) -> None:
    program = formed(of_zoo("vit", f"quantize{{scheme={scheme},least=16}}"), form)
    runner = built(program, folder, kind)
    inputs = rows(program, 4)
    for tau, exit_ in ((-np.inf, 1), (np.inf, 3)):
        set_thresholds(program, [tau, tau])
        want = as_array(program.run(inputs)[0])
        got = runner.run([*map(as_array, inputs), np.full(2, tau, np.float32)])
        assert got[1].tolist() == [exit_] * 4
        assert float(np.abs(got[0] - want).max()) < INTEGER[scheme] * float(np.abs(want).max())


def test_thresholds_have_a_default_in_the_file() -> None:
    """A plain runtime, which knows nothing of exits, runs the file; nothing leaves early then."""
    program, folder, _ = engine("layouts", "if")
    plain = onnxruntime.InferenceSession(folder / "model.onnx")
    assert [port.name for port in plain.get_inputs()] == ["x", "scale"]
    feeds = {"x": as_array(program.samples[0]), "scale": as_array(program.samples[1])}
    names = [port.name for port in plain.get_outputs()]
    found = dict(zip(names, plain.run(None, feeds), strict=True))
    assert found["exit_index"].tolist() == [3, 3, 3]
    left = plain.run(None, {**feeds, "tau": np.full(2, -np.inf, np.float32)})
    assert dict(zip(names, left, strict=True))["exit_index"].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_what_no_row_needs_does_not_run(tmp_path: Path) -> None:
    """With thresholds that all rows reach, later blocks are not executed: read from a profile."""
    program, folder, _ = engine("bert-padded", "if")
    names = [spec.name for spec in program.signature.inputs]
    feeds = dict(zip(names, map(as_array, program.samples), strict=True))

    def softmaxes(tau: float) -> int:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / f"profile{tau}")
        session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        session.run(None, {**feeds, "tau": np.full(2, tau, np.float32)})
        events = json.loads(Path(session.end_profiling()).read_text())
        return sum(event.get("args", {}).get("op_name") == "Softmax" for event in events)

    assert (softmaxes(-np.inf), softmaxes(np.inf)) == (1, 3)  # one an attention call


def test_rows_cannot_leave_a_batch_of_fixed_size(tmp_path: Path) -> None:
    program = formed(net(dynamic=()), "compact")
    with pytest.raises(PreconditionError, match="rows cannot leave a batch of fixed size") as found:
        backend("ort").build(program, target("cpu"), tmp_path)
    assert "lower=if" in str(found.value)


def test_equal_weights_of_branches_are_stored_once() -> None:
    _, folder, _ = engine("layouts", "if")  # both exits share one head
    model = onnx.load(folder / "model.onnx")
    shapes = [tuple(tensor.dims) for tensor in model.graph.initializer]
    assert sum(set(shape) == {5, 64} for shape in shapes) == 2  # that of the exits, and the end's
