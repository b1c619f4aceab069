"""The functions of CUDA's driver library that are called here, and what their return codes mean.

By ctypes alone, so that nothing beside the driver is needed; free of torch. Names, argument types
and codes are those of cuda.h (CUDA 13.0), where `_v2` is what the header maps a plain name to.
Checked against a library that records its calls; not run on a device.
"""

import ctypes
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from effopt.errors import EffoptError, MissingError, VerificationError

LIBRARY = "libcuda.so.1"
"""The library that comes with NVIDIA's driver, and with nothing else."""

_HANDLE = ctypes.c_void_p  # what the driver made: a context, stream, event, module, function, graph
_HOST = ctypes.c_void_p
_DEVICE = ctypes.c_uint64
_INT, _UNSIGNED, _SIZE = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t


def _out(kind: Any) -> Any:
    return ctypes.POINTER(kind)


FUNCTIONS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "cuInit": (_UNSIGNED,),
        "cuGetErrorName": (_INT, _out(ctypes.c_char_p)),
        "cuDriverGetVersion": (_out(_INT),),
        "cuDeviceGetCount": (_out(_INT),),
        "cuDeviceGet": (_out(_INT), _INT),
        "cuDeviceGetName": (ctypes.c_char_p, _INT, _INT),
        "cuDeviceGetAttribute": (_out(_INT), _INT, _INT),
        "cuDeviceTotalMem_v2": (_out(_SIZE), _INT),
        "cuDevicePrimaryCtxRetain": (_out(_HANDLE), _INT),
        "cuDevicePrimaryCtxRelease_v2": (_INT,),
        "cuCtxSetCurrent": (_HANDLE,),
        "cuMemGetInfo_v2": (_out(_SIZE), _out(_SIZE)),
        "cuMemAlloc_v2": (_out(_DEVICE), _SIZE),
        "cuMemFree_v2": (_DEVICE,),
        "cuMemHostAlloc": (_out(_HOST), _SIZE, _UNSIGNED),
        "cuMemFreeHost": (_HOST,),
        "cuMemcpyHtoDAsync_v2": (_DEVICE, _HOST, _SIZE, _HANDLE),
        "cuMemcpyDtoHAsync_v2": (_HOST, _DEVICE, _SIZE, _HANDLE),
        "cuStreamCreate": (_out(_HANDLE), _UNSIGNED),
        "cuStreamDestroy_v2": (_HANDLE,),
        "cuStreamSynchronize": (_HANDLE,),
        "cuStreamBeginCapture_v2": (_HANDLE, _INT),
        "cuStreamEndCapture": (_HANDLE, _out(_HANDLE)),
        "cuEventCreate": (_out(_HANDLE), _UNSIGNED),
        "cuEventDestroy_v2": (_HANDLE,),
        "cuEventRecord": (_HANDLE, _HANDLE),
        "cuEventSynchronize": (_HANDLE,),
        "cuEventElapsedTime": (_out(ctypes.c_float), _HANDLE, _HANDLE),
        "cuModuleLoadDataEx": (_out(_HANDLE), _HOST, _UNSIGNED, _out(_INT), _out(_HOST)),
        "cuModuleUnload": (_HANDLE,),
        "cuModuleGetFunction": (_out(_HANDLE), _HANDLE, ctypes.c_char_p),
        "cuFuncGetAttribute": (_out(_INT), _INT, _HANDLE),
        "cuFuncSetAttribute": (_HANDLE, _INT, _INT),
        "cuLaunchKernel": (
            *(_HANDLE, _UNSIGNED, _UNSIGNED, _UNSIGNED, _UNSIGNED, _UNSIGNED, _UNSIGNED),
            *(_UNSIGNED, _HANDLE, _out(_HOST), _out(_HOST)),
        ),
        "cuGraphInstantiateWithFlags": (_out(_HANDLE), _HANDLE, ctypes.c_ulonglong),
        "cuGraphLaunch": (_HANDLE, _HANDLE),
        "cuGraphExecDestroy": (_HANDLE,),
        "cuGraphDestroy": (_HANDLE,),
    }
)
"""Argument types of every function; all return a code, 0 for success."""

CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
PROCESSORS, SHARED_LIMIT = 16, 97
"""Attributes of a device; the last is the most shared memory that a block can ask for, in bytes."""

FUNCTION_ATTRIBUTES = MappingProxyType(
    {"threads": 0, "shared": 1, "local": 3, "registers": 4, "ptx": 5, "binary": 6}
)
"""What is told of a function: most threads a block, bytes, registers a thread, versions x 10."""

MAX_DYNAMIC_SHARED = 8
JIT_ERROR_LOG, JIT_ERROR_LOG_SIZE = 5, 6
NON_BLOCKING = 1
THREAD_LOCAL = 1
"""Of a capture: only calls of its own thread that cannot be captured end it."""

_AGAIN = "build the engine again on this machine: effopt build DIR"
_OUTSIDE = "an earlier launch went outside of its buffers: run it under compute-sanitizer"
_NO_GPU = "run this on the machine that has the GPU, and check CUDA_VISIBLE_DEVICES"
_DRIVER = "install one NVIDIA driver, of one version throughout, and restart the machine"

MEANINGS: Mapping[int, tuple[type[EffoptError], str]] = MappingProxyType(
    {
        2: (MissingError, "use a smaller batch or shorter inputs, or end other work on this GPU"),
        34: (MissingError, "the library is a stub to link with: install NVIDIA's driver"),
        36: (MissingError, "install a newer NVIDIA driver"),
        46: (MissingError, "another process holds this GPU for itself: end it, or use another GPU"),
        100: (MissingError, _NO_GPU),
        101: (MissingError, _NO_GPU),
        200: (VerificationError, _AGAIN),
        209: (MissingError, f"the code is for another architecture: {_AGAIN}"),
        218: (VerificationError, _AGAIN),
        221: (MissingError, "install the driver's PTX compiler, libnvidia-ptxjitcompiler.so.1"),
        222: (
            MissingError,
            "the PTX was made by a CUDA newer than this driver: install a driver of that CUDA "
            "version, or compile the kernels with the CUDA version of the driver, or to cubins",
        ),
        500: (VerificationError, _AGAIN),
        700: (VerificationError, _OUTSIDE),
        701: (VerificationError, "launch with fewer threads a block or less shared memory"),
        702: (VerificationError, "a kernel ran for too long on a GPU that also drives a display"),
        716: (VerificationError, _OUTSIDE),
        719: (VerificationError, _OUTSIDE),
        802: (MissingError, "start nvidia-fabricmanager, or wait until the GPUs are ready"),
        803: (MissingError, _DRIVER),
        804: (MissingError, _DRIVER),
    }
)
"""The kind of error that a return code is, and its remedy; the others are errors of ours."""

_OURS = "report this, with the driver's version that nvidia-smi shows"


class Api:
    """The driver library, with every failing call turned into an error."""

    def __init__(self, library: str = LIBRARY) -> None:
        """Load the library and start the driver.

        MissingError where there is no driver, no GPU, or the driver is older than CUDA 11.4.
        """
        try:
            loaded = ctypes.CDLL(library)
        except OSError as error:
            remedy = "run this on the machine that has the GPU, or install NVIDIA's driver there"
            raise MissingError("no NVIDIA driver on this machine", remedy) from error
        self._functions = {}
        for name, types in FUNCTIONS.items():
            function = getattr(loaded, name, None)
            if function is None:
                raise MissingError(f"the NVIDIA driver has no {name}", MEANINGS[36][1])
            function.argtypes, function.restype = types, ctypes.c_int
            self._functions[name] = function
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any, about: str = "") -> None:
        """Call a function; the error of a failing one says what the call was about."""
        if code := self.code(name, *arguments):
            raise self.error(name, code, about)

    def get(self, kind: Any, name: str, *arguments: Any, about: str = "") -> Any:
        """Call a function whose first argument is where it puts its answer; return that."""
        answer = kind()
        self.call(name, ctypes.byref(answer), *arguments, about=about)
        return answer.value

    def code(self, name: str, *arguments: Any) -> int:
        """Call a function and return its code, 0 for success, for a caller that expects others."""
        code: int = self._functions[name](*arguments)
        return code

    def error(self, name: str, code: int, about: str = "") -> EffoptError:
        """Make the error of a return code, by the driver's name for it."""
        text = ctypes.c_char_p()
        known = not self.code("cuGetErrorName", code, ctypes.byref(text)) and text.value
        title = text.value.decode() if known and text.value else "unknown error"
        kind, remedy = MEANINGS.get(code, (EffoptError, _OURS))
        return kind(f"{name}: {title} ({code})" + (f": {about}" if about else ""), remedy)
