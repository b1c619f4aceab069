"""Running plans, against stand-ins for TensorRT and for CUDA's driver.

The stand-ins compute and record; what a GPU does, they cannot show. With TensorRT-RTX installed,
its classes must have every name that the stand-in has, and its runtime really refuses a plan.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effopt.backend import Array
from effopt.backends import trt_load
from effopt.backends.cuda_driver import Device, device
from effopt.backends.trt_load import DEFAULTS, Options
from effopt.backends.trt_runner import TrtRunner
from effopt.errors import (
    EffoptError,
    MissingError,
    UnsafeFileError,
    UsageError,
    VerificationError,
)
from effopt.signature import Signature, TensorSpec
from tests import fake_cuda, fake_trt
from tests.fake_cuda import Fake, needs_gcc

pytestmark = needs_gcc

X = TensorSpec("images", "float32", ("batch", 4), "x")
IDS = TensorSpec("ids", "int64", ("batch",), "ids")
Y = TensorSpec("scores", "float32", ("batch", 4), "y")
NEXT = TensorSpec("next", "int64", ("batch",), "next")
SIGNATURE = Signature((X, IDS), (Y, NEXT), {"tuple": [0, 1]})


@pytest.fixture
def gpu(fake: Fake) -> Iterator[Device]:
    yield device(library=fake.path)
    sys.modules.pop("tensorrt", None)
    fake.settle()


Open = Callable[..., TrtRunner]


@pytest.fixture
def opened(fake: Fake, gpu: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    def open_one(
        signature: Signature = SIGNATURE,
        said: str = "",
        options: Options = DEFAULTS,
        **changes: Any,
    ) -> TrtRunner:
        monkeypatch.setitem(sys.modules, "tensorrt", fake_trt.module(fake, said))
        path = tmp_path / "model.plan"
        path.write_bytes(fake_trt.plan(**changes))
        return TrtRunner(path, signature, "tensorrt", options=options, gpu=gpu)

    return open_one


def engine() -> fake_trt.ICudaEngine:
    """Return the engine that was loaded last."""
    (*_, last) = sys.modules["tensorrt"].engines
    return last  # type: ignore[no-any-return]


def rows(count: int, start: float = 0.0, width: int = 4) -> list[Array]:
    x = np.arange(start, start + count * width, dtype=np.float32).reshape(count, width)
    return [x, np.arange(count, dtype=np.int64)]


def right(runner: TrtRunner, inputs: list[Array]) -> None:
    y, following = runner.run(inputs)
    assert np.array_equal(y, 2 * inputs[0])
    assert np.array_equal(following, inputs[1] + 1)
    assert (y.dtype, following.dtype) == (np.float32, np.int64)


# --- running ------------------------------------------------------------------------------------


def test_outputs_come_in_the_order_of_the_signature(opened: Open) -> None:
    runner = opened()
    right(runner, rows(2))
    swapped = opened(replace(SIGNATURE, outputs=(NEXT, Y), inputs=(IDS, X)))
    following, y = swapped.run(rows(2)[::-1])
    assert np.array_equal(y, 2 * rows(2)[0])
    assert following.tolist() == [1, 2]


def test_one_run_is_copies_in_the_engine_and_copies_out(opened: Open, fake: Fake) -> None:
    runner = opened()
    runner.run(rows(2))
    fake.forget()
    runner.run(rows(2))
    names = [call[0] for call in fake.calls()]
    copies = ["cuMemcpyHtoDAsync_v2"] * 2 + ["cuMemcpyDtoHAsync_v2"] * 2
    assert names == ["cuCtxSetCurrent", *copies, "cuStreamSynchronize"]
    sizes = [call[3] for call in fake.calls("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2")]
    assert sizes == [32, 16, 32, 16]


def test_memory_is_kept_and_grows_when_it_must(opened: Open, fake: Fake) -> None:
    runner = opened()
    right(runner, rows(4))
    fake.forget()
    right(runner, rows(2))
    right(runner, rows(4, 5.0))
    assert not fake.calls("cuMemAlloc_v2", "cuMemHostAlloc")
    right(runner, rows(8))
    assert [call[1] for call in fake.calls("cuMemAlloc_v2")] == [128, 64, 128, 64]
    assert fake.alive(fake_cuda.MEMORY) == fake.alive(fake_cuda.HOST) == 4


def test_what_a_run_returned_is_not_overwritten_by_the_next(opened: Open) -> None:
    runner = opened()
    for _ in range(5):  # the later ones through a graph
        first, _ = runner.run(rows(2))
        kept = first.copy()
        runner.run(rows(2, 100.0))
        assert np.array_equal(first, kept)


def test_inputs_with_gaps_are_taken(opened: Open) -> None:
    x, ids = rows(4)
    right(opened(), [x[::2], ids[::2]])


def test_everything_is_given_back_with_the_runner(opened: Open, fake: Fake) -> None:
    runner = opened()
    for _ in range(4):
        runner.run(rows(2))
    del runner
    sys.modules["tensorrt"].engines.clear()
    assert fake.alive() == 0


# --- sizes --------------------------------------------------------------------------------------


def test_the_profile_that_takes_the_sizes_is_used(opened: Open) -> None:
    runner = opened()
    right(runner, rows(2))
    right(runner, rows(20))
    right(runner, rows(3, width=9))
    right(runner, rows(2))


def test_sizes_outside_of_all_profiles_are_refused_with_their_ranges(opened: Open) -> None:
    with pytest.raises(UsageError) as caught:
        opened().run(rows(40))
    assert caught.value.reason == (
        "input 'images' has shape [40, 4], "
        "the engine was built for [1, 4] to [8, 4] or [1, 4] to [32, 16]"
    )
    with pytest.raises(UsageError, match=r"'images' has shape \[8\]"):
        opened().run([np.zeros(8, np.float32), rows(8)[1]])


def test_a_runner_goes_on_after_sizes_that_it_refused(opened: Open) -> None:
    runner = opened()
    for count in (2, 40, 2, 33, 20):
        if count > 32:
            with pytest.raises(UsageError):
                runner.run(rows(count))
        else:
            right(runner, rows(count))


def test_a_runner_goes_on_after_memory_was_short(opened: Open, fake: Fake) -> None:
    """Half of the buffers had grown: the shapes that fit before are set anew."""
    runner = opened()
    right(runner, rows(2))
    with fake.failing("cuMemAlloc_v2", 2, after=1), pytest.raises(MissingError, match="64 bytes"):
        runner.run(rows(8))
    right(runner, rows(2))
    right(runner, rows(8))


def test_an_output_whose_size_depends_on_values_is_refused(opened: Open) -> None:
    with pytest.raises(VerificationError, match="the size of y depends on values"):
        opened(open="y").run(rows(2))


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (rows(2)[:1], "1 inputs were given"),
        ([rows(2)[0].astype(np.float64), rows(2)[1]], "'images' must be float32, got float64"),
    ],
)
def test_a_wrong_number_or_type_is_refused(opened: Open, inputs: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        opened().run(inputs)


# --- graphs -------------------------------------------------------------------------------------


def test_a_shape_gets_its_graph_after_its_second_run(opened: Open, fake: Fake) -> None:
    runner = opened()
    for _ in range(2):
        right(runner, rows(2))
    assert not fake.calls("cuStreamBeginCapture_v2")
    right(runner, rows(2, 3.0))
    assert len(fake.calls("cuStreamBeginCapture_v2")) == 1
    fake.forget()
    right(runner, rows(2, 7.0))
    assert [call[0] for call in fake.calls()] == [
        "cuCtxSetCurrent",
        "cuGraphLaunch",
        "cuStreamSynchronize",
    ]
    assert runner.notes == ()


def test_other_shapes_leave_a_graph_as_it_is(opened: Open) -> None:
    """The stand-in refuses a change of a captured context, as the library leaves that open."""
    runner = opened()
    for count in (2, 2, 2, 4, 8, 20, 2, 3, 2, 4, 4, 4, 2):
        right(runner, rows(count, count))


def test_only_so_many_shapes_get_graphs(opened: Open, fake: Fake) -> None:
    runner = opened(options=Options(graphs=2))
    for count in (1, 2, 3) * 4:
        right(runner, rows(count))
    assert fake.alive(fake_cuda.EXEC) == 2
    assert len(engine().contexts) == 3


def test_graphs_can_be_left_out(opened: Open, fake: Fake) -> None:
    runner = opened(options=Options(graphs=0))
    for _ in range(5):
        right(runner, rows(2))
    assert not fake.calls("cuStreamBeginCapture_v2")
    assert len(engine().contexts) == 1


def test_an_engine_that_cannot_be_captured_runs_on_and_says_why(opened: Open) -> None:
    runner = opened(fails="capture is not possible with this layer")
    for count in (2, 2, 2, 2, 3, 3, 3):
        right(runner, rows(count))
    (note,) = runner.notes
    assert note.startswith("no CUDA graph for [[2, 4], [2]]: the engine cannot run")
    assert "not possible with this layer" in note


def test_a_context_too_many_for_the_memory_is_left_out_and_said(opened: Open) -> None:
    runner = opened(contexts=1)
    for _ in range(4):
        right(runner, rows(2))
    (note,) = runner.notes
    assert "the GPU has not enough memory" in note


def test_rtx_is_captured_when_it_says_that_it_can_be(
    opened: Open, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = [False, False, True]
    monkeypatch.setattr(
        fake_trt.IExecutionContext,
        "is_stream_capturable",
        lambda context, stream: ready.pop(0),
        raising=False,
    )
    runner = opened()
    for _ in range(6):
        right(runner, rows(2))
    assert not ready
    assert len(fake.calls("cuGraphLaunch")) == 1


# --- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "kind", "reason"),
    [
        (
            "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed."
            "Version tag does not match. Note: Current Version: 239, Serialized: 236",
            VerificationError,
            "another version of TensorRT",
        ),
        (
            "The engine plan file is generated on an incompatible device, "
            "expecting compute 8.6 got compute 8.9, please rebuild.",
            VerificationError,
            "another GPU",
        ),
        ("getPluginCreator could not find plugin: MergeTokens", MissingError, "a plugin"),
        (
            "[defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)",
            MissingError,
            "memory",
        ),
        (
            "This Engine was created with TensorRT 10.1. Rebuild the engine with the same version",
            VerificationError,
            "another version of TensorRT",
        ),
        ("Rebuild the engine for compute capability 8.6", VerificationError, "another GPU"),
        (
            "CUDA driver version is insufficient for CUDA runtime version",
            MissingError,
            "driver is not one",
        ),
        ("unspecific", VerificationError, "TensorRT says: unspecific"),
    ],
)
def test_a_plan_that_does_not_load_says_why(
    opened: Open, said: str, kind: type[EffoptError], reason: str
) -> None:
    with pytest.raises(EffoptError, match=reason) as caught:
        opened(said=said)
    assert type(caught.value) is kind
    assert caught.value.reason.startswith("model.plan cannot be loaded: ")
    assert caught.value.remedy


def test_a_plan_with_code_is_not_loaded(opened: Open) -> None:
    with pytest.raises(UnsafeFileError, match="carries code"):
        opened(code=True)


def test_weights_stay_on_the_device_as_far_as_the_budget_goes(opened: Open) -> None:
    opened()
    assert engine().weight_streaming_budget_v2 == 0
    opened(streamable=1000)
    assert engine().weight_streaming_budget_v2 == 500, "what the library recommends"
    opened(streamable=1000, options=Options(weight_budget=300))
    assert engine().weight_streaming_budget_v2 == 300


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"inputs": {"x": "float32"}}, r"takes and gives \['next', 'x', 'y'\]"),
        ({"outputs": {"y": "bfloat16", "next": "int64"}}, "y of model.plan is BF16"),
        ({"host": "ids"}, "reads ids as a shape"),
    ],
)
def test_a_plan_of_another_model_is_refused(opened: Open, changes: Any, reason: str) -> None:
    with pytest.raises(VerificationError, match=reason):
        opened(**changes)


def test_a_type_that_tensorrt_lacks_is_refused(opened: Open) -> None:
    wide = replace(SIGNATURE, inputs=(replace(X, dtype="float64"), IDS))
    with pytest.raises(VerificationError, match=r"x of model\.plan is FLOAT, .* float64"):
        opened(wide)


def test_no_module_is_imported_but_those_of_tensorrt() -> None:
    with pytest.raises(UsageError, match="'antigravity' is no TensorRT"):
        trt_load.library("antigravity")
    with pytest.raises(UsageError, match="'tensorrt_lean' is no TensorRT"):
        trt_load.library("tensorrt_lean")


@pytest.mark.parametrize("said", ["", "libnvinfer.so.10: no such file\nmore"])
def test_a_library_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    (tmp_path / "tensorrt.py").write_text(f"raise OSError({said!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingError) as caught:
        trt_load.library("tensorrt")
    first = said.partition("\n")[0] or "no reason given"
    assert caught.value.reason == f"tensorrt cannot be imported: {first}"


# --- the real library, without a GPU ------------------------------------------------------------

RTX = "tensorrt_rtx_bindings"


def test_the_classes_of_rtx_have_every_name_of_the_stand_in(fake: Fake) -> None:
    rtx = pytest.importorskip(RTX)
    for kind in (*fake_trt.CLASSES, fake_trt.RuntimeNames):
        real = getattr(rtx, kind.__name__.removesuffix("Names"))
        assert not {*public(kind)} - {*dir(real)}, kind.__name__
    instance = fake_trt.ICudaEngine(fake, None, {"inputs": {}, "outputs": {}, "ranges": []})
    assert not {*vars(instance)} - fake_trt.OWN - {"_names"} - {*dir(rtx.ICudaEngine)}
    assert hasattr(rtx.IExecutionContext, "is_stream_capturable")


def public(kind: type) -> list[str]:
    return [name for name in vars(kind) if not name.startswith("_")]


def test_rtx_refuses_what_is_no_plan(tmp_path: Path, gpu: Device) -> None:
    """The library runs for real: it needs a driver only for a plan that is one."""
    pytest.importorskip(RTX)
    path = tmp_path / "model.plan"
    path.write_bytes(b"no plan" * 100)
    with pytest.raises(EffoptError, match=r"model\.plan cannot be loaded") as caught:
        TrtRunner(path, SIGNATURE, RTX, gpu=gpu)
    assert "no plan of this library" in caught.value.reason
    assert "magicTag" in caught.value.reason
