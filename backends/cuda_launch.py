"""Kernels through CUDA's driver library: modules of PTX or cubins, their functions, launches.

Checked against a library that records its calls; not run on a device.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effopt.backends import cuda_api
from effopt.backends.cuda_driver import Buffer, Device, Owned, Stream
from effopt.errors import MissingError, UsageError

PLAIN_SHARED = 48 * 1024
"""Dynamic shared memory a block that every launch may have; a function must ask for more."""

_LOG = 8192
Three = tuple[int, int, int]


class Module(Owned):
    """Compiled kernels: the text of PTX, which the driver compiles now, or a cubin."""

    _back = "cuModuleUnload"

    def __init__(self, device: Device, image: bytes) -> None:
        """Load the image.

        MissingError for code that is too new for the driver or for another GPU, VerificationError
        for what is no code; both show what the driver's compiler said.
        """
        log = ctypes.create_string_buffer(_LOG)
        asked = (ctypes.c_int * 2)(cuda_api.JIT_ERROR_LOG, cuda_api.JIT_ERROR_LOG_SIZE)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), len(log))
        text = ctypes.create_string_buffer(image)  # PTX ends with a zero byte
        made = ctypes.c_void_p()
        device.use()
        given = (ctypes.byref(made), ctypes.addressof(text), len(asked), asked, values)
        code = device.api.code("cuModuleLoadDataEx", *given)
        if code:
            said = log.value.decode(errors="replace").strip()
            about = said or f"{device.name} is {device.arch}, its driver is of CUDA {device.cuda}"
            raise device.api.error("cuModuleLoadDataEx", code, about)
        super().__init__(device, made.value or 0)

    def function(self, name: str) -> "Function":
        """Return a kernel by its entry name; VerificationError where there is none."""
        about = f"the entry {name!r}"
        handle = self.device.take(
            ctypes.c_void_p, "cuModuleGetFunction", self.handle, name.encode(), about=about
        )
        return Function(self, name, handle)


class Function:
    """One kernel of a module."""

    def __init__(self, module: Module, name: str, handle: int) -> None:
        """Keep the module, which the function lives in."""
        self.module, self.name, self._handle = module, name, handle

    @property
    def handle(self) -> int:
        """The driver's own name for it; UsageError once the module was given back."""
        return self._handle if self.module.handle else 0

    def attributes(self) -> Mapping[str, int]:
        """Return what the compiler made of it, by the names of `cuda_api.FUNCTION_ATTRIBUTES`."""
        api = self.module.device.api
        ask = ("cuFuncGetAttribute",)
        return {
            key: api.get(ctypes.c_int, *ask, number, self.handle)
            for key, number in cuda_api.FUNCTION_ATTRIBUTES.items()
        }

    def allow_shared(self, size: int) -> None:
        """Allow launches with more than 48 KB of dynamic shared memory a block."""
        device = self.module.device
        if size > device.shared_limit:
            reason = f"{self.name} needs {size} bytes of shared memory a block"
            has = f"{device.name} has {device.shared_limit}"
            raise MissingError(f"{reason}, {has}", "use a smaller model, or a larger GPU")
        kind = cuda_api.MAX_DYNAMIC_SHARED
        device.api.call("cuFuncSetAttribute", self.handle, kind, size, about=self.name)


@dataclass(frozen=True)
class Pointer:
    """An address of the device that another library owns, such as a tensor's `data_ptr()`."""

    address: int


Argument = Buffer | Pointer | int
"""What a kernel takes: device memory, or an int32."""


def launch(
    function: Function,
    grid: Three,
    block: Three,
    shared: int,
    stream: Stream,
    arguments: Sequence[Argument],
) -> None:
    """Put one launch into a stream; `shared` is dynamic shared memory a block.

    Raises UsageError for a number that is no int32. What goes wrong while the kernel runs is
    raised where the stream is synchronized.
    """
    if shared > PLAIN_SHARED:
        function.allow_shared(shared)
    packed = [_packed(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(packed))(*map(ctypes.addressof, packed))
    about = f"{function.name} on a grid of {grid}, blocks of {block}, {shared} bytes shared"
    where = (*grid, *block, shared, stream.handle, pointers, None)
    stream.device.api.call("cuLaunchKernel", function.handle, *where, about=about)


def _packed(argument: Argument) -> Any:
    """Put one argument where the driver reads it: 8 bytes of address, or 4 of int32."""
    if isinstance(argument, int):
        if not -(2**31) <= argument < 2**31:
            raise UsageError(f"{argument} is no int32", "kernels take sizes below 2^31")
        return ctypes.c_int32(argument)
    at = argument.address if isinstance(argument, Pointer) else argument.handle
    return ctypes.c_uint64(at)
