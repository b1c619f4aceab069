"""A GPU through CUDA's driver library: memory, streams, events and graphs.

What is made here is given back at the end of a `with`, by `close`, or when nothing refers to it.
Making and giving back makes the device current on the calling thread; a copy, launch or wait does
not: a thread that only does those calls `Device.use` first. Sizes are in bytes, times in seconds.
Checked against a library that records its calls; not run on a device.
"""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from effopt.backend import YES, Array, Support
from effopt.backends import cuda_api
from effopt.backends.cuda_api import Api
from effopt.errors import EffoptError, MissingError, UsageError


def available(library: str = cuda_api.LIBRARY) -> Support:
    """Tell whether there is a driver with a GPU; no context is made."""
    try:
        api = Api(library)
        count = api.get(ctypes.c_int, "cuDeviceGetCount")
    except EffoptError as error:  # a driver that does not start is none, whatever its code
        return Support(False, error.reason)
    return YES if count else Support(False, "the NVIDIA driver finds no GPU")


def device(index: int = 0, library: str = cuda_api.LIBRARY) -> "Device":
    """Open a GPU by its place among the visible ones; MissingError where there is none."""
    api = Api(library)
    count = api.get(ctypes.c_int, "cuDeviceGetCount")
    if not 0 <= index < count:
        remedy = "run this on the machine that has the GPU, and check CUDA_VISIBLE_DEVICES"
        raise MissingError(f"there is no GPU {index}: the NVIDIA driver finds {count}", remedy)
    return Device(api, index)


class Device:
    """One GPU with its primary context, which torch and TensorRT use as well.

    `capability` is such as (8, 0), `arch` such as "sm_80", `cuda` the newest CUDA version that the
    driver serves, `memory` its size and `shared_limit` the most shared memory of a block.
    """

    def __init__(self, api: Api, index: int) -> None:
        """Retain the context and make it current on this thread."""
        self.api, self.index = api, index
        number = api.get(ctypes.c_int, "cuDeviceGet", index)
        name = ctypes.create_string_buffer(256)
        api.call("cuDeviceGetName", name, len(name), number)
        self.name = name.value.decode(errors="replace")
        ask = ("cuDeviceGetAttribute",)
        self.capability: tuple[int, int] = (
            api.get(ctypes.c_int, *ask, cuda_api.CAPABILITY_MAJOR, number),
            api.get(ctypes.c_int, *ask, cuda_api.CAPABILITY_MINOR, number),
        )
        self.arch = "sm_{}{}".format(*self.capability)
        self.processors: int = api.get(ctypes.c_int, *ask, cuda_api.PROCESSORS, number)
        self.shared_limit: int = api.get(ctypes.c_int, *ask, cuda_api.SHARED_LIMIT, number)
        self.memory: int = api.get(ctypes.c_size_t, "cuDeviceTotalMem_v2", number)
        version = api.get(ctypes.c_int, "cuDriverGetVersion")
        self.cuda = f"{version // 1000}.{version % 1000 // 10}"
        self._context: int = api.get(ctypes.c_void_p, "cuDevicePrimaryCtxRetain", number)
        _at_last(self, api.call, "cuDevicePrimaryCtxRelease_v2", number)
        self.use()

    def use(self) -> None:
        """Make the device current on this thread."""
        self.api.call("cuCtxSetCurrent", self._context)

    def free_memory(self) -> int:
        """Return how many bytes can still be taken."""
        self.use()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.api.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def take(self, kind: Any, name: str, *arguments: Any, about: str = "") -> int:
        """Make something by a function whose first argument is where its handle goes."""
        self.use()
        made: int | None = self.api.get(kind, name, *arguments, about=about)
        return made or 0

    def give_back(self, name: str, handle: int) -> None:
        """Undo what `take` made."""
        self.use()
        self.api.call(name, handle)


def _at_last(owner: object, call: Callable[..., None], *arguments: Any) -> Any:
    """Call once, when nothing refers to the owner; not at the end of the process.

    Then the engines that use the same context may be alive still, and the system frees all of it.
    """
    last = weakref.finalize(owner, call, *arguments)
    last.atexit = False
    return last


class Owned:
    """Something that the driver made and that is given back once."""

    _back: str

    def __init__(self, device: Device, handle: int) -> None:
        """Own a handle of the driver."""
        self.device, self._handle = device, handle
        self._last = _at_last(self, device.give_back, self._back, handle)

    @property
    def handle(self) -> int:
        """The driver's own name for it; UsageError once it was given back."""
        if not self._last.alive:
            reason = f"this {type(self).__name__} was given back already"
            raise UsageError(reason, "use it before its `with` ends")
        return self._handle

    def close(self) -> None:
        """Give it back, unless that was done."""
        self._last()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give it back; an error of that is noted on the one that ended the `with`, if any."""
        try:
            self.close()
        except EffoptError as second:
            if error is None:
                raise
            error.add_note(f"and then: {second.reason}")


class Buffer(Owned):
    """Memory of the device; `handle` is its address."""

    _back = "cuMemFree_v2"

    def __init__(self, device: Device, size: int) -> None:
        """Take `size` bytes, at least one; MissingError where the device has not so many."""
        self.size = max(size, 1)
        about = f"{self.size} bytes of {device.name}"
        super().__init__(
            device, device.take(ctypes.c_uint64, "cuMemAlloc_v2", self.size, about=about)
        )


class Pinned(Owned):
    """Memory of this machine that the device copies from and to while the caller goes on."""

    _back = "cuMemFreeHost"

    def __init__(self, device: Device, size: int) -> None:
        """Take `size` bytes, at least one."""
        self.size = max(size, 1)
        about = f"{self.size} bytes of pinned memory"
        super().__init__(
            device, device.take(ctypes.c_void_p, "cuMemHostAlloc", self.size, 0, about=about)
        )

    def array(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """Return a view of its first bytes, which ends with it: copy what is to stay."""
        flat = (ctypes.c_uint8 * self.size).from_address(self.handle)
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(memoryview(flat), np.dtype(dtype), count).reshape(shape)


class Event(Owned):
    """A mark in a stream; two of them tell the time between."""

    _back = "cuEventDestroy_v2"

    def __init__(self, device: Device) -> None:
        """Make an event that keeps its time."""
        super().__init__(device, device.take(ctypes.c_void_p, "cuEventCreate", 0))

    def record(self, stream: "Stream") -> None:
        """Set the mark behind all work of the stream so far."""
        self.device.api.call("cuEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait until the stream has come to the mark."""
        self.device.api.call("cuEventSynchronize", self.handle)

    def since(self, start: "Event") -> float:
        """Return the seconds from another mark to this one; both have been reached."""
        ask = ("cuEventElapsedTime", start.handle, self.handle)
        milliseconds: float = self.device.api.get(ctypes.c_float, *ask)
        return milliseconds / 1000


class Graph(Owned):
    """Work of a stream that was captured, to be launched as one."""

    _back = "cuGraphExecDestroy"

    def launch(self, stream: "Stream") -> None:
        """Do the work once more, on the same addresses."""
        self.device.api.call("cuGraphLaunch", self.handle, stream.handle)


class Stream(Owned):
    """A queue of work of the device, which waits for no other."""

    _back = "cuStreamDestroy_v2"

    def __init__(self, device: Device) -> None:
        """Make a stream."""
        super().__init__(
            device, device.take(ctypes.c_void_p, "cuStreamCreate", cuda_api.NON_BLOCKING)
        )

    def synchronize(self) -> None:
        """Wait until all work is done; an error of that work is raised here."""
        self.device.api.call("cuStreamSynchronize", self.handle)

    def upload(self, target: Buffer, source: Array) -> None:
        """Copy an array to the device; it must stay as it is until the stream is synchronized."""
        _check_copy(target.size, source)
        where = (target.handle, source.ctypes.data, source.nbytes)
        self.device.api.call("cuMemcpyHtoDAsync_v2", *where, self.handle)

    def download(self, target: Array, source: Buffer) -> None:
        """Fill an array from the device; it is filled once the stream is synchronized."""
        _check_copy(source.size, target)
        if not target.flags.writeable:
            raise UsageError("the array to fill is read-only", "give one that can be written")
        where = (target.ctypes.data, source.handle, target.nbytes)
        self.device.api.call("cuMemcpyDtoHAsync_v2", *where, self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` puts into this stream, without doing it; an error of it is raised.

        It may neither wait for the device nor take memory.
        """
        self.device.api.call("cuStreamBeginCapture_v2", self.handle, cuda_api.THREAD_LOCAL)
        recorded = ctypes.c_void_p()
        ending = ("cuStreamEndCapture", self.handle, ctypes.byref(recorded))
        try:
            work()
        except BaseException:
            # The code of the end says again that the capture broke: the first error tells why.
            self.device.api.code(*ending)
            _drop(self.device, recorded)
            raise
        self.device.api.call(*ending)
        try:
            make = ("cuGraphInstantiateWithFlags", recorded, 0)
            return Graph(self.device, self.device.take(ctypes.c_void_p, *make))
        finally:
            _drop(self.device, recorded)


def _drop(device: Device, recorded: ctypes.c_void_p) -> None:
    if recorded.value:
        device.api.call("cuGraphDestroy", recorded)


def _check_copy(size: int, array: Array) -> None:
    if array.nbytes > size:
        raise UsageError(f"{array.nbytes} bytes do not fit in {size}", "take a larger buffer")
    if not array.flags.c_contiguous:
        raise UsageError("an array with gaps cannot be copied", "use np.ascontiguousarray")
