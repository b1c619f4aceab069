"""Which TensorRT is installed here, and whether a GPU is there to use it.

One row a library: full TensorRT (`trt`) and TensorRT-RTX (`trt-rtx`) have one API, under other
module names. Free of torch; nothing here imports TensorRT itself.
"""

import ctypes
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from effopt.backend import YES, Support
from effopt.backends.cuda_api import CAPABILITY_MAJOR, CAPABILITY_MINOR, Api
from effopt.errors import EffoptError, MissingError


@dataclass(frozen=True)
class Library:
    """One library: modules that may serve, the first that is there does.

    `aims` says that a build names its architectures, and needs no GPU; without it, a build is for
    the GPU that is there.
    """

    title: str
    modules: tuple[str, ...]
    install: str
    aims: bool


LIBRARIES: Mapping[str, Library] = MappingProxyType(
    {
        "trt": Library("TensorRT", ("tensorrt",), "pip install 'effopt[tensorrt]'", aims=False),
        "trt-rtx": Library(
            "TensorRT-RTX",
            ("tensorrt_rtx", "tensorrt_rtx_bindings"),
            "pip install --no-deps tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
            aims=True,
        ),
    }
)


@dataclass(frozen=True)
class Card:
    """A GPU that was not opened: its architecture, as "sm_80", and what it is called."""

    arch: str
    name: str

    @property
    def number(self) -> int:
        """The architecture as a number, such as 80."""
        return number(self.arch)


def number(arch: str) -> int:
    """Return 80 for "sm_80"."""
    return int(arch.removeprefix("sm_"))


def installed(kind: str) -> str | None:
    """Return the name of the module that serves a library, or None where there is none."""
    names = LIBRARIES[kind].modules
    return next((name for name in names if importlib.util.find_spec(name) is not None), None)


def module_name(kind: str) -> str:
    """Return the same, or raise MissingError with how to install it."""
    found = installed(kind)
    if found is None:
        library = LIBRARIES[kind]
        raise MissingError(f"{library.title} is not installed", library.install)
    return found


def card() -> Card:
    """Return the first GPU that the driver shows; no context is made. MissingError without one."""
    api = Api()
    if not api.get(ctypes.c_int, "cuDeviceGetCount"):
        raise MissingError("the NVIDIA driver shows no GPU", "check CUDA_VISIBLE_DEVICES")
    handle = api.get(ctypes.c_int, "cuDeviceGet", 0)
    digits = "".join(
        str(api.get(ctypes.c_int, "cuDeviceGetAttribute", attribute, handle))
        for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR)
    )
    name = ctypes.create_string_buffer(256)
    api.call("cuDeviceGetName", name, len(name), handle)
    return Card(f"sm_{digits}", name.value.decode(errors="replace"))


def missing(kind: str) -> tuple[str, str] | None:
    """Return what lacks of a library and a GPU, and what to do about it; None where both are."""
    title = LIBRARIES[kind].title
    if installed(kind) is None:
        return f"{title} is not installed", LIBRARIES[kind].install
    try:
        card()
    except EffoptError as error:
        return f"{title} is installed; {error.reason}", error.remedy
    return None


def available(kind: str) -> Support:
    """Tell whether a library and a GPU are here: else which of both is missing, and what to do."""
    lacking = missing(kind)
    return Support(False, ": ".join(lacking)) if lacking else YES


def require(kind: str, arch: str) -> Card:
    """Return the GPU, of architecture `arch`; MissingError for whatever is not as it must be."""
    if lacking := missing(kind):
        raise MissingError(*lacking)
    found = card()
    if found.arch != arch:
        reason = f"this GPU is {found.arch} ({found.name}), the folder was made for {arch}"
        raise MissingError(reason, f"build on an {arch} GPU, or convert for the target of this one")
    return found
