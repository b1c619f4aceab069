"""The driver itself: a device, memory there and back, a kernel of hand-written PTX, a graph."""

import numpy as np
import pytest

from effopt.backends.cuda_driver import Buffer, Device, Event, Pinned, Stream
from effopt.backends.cuda_launch import Module, launch
from effopt.errors import VerificationError
from tests.fake_cuda import ADD_ONE

pytestmark = pytest.mark.gpu


def test_the_device_tells_what_it_is(gpu: Device) -> None:
    assert gpu.name
    assert gpu.capability >= (7, 5)
    assert gpu.shared_limit >= 48 * 1024
    assert 0 < gpu.free_memory() <= gpu.memory


def test_memory_comes_back_as_it_went(gpu: Device, stream: Stream) -> None:
    given = np.random.default_rng(0).random((1000, 37), np.float32)
    got = np.empty_like(given)
    with Buffer(gpu, given.nbytes) as buffer, Pinned(gpu, given.nbytes) as pinned:
        pinned.array(given.shape, given.dtype)[...] = given
        stream.upload(buffer, pinned.array(given.shape, given.dtype))
        stream.download(got, buffer)
        stream.synchronize()
    assert np.array_equal(got, given)


def test_ptx_runs_and_can_be_captured(gpu: Device, stream: Stream) -> None:
    count = 1000
    x, y = np.arange(count, dtype=np.float32), np.zeros(count, np.float32)
    with (
        Module(gpu, ADD_ONE) as module,
        Buffer(gpu, x.nbytes) as source,
        Buffer(gpu, x.nbytes) as target,
        Event(gpu) as start,
        Event(gpu) as stop,
    ):
        add_one = module.function("add_one")
        assert add_one.attributes()["registers"] > 0

        def work() -> None:
            launch(add_one, (4, 1, 1), (256, 1, 1), 0, stream, [source, count, target])

        stream.upload(source, x)
        start.record(stream)
        work()
        stop.record(stream)
        stream.download(y, target)
        stream.synchronize()
        assert np.array_equal(y, x + 1)
        assert 0 < stop.since(start) < 1
        with stream.capture(work) as graph:
            stream.upload(source, x * 2)
            graph.launch(stream)
            stream.download(y, target)
            stream.synchronize()
    assert np.array_equal(y, 2 * x + 1)


def test_what_is_no_ptx_is_refused_with_the_words_of_the_compiler(gpu: Device) -> None:
    with pytest.raises(VerificationError, match="CUDA_ERROR_INVALID_PTX"):
        Module(gpu, ADD_ONE.replace(b"add.f32", b"nonsense.f32"))
