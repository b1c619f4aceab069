"""Which execution providers of onnxruntime run a file: those wanted, else the next, with a reason.

On a CPU target nothing is chosen: that is `CPUExecutionProvider`. On a GPU target TensorRT comes
first, then CUDA, then the CPU, which also takes the operators that they have not. Free of torch.
Checked with stand-ins for onnxruntime-gpu; not run on a device.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import io
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from effopt.backend import YES, Array, Support
from effopt.backends import cuda_driver
from effopt.errors import EffoptError, MissingError, UsageError, VerificationError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

WANTED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cpu": (CPU,), "portable": (CPU,), "gpu": (TENSORRT, CUDA, CPU)}
)
"""Providers by the kind of a target, the best first."""

SETTINGS: Mapping[str, Mapping[str, str]] = MappingProxyType({CUDA: {"use_tf32": "0"}})
"""Options of providers: float32 is not rounded to TF32, or it would not agree with eager torch."""

LIBRARIES: Mapping[str, str] = MappingProxyType(
    {
        TENSORRT: "libonnxruntime_providers_tensorrt.so",
        CUDA: "libonnxruntime_providers_cuda.so",
    }
)
"""What each provider is, beside onnxruntime's own library."""

_MEMORY = re.compile(r"out of memory|failed to allocate memory|cuda failure 2\b", re.IGNORECASE)
_NVINFER = re.compile(rb"libnvinfer\.so\.\d+")


@dataclass(frozen=True)
class Choice:
    """An open session, the providers that it has, and why it has not those before them."""

    session: Any
    providers: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def on_gpu(self) -> bool:
        """Tell whether a GPU does the work."""
        return self.providers[0] != CPU


def choose(wanted: Sequence[str], runtime: Any, opened: Callable[..., Any]) -> Choice:
    """Open a session with the first of the wanted providers that there is and that loads.

    `runtime` is the module onnxruntime; `opened(providers=...)` makes a session. Nothing is asked
    about the last provider: its error is that of the file.
    """
    reasons: list[str] = []
    for place, provider in enumerate(wanted[:-1]):
        session, reason = _tried(wanted[place:], runtime, opened)
        if session is not None:
            return Choice(session, tuple(session.get_providers()), tuple(reasons))
        reasons.append(f"not on {provider.removesuffix('ExecutionProvider')}: {reason}")
    session = opened(providers=wanted[-1:])
    return Choice(session, tuple(session.get_providers()), tuple(reasons))


def _tried(wanted: Sequence[str], runtime: Any, opened: Callable[..., Any]) -> tuple[Any, str]:
    """Return a session whose first provider is the first wanted one, or None and why not."""
    here = usable(wanted[0], runtime)
    if not here.ok:
        return None, here.reason
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints what it cannot load
        runtime.preload_dlls()
    try:
        session = opened(providers=wanted)
    except (VerificationError, RuntimeError, ValueError) as error:
        return None, (str(error).splitlines() or ["no reason given"])[0]
    if session.get_providers()[0] == wanted[0]:
        return session, ""
    # Where its libraries do not load, onnxruntime logs that and goes on with the next provider.
    first = (said.getvalue().strip().splitlines() or ["onnxruntime's log names the first"])[0]
    return None, f"libraries that it needs do not load ({first})"


def usable(provider: str, runtime: Any) -> Support:
    """Tell whether a provider of a GPU is in this onnxruntime, with a driver and its libraries."""
    if provider not in runtime.get_available_providers():
        package = "pip install 'effopt[ort-gpu]' in the place of onnxruntime"
        return Support(False, f"onnxruntime {runtime.__version__} is without it: {package}")
    driver = cuda_driver.available()
    if not driver.ok:
        return driver
    lacking = [name for name in needs(provider, runtime) if not _loads(name)]
    if lacking:
        return Support(False, f"{lacking[0]} cannot be loaded: install the TensorRT that has it")
    return YES


def needs(provider: str, runtime: Any) -> Iterator[str]:
    """Yield the libraries of TensorRT that a provider is linked with, such as libnvinfer.so.10."""
    path = Path(runtime.__file__).parent / "capi" / LIBRARIES[provider]
    if provider == TENSORRT and path.is_file():
        yield from {name.decode() for name in _NVINFER.findall(path.read_bytes())}


def _loads(name: str) -> bool:
    """Tell whether a library of TensorRT is found; that of its Python package is, once imported."""
    if importlib.util.find_spec("tensorrt") is not None:
        try:
            importlib.import_module("tensorrt")
        except (ImportError, OSError):
            return False
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


class Bound:
    """A session whose inputs lie on a device: copied there once, then overwritten in place.

    Outputs are bound to the CPU, as the caller wants arrays: each is copied once, by the session.
    """

    def __init__(
        self, choice: Choice, outputs: Sequence[str], runtime: Any, device: str = "cuda"
    ) -> None:
        """Bind nothing yet: sizes are known when inputs come."""
        self._session, self._outputs = choice.session, outputs
        self._value, self._device = runtime.OrtValue, device
        self._binding = choice.session.io_binding()
        self._bound: dict[str, Any] = {}
        self._lock = threading.Lock()  # inputs of two threads would lie in one place

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Run once; the arrays that are returned belong to the caller.

        Raises UsageError for inputs that the model cannot take, MissingError where the GPU has not
        enough memory.
        """
        try:
            with self._lock:
                return self._run(feeds)
        except RuntimeError as error:  # what a bound run raises, whatever the reason
            raise _refusal(error) from error
        except refusals() as error:
            raise _refusal(error) from error

    def _run(self, feeds: Mapping[str, Array]) -> list[Array]:
        for name, array in feeds.items():
            self._put(name, np.ascontiguousarray(array))
        # Bound anew each time: what was made in the last run belongs to its caller.
        self._binding.clear_binding_outputs()
        for name in self._outputs:
            self._binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(self._binding)
        return [value.numpy() for value in self._binding.get_outputs()]

    def _put(self, name: str, array: Array) -> None:
        """Overwrite the value of an input; make a new one for another shape."""
        held = self._bound.get(name)
        if held is not None and tuple(held.shape()) == array.shape:
            held.update_inplace(array)
            return
        made = self._value.ortvalue_from_numpy(array, self._device, 0)
        self._binding.bind_ortvalue_input(name, made)
        self._bound[name] = made


def _refusal(error: Exception) -> EffoptError:
    first = (str(error).strip().splitlines() or ["no reason given"])[0]
    if _MEMORY.search(first):
        remedy = "use a smaller batch or shorter inputs, or end other work on this GPU"
        return MissingError(f"the GPU has not enough memory: {first}", remedy)
    remedy = "check that the values and sizes are some that the model takes"
    return UsageError(f"onnxruntime cannot run on these inputs: {first}", remedy)


def refusals() -> tuple[type[Exception], ...]:
    """Return onnxruntime's own exceptions: they have no base class but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    names = (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
    )
    return tuple(getattr(states, name) for name in names)
