"""The driver wrapper against a library that records its calls: arguments, frees, errors.

What it cannot show is how a real driver answers: `make test-gpu` does, where there is a GPU.
"""

import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from effopt.backends import cuda_api
from effopt.backends.cuda_driver import Buffer, Device, Event, Pinned, Stream, available, device
from effopt.backends.cuda_launch import Module, Pointer, launch
from effopt.errors import EffoptError, MissingError, UsageError, VerificationError
from tests import fake_cuda
from tests.fake_cuda import PTX, Fake, needs_gcc

pytestmark = needs_gcc


@pytest.fixture
def gpu(fake: Fake) -> Iterator[Device]:
    yield device(library=fake.path)
    fake.settle()


# --- the table of functions ---------------------------------------------------------------------


def test_every_function_is_called_with_as_many_arguments_as_it_has() -> None:
    assert {name: len(types) for name, types in cuda_api.FUNCTIONS.items()} == fake_cuda.functions()


@pytest.mark.skipif(fake_cuda.header() is None, reason="there is no cuda.h to check against")
def test_the_stand_in_has_the_functions_of_the_real_header(cuda_library: Path) -> None:
    assert cuda_library.exists(), "it was compiled with -DWITH_CUDA_H"


# --- the device ---------------------------------------------------------------------------------


def test_without_a_driver_it_says_so_in_one_line(tmp_path: Path) -> None:
    path = str(tmp_path / "libcuda.so.1")
    assert available(path).reason == "no NVIDIA driver on this machine"
    with pytest.raises(MissingError, match="no NVIDIA driver on this machine"):
        device(library=path)


def test_a_driver_without_a_gpu_says_so(fake: Fake) -> None:
    fake.library.fake_devices(0)
    assert "CUDA_ERROR_NO_DEVICE" in available(fake.path).reason


def test_a_library_that_lacks_a_function_is_an_old_driver(tmp_path: Path) -> None:
    (tmp_path / "old.c").write_text("int cuInit(unsigned flags) { return 0; }")
    path = tmp_path / "old.so"
    fake_cuda.subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", path, tmp_path / "old.c"], check=True
    )
    with pytest.raises(MissingError, match="the NVIDIA driver has no cu") as caught:
        device(library=str(path))
    assert "newer NVIDIA driver" in caught.value.remedy


def test_a_device_tells_what_it_is(gpu: Device, fake: Fake) -> None:
    assert available(fake.path).ok
    assert (gpu.name, gpu.capability, gpu.arch) == ("Fake 0", (8, 6), "sm_86")
    assert (gpu.memory, gpu.processors, gpu.shared_limit) == (24 << 30, 84, 101376)
    assert gpu.cuda == "13.2"
    assert gpu.free_memory() == 20 << 30


def test_a_device_that_is_not_there_is_refused(fake: Fake) -> None:
    with pytest.raises(MissingError, match="no GPU 1: the NVIDIA driver finds 1"):
        device(1, fake.path)


def test_the_context_is_released_when_nothing_uses_it(fake: Fake) -> None:
    gpu = device(library=fake.path)
    buffer = Buffer(gpu, 8)
    del gpu
    assert fake.retained == 1, "the buffer still needs it"
    del buffer
    assert (fake.retained, fake.alive()) == (0, 0)
    assert [call[0] for call in fake.calls()][-2:] == [
        "cuMemFree_v2",
        "cuDevicePrimaryCtxRelease_v2",
    ]


def test_any_thread_can_take_and_give_back(gpu: Device) -> None:
    """A context is current on the thread that made it so; the stand-in holds to that."""
    held = [Buffer(gpu, 4)]
    for work in (lambda: held.append(Buffer(gpu, 4)), lambda: [one.close() for one in held]):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(held) == 2


# --- memory and streams -------------------------------------------------------------------------


def test_memory_comes_back_as_it_went(gpu: Device, fake: Fake) -> None:
    given = np.arange(12, dtype=np.float32).reshape(3, 4)
    with Buffer(gpu, given.nbytes) as buffer, Stream(gpu) as stream:
        fake.forget()
        got = np.empty_like(given)
        stream.upload(buffer, given)
        stream.download(got, buffer)
        stream.synchronize()
        assert fake.calls() == [
            ("cuMemcpyHtoDAsync_v2", buffer.handle, given.ctypes.data, 48, stream.handle),
            ("cuMemcpyDtoHAsync_v2", got.ctypes.data, buffer.handle, 48, stream.handle),
            ("cuStreamSynchronize", stream.handle),
        ]
    assert np.array_equal(got, given)


def test_pinned_memory_is_an_array(gpu: Device) -> None:
    with Pinned(gpu, 64) as pinned:
        array = pinned.array((2, 3), np.float16)
        array[...] = 1.5
        assert pinned.array((6,), np.float16).tolist() == [1.5] * 6


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros(5, np.float32), "20 bytes do not fit in 16"),
        (np.zeros((4, 2), np.float32)[:, 0], "gaps"),
    ],
)
def test_a_copy_that_does_not_fit_is_refused(gpu: Device, array: np.ndarray, reason: str) -> None:
    with Buffer(gpu, 16) as buffer, Stream(gpu) as stream:
        with pytest.raises(UsageError, match=reason):
            stream.upload(buffer, array)
        with pytest.raises(UsageError, match=reason):
            stream.download(array, buffer)


def test_nothing_is_written_into_an_array_that_is_read_only(gpu: Device) -> None:
    fixed = np.zeros(4, np.float32)
    fixed.flags.writeable = False
    with (
        Buffer(gpu, 16) as buffer,
        Stream(gpu) as stream,
        pytest.raises(UsageError, match="read-only"),
    ):
        stream.download(fixed, buffer)


def test_what_was_given_back_is_given_back_once_and_not_used(gpu: Device, fake: Fake) -> None:
    with Buffer(gpu, 8) as buffer:
        pass
    buffer.close()
    assert len(fake.calls("cuMemFree_v2")) == 1
    with pytest.raises(UsageError, match="this Buffer was given back already"):
        buffer.handle  # noqa: B018


def test_an_error_of_the_work_is_not_hidden_by_one_of_the_cleanup(fake: Fake) -> None:
    """After an illegal address every call fails: the first error is the one to be seen."""
    gpu = device(library=fake.path)
    with (
        pytest.raises(ValueError, match="first") as caught,
        fake.failing("cuMemFree_v2", 700),
        Buffer(gpu, 8),
    ):
        raise ValueError("first")
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in caught.value.__notes__[0]


def test_events_tell_seconds(gpu: Device) -> None:
    with Event(gpu) as start, Event(gpu) as stop, Stream(gpu) as stream:
        start.record(stream)
        stop.record(stream)
        stop.synchronize()
        assert stop.since(start) == pytest.approx(0.0015)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "remedy"),
    [
        (2, MissingError, "smaller batch"),
        (700, VerificationError, "compute-sanitizer"),
        (1, EffoptError, "report this"),
    ],
)
def test_a_return_code_is_an_error_with_name_and_remedy(
    gpu: Device, fake: Fake, code: int, kind: type[EffoptError], remedy: str
) -> None:
    with fake.failing("cuMemAlloc_v2", code), pytest.raises(EffoptError) as caught:
        Buffer(gpu, 1000)
    assert type(caught.value) is kind
    name = {2: "OUT_OF_MEMORY", 700: "ILLEGAL_ADDRESS", 1: "INVALID_VALUE"}[code]
    said = f"cuMemAlloc_v2: CUDA_ERROR_{name} ({code}): 1000 bytes of Fake 0"
    assert caught.value.reason == said
    assert remedy in caught.value.remedy


def test_a_code_without_a_name_is_an_error_as_well(gpu: Device, fake: Fake) -> None:
    with fake.failing("cuMemAlloc_v2", 12345), pytest.raises(EffoptError, match="unknown error"):
        Buffer(gpu, 8)


def test_every_kind_of_error_has_a_remedy() -> None:
    assert all(remedy for _, remedy in cuda_api.MEANINGS.values())


# --- kernels ------------------------------------------------------------------------------------


def test_a_launch_passes_its_arguments_in_order_and_by_size(gpu: Device, fake: Fake) -> None:
    x, y = np.float32([1, 2, 3]), np.zeros(3, np.float32)
    with (
        Module(gpu, PTX) as module,
        Buffer(gpu, 12) as source,
        Buffer(gpu, 12) as target,
        Stream(gpu) as stream,
    ):
        stream.upload(source, x)
        add_one = module.function("add_one")
        launch(add_one, (7, 6, 5), (4, 3, 2), 99, stream, [source, 3, Pointer(target.handle)])
        stream.download(y, target)
        stream.synchronize()
        grid, arguments = (7, 6, 5, 4, 3, 2, 99), (source.handle, 3, target.handle)
        assert fake.calls("cuLaunchKernel") == [
            ("cuLaunchKernel", *grid, stream.handle, *arguments)
        ]
    assert y.tolist() == [2, 3, 4]


def test_a_negative_scalar_is_an_int32(gpu: Device, fake: Fake) -> None:
    with Module(gpu, PTX) as module, Buffer(gpu, 8) as buffer, Stream(gpu) as stream:
        launch(module.function("nothing"), (1, 1, 1), (1, 1, 1), 0, stream, [buffer, -5, buffer])
    (call,) = fake.calls("cuLaunchKernel")
    assert struct.unpack("<i", struct.pack("<Q", call[10])[:4]) == (-5,)


def test_a_scalar_that_is_no_int32_is_refused(gpu: Device) -> None:
    with Module(gpu, PTX) as module, Buffer(gpu, 8) as buffer, Stream(gpu) as stream:
        function = module.function("nothing")
        with pytest.raises(UsageError, match="no int32"):
            launch(function, (1, 1, 1), (1, 1, 1), 0, stream, [buffer, 2**31, buffer])


def test_more_shared_memory_is_asked_for_where_it_is_needed(gpu: Device, fake: Fake) -> None:
    with Module(gpu, PTX) as module, Buffer(gpu, 8) as buffer, Stream(gpu) as stream:
        function, arguments = module.function("nothing"), [buffer, 1, buffer]
        launch(function, (1, 1, 1), (1, 1, 1), 48 * 1024, stream, arguments)
        assert not fake.calls("cuFuncSetAttribute")
        launch(function, (1, 1, 1), (1, 1, 1), 64 * 1024, stream, arguments)
        (call,) = fake.calls("cuFuncSetAttribute")
        assert call[2:] == (cuda_api.MAX_DYNAMIC_SHARED, 64 * 1024)
        with pytest.raises(MissingError, match="nothing needs 204800 bytes of shared memory"):
            launch(function, (1, 1, 1), (1, 1, 1), 200 * 1024, stream, arguments)


def test_a_launch_that_fails_says_which(gpu: Device, fake: Fake) -> None:
    with (
        Module(gpu, PTX) as module,
        Buffer(gpu, 8) as buffer,
        Stream(gpu) as stream,
        pytest.raises(EffoptError, match=r"nothing on a grid of \(0, 1, 1\), blocks of"),
    ):
        launch(module.function("nothing"), (0, 1, 1), (1, 1, 1), 0, stream, [buffer, 1, buffer])


def test_ptx_that_is_newer_than_the_driver_gets_its_remedy(gpu: Device, fake: Fake) -> None:
    with fake.failing("cuModuleLoadDataEx", 222), pytest.raises(MissingError) as caught:
        Module(gpu, PTX)
    assert "CUDA_ERROR_UNSUPPORTED_PTX_VERSION (222)" in caught.value.reason
    assert "install a driver of that CUDA version" in caught.value.remedy


def test_what_is_no_code_is_an_error_with_the_words_of_the_compiler(gpu: Device) -> None:
    with pytest.raises(VerificationError, match="ptxas fatal: line 3 of the image"):
        Module(gpu, b"no code")


def test_an_entry_that_is_not_there_is_named(gpu: Device) -> None:
    with Module(gpu, PTX) as module, pytest.raises(VerificationError, match="entry 'add_two'"):
        module.function("add_two")


def test_a_function_ends_with_its_module(gpu: Device) -> None:
    with Module(gpu, PTX) as module:
        function = module.function("nothing")
        found = function.attributes()
        assert found["registers"] == 104, "the stand-in gives 100 and the number of the attribute"
        assert set(found) == set(cuda_api.FUNCTION_ATTRIBUTES)
    with pytest.raises(UsageError, match="this Module was given back already"):
        function.handle  # noqa: B018


# --- graphs -------------------------------------------------------------------------------------


def test_a_graph_does_the_work_again_but_not_while_it_is_captured(gpu: Device, fake: Fake) -> None:
    x, y = np.float32([1, 2]), np.zeros(2, np.float32)
    with (
        Module(gpu, PTX) as module,
        Buffer(gpu, 8) as source,
        Buffer(gpu, 8) as target,
        Stream(gpu) as stream,
    ):
        function = module.function("add_one")

        def work() -> None:
            stream.upload(source, x)
            launch(function, (1, 1, 1), (1, 1, 1), 0, stream, [source, 2, target])
            stream.download(y, target)

        with stream.capture(work) as graph:
            assert y.tolist() == [0, 0]
            assert fake.alive(fake_cuda.GRAPH) == 0, "what was recorded is no longer needed"
            graph.launch(stream)
            assert y.tolist() == [2, 3]
            x += 10
            graph.launch(stream)
            assert y.tolist() == [12, 13]
    assert fake.alive(fake_cuda.EXEC) == 0


def test_a_capture_whose_work_fails_leaves_the_stream_as_it_was(gpu: Device, fake: Fake) -> None:
    with Stream(gpu) as stream:
        with pytest.raises(ZeroDivisionError):
            stream.capture(lambda: print(1 / 0))
        stream.synchronize()
        with pytest.raises(EffoptError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
            stream.capture(stream.synchronize)
        stream.synchronize()
        with fake.failing("cuGraphInstantiateWithFlags", 2), pytest.raises(MissingError):
            stream.capture(lambda: None)
    assert fake.alive(fake_cuda.GRAPH) == 0
