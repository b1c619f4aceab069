"""Choosing execution providers and binding inputs: real onnxruntime on the CPU, and stand-ins.

No GPU is used: a provider of a GPU is only ever refused here, or stood in for.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from effopt.backend import YES, Array, Support
from effopt.backends import cuda_driver, ort_providers, session
from effopt.backends.ort_providers import CPU, CUDA, TENSORRT, WANTED, Bound, Choice, choose, usable
from effopt.backends.session import Session
from effopt.errors import MissingError, UsageError, VerificationError
from effopt.signature import Signature, TensorSpec
from effopt.target import TARGETS

SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 3), "x"), TensorSpec("i", "int64", ("batch",), "i")),
    (TensorSpec("y", "float32", ("batch", 3), "y"), TensorSpec("rows", "float32", (), "rows")),
    {"tuple": [0, 1]},
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model: y = x + x, and the rows of a table that `i` names."""
    table = helper.make_tensor("table", TensorProto.FLOAT, [4, 2], range(8))
    nodes = [
        helper.make_node("Add", ["x", "x"], ["y"]),
        helper.make_node("Gather", ["table", "i"], ["rows"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("i", TensorProto.INT64, ["batch"]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", 2]),
        ],
        [table],
    )
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def feeds(count: int, start: float = 0.0) -> list[Array]:
    x = np.arange(start, start + 3 * count, dtype=np.float32).reshape(count, 3)
    return [x, np.arange(count, dtype=np.int64) % 4]


def right(run: Callable[[list[Array]], list[Array]], inputs: list[Array]) -> None:
    y, rows = run(inputs)
    assert np.array_equal(y, 2 * inputs[0])
    assert np.array_equal(rows[:, 0], 2.0 * inputs[1])


# --- the CPU ------------------------------------------------------------------------------------


def test_every_kind_of_target_has_its_providers() -> None:
    assert {row.kind for row in TARGETS.values()} == set(WANTED)
    assert all(wanted[-1] == CPU for wanted in WANTED.values())


def test_a_cpu_target_opens_one_plain_session(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before there was anything to choose: nothing is asked, bound or left to a fallback."""
    asked: list[Any] = []
    real = onnxruntime.InferenceSession

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    monkeypatch.setattr(ort_providers, "usable", None)
    monkeypatch.setattr(session, "Bound", None)
    opened = Session(file, SIGNATURE)
    right(opened.run, feeds(2))
    assert asked == [{"providers": [CPU]}]
    assert (opened.providers, opened.reasons, opened.note) == ((CPU,), (), "")


def test_a_gpu_target_without_a_gpu_runs_on_the_cpu_and_says_why(file: Path) -> None:
    opened = Session(file, SIGNATURE, kind="gpu")
    right(opened.run, feeds(2))
    assert opened.providers == (CPU,)
    tensorrt, cuda = opened.reasons
    without = f"onnxruntime {onnxruntime.__version__} is without it"
    assert tensorrt.startswith(f"not on Tensorrt: {without}")
    assert cuda.startswith(f"not on CUDA: {without}: pip install 'effopt[ort-gpu]'")
    assert opened.note == f"{tensorrt}; {cuda}"


def test_a_file_that_is_only_checked_asks_for_no_gpu(file: Path) -> None:
    assert Session(file, SIGNATURE, check_only=True, kind="gpu").reasons == ()


def test_the_error_of_a_file_is_that_of_the_file(tmp_path: Path, file: Path) -> None:
    model = onnx.load(file)
    model.graph.node[0].op_type = "Nonsense"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(VerificationError, match="onnxruntime cannot load"):
        Session(tmp_path / "model.onnx", SIGNATURE, kind="gpu")


# --- choosing -----------------------------------------------------------------------------------


class Opened:
    """A session of a runtime that is stood in for."""

    def __init__(self, providers: list[str]) -> None:
        self._providers = providers

    def get_providers(self) -> list[str]:
        return self._providers


def runtime(*offered: str, prints: str = "", path: str = "/nowhere/__init__.py") -> Any:
    return SimpleNamespace(
        __version__="1.31.1",
        __file__=path,
        get_available_providers=lambda: [*offered, CPU],
        preload_dlls=lambda: print(prints),
    )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "available", lambda: YES)


@pytest.mark.usefixtures("driver")
def test_the_best_provider_that_loads_is_taken() -> None:
    chosen = choose(WANTED["gpu"], runtime(TENSORRT, CUDA), lambda providers: Opened([*providers]))
    assert chosen.providers == (TENSORRT, CUDA, CPU)
    assert chosen.reasons == ()
    assert chosen.on_gpu


@pytest.mark.usefixtures("driver")
def test_a_provider_that_fails_gives_its_reason_and_the_next_is_tried() -> None:
    def opened(providers: list[str]) -> Opened:
        if TENSORRT in providers:
            raise VerificationError("onnxruntime cannot load model.onnx: no engine for TopK", "")
        return Opened([*providers])

    chosen = choose(WANTED["gpu"], runtime(TENSORRT, CUDA), opened)
    assert chosen.providers == (CUDA, CPU)
    (reason,) = chosen.reasons
    assert reason == "not on Tensorrt: onnxruntime cannot load model.onnx: no engine for TopK"


@pytest.mark.usefixtures("driver")
def test_a_provider_that_is_dropped_without_a_word_is_seen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A session opens although the libraries of its provider are missing; only the log says it."""
    here = runtime(CUDA, prints="Failed to load libcudnn.so.9: cannot open")
    chosen = choose(WANTED["gpu"], here, lambda providers: Opened([CPU]))
    assert chosen.providers == (CPU,)
    assert not chosen.on_gpu
    assert chosen.reasons[1] == (
        "not on CUDA: libraries that it needs do not load "
        "(Failed to load libcudnn.so.9: cannot open)"
    )
    assert capsys.readouterr().out == "", "standard output is for one JSON document"


def test_without_a_driver_no_provider_of_a_gpu_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    no = Support(False, "no NVIDIA driver on this machine")
    monkeypatch.setattr(cuda_driver, "available", lambda: no)
    tried: list[Any] = []

    def opened(providers: list[str]) -> Opened:
        tried.append(providers)
        return Opened([*providers])

    chosen = choose(WANTED["gpu"], runtime(TENSORRT, CUDA), opened)
    assert [*map(list, tried)] == [[CPU]]
    assert chosen.reasons[1] == "not on CUDA: no NVIDIA driver on this machine"


@pytest.mark.usefixtures("driver")
def test_the_tensorrt_that_a_provider_is_linked_with_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "capi").mkdir()
    linked = b"\0libnvinfer.so.10\0libnvinfer_plugin.so.10\0libnvinfer.so.10\0"
    (tmp_path / "capi" / ort_providers.LIBRARIES[TENSORRT]).write_bytes(linked)
    here = runtime(TENSORRT, CUDA, path=str(tmp_path / "__init__.py"))
    assert [*ort_providers.needs(TENSORRT, here)] == ["libnvinfer.so.10"]
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert usable(TENSORRT, here).reason.startswith("libnvinfer.so.10 cannot be loaded")
    assert usable(CUDA, here).ok


# --- binding ------------------------------------------------------------------------------------


@pytest.fixture
def bound(file: Path) -> Bound:
    """Bind to the device "cpu", which real onnxruntime takes: all but the device is as on a GPU."""
    plain = onnxruntime.InferenceSession(str(file), providers=[CPU])
    return Bound(Choice(plain, (CPU,), ()), ["y", "rows"], onnxruntime, "cpu")


def run(bound: Bound) -> Callable[[list[Array]], list[Array]]:
    return lambda inputs: bound.run(dict(zip(("x", "i"), inputs, strict=True)))


def test_bound_inputs_give_the_same_at_every_size(bound: Bound) -> None:
    for turn, count in enumerate((2, 2, 5, 1, 5, 2)):
        right(run(bound), feeds(count, 7.0 * turn))


def test_what_a_bound_run_returned_is_not_overwritten(bound: Bound) -> None:
    first, _ = run(bound)(feeds(2))
    kept = first.copy()
    run(bound)(feeds(2, 50.0))
    assert np.array_equal(first, kept)
    first[...] = 0  # nor does it change what comes
    right(run(bound), feeds(2))


def test_a_bound_input_is_made_once_for_a_shape(
    bound: Bound, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = onnxruntime.OrtValue.ortvalue_from_numpy

    def noted(array: Array, *device: Any) -> Any:
        made.append((array.shape, *device))
        return real(array, *device)

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", noted)
    for count in (2, 2, 2, 3):
        run(bound)(feeds(count))
    assert made == [((2, 3), "cpu", 0), ((2,), "cpu", 0), ((3, 3), "cpu", 0), ((3,), "cpu", 0)]


def test_an_input_with_gaps_is_taken(bound: Bound) -> None:
    x, i = feeds(4)
    right(run(bound), [x[::2], i[::2]])


# --- a session on a GPU, stood in for -------------------------------------------------------------


@pytest.fixture
def on_gpu(file: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Open a session as on CUDA, with the CPU in its place."""

    def chosen(wanted: Any, runtime: Any, opened: Callable[..., Any]) -> Choice:
        return Choice(opened(providers=[CPU]), (CUDA, CPU), ())

    class OnCpu(Bound):
        def __init__(self, choice: Choice, outputs: list[str], runtime: Any) -> None:
            super().__init__(choice, outputs, runtime, "cpu")

    monkeypatch.setattr(session, "choose", chosen)
    monkeypatch.setattr(session, "Bound", OnCpu)
    return Session(file, SIGNATURE, kind="gpu")


def test_a_session_on_a_gpu_binds_its_inputs(on_gpu: Session) -> None:
    right(on_gpu.run, feeds(3))
    right(on_gpu.run, feeds(2, 9.0))
    assert on_gpu.providers[0] == CUDA


def test_inputs_that_a_model_cannot_take_are_refused_there_as_well(on_gpu: Session) -> None:
    x, _ = feeds(2)
    with pytest.raises(UsageError, match="onnxruntime cannot run on these inputs"):
        on_gpu.run([x, np.array([1, 99])])


def test_too_little_memory_is_said(on_gpu: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    (*_, runtime_error) = ort_providers.refusals()

    def full(feeds: Any) -> Any:
        raise runtime_error("BFCArena: Failed to allocate memory for requested buffer of size 9")

    monkeypatch.setattr(Bound, "_run", lambda self, feeds: full(feeds))
    with pytest.raises(MissingError, match="the GPU has not enough memory"):
        on_gpu.run(feeds(2))


def test_a_session_that_is_tried_is_left_no_fallback_of_its_own(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this it prints that a provider failed, and goes on with another."""
    asked: list[Any] = []

    def noted(path: str, options: Any, **given: Any) -> Any:
        asked.append(given)
        return Opened([CUDA, CPU])

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    session._open(file, False, providers=(CUDA, CPU))
    settings = [{"use_tf32": "0"}, {}]
    assert asked == [{"providers": [CUDA, CPU], "enable_fallback": 0, "provider_options": settings}]
