"""The stand-in for CUDA's driver library: compiled once, and its record read from here."""

import ctypes
import gc
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).with_name("fake_cuda.c")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")

ADD_ONE = b"""
.version 7.0
.target sm_75
.address_size 64
.visible .entry add_one(.param .u64 x, .param .u32 n, .param .u64 y)
{
  .reg .pred %done;
  .reg .f32 %f<3>;
  .reg .b32 %r<6>;
  .reg .b64 %d<8>;
  ld.param.u64 %d1, [x];
  ld.param.u32 %r1, [n];
  ld.param.u64 %d2, [y];
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mov.u32 %r4, %tid.x;
  mad.lo.s32 %r5, %r2, %r3, %r4;
  setp.ge.s32 %done, %r5, %r1;
  @%done bra END;
  cvta.to.global.u64 %d3, %d1;
  cvta.to.global.u64 %d4, %d2;
  mul.wide.s32 %d5, %r5, 4;
  add.s64 %d6, %d3, %d5;
  add.s64 %d7, %d4, %d5;
  ld.global.f32 %f1, [%d6];
  add.f32 %f2, %f1, 0f3F800000;
  st.global.f32 [%d7], %f2;
END:
  ret;
}
"""
"""A kernel (x, n, y) that a real device runs as well: y = x + 1."""

PTX = (
    ADD_ONE
    + b"""
.visible .entry add_one_too_far(.param .u64 x, .param .u32 n, .param .u64 y) { ret; }
.visible .entry nothing(.param .u64 x, .param .u32 n, .param .u64 y) { ret; }
"""
)

MEMORY, HOST, STREAM, EVENT, MODULE, FUNCTION, GRAPH, EXEC = range(1, 9)


class _Call(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 40),
        ("count", ctypes.c_int),
        ("values", ctypes.c_uint64 * 24),
    ]


def header() -> Path | None:
    """Return the folder of a cuda.h of this machine, or None."""
    places = [
        Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "include",
        Path("/usr/local/cuda/include"),
    ]
    return next((place for place in places if (place / "cuda.h").is_file()), None)


def compile_fake(into: Path) -> Path:
    """Compile the library, against the real header where there is one; each copy has its state."""
    path, real = into / "libfake.so", header()
    words = ["gcc", "-std=gnu11", "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    words += ["-DWITH_CUDA_H", f"-I{real}"] if real else []
    done = subprocess.run(
        [*words, "-o", str(path), str(SOURCE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return path


def functions() -> dict[str, int]:
    """Return each function of the driver that the source defines, and how many arguments it has."""
    found = re.findall(r"^CUresult (cu\w+)\((.*?)\)\s*\{", SOURCE.read_text(), re.M | re.S)
    return {name: 1 + arguments.count(",") for name, arguments in found}


class Fake:
    """One compiled copy of the library."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        self.library.fake_call.restype = ctypes.POINTER(_Call)

    def calls(self, *names: str) -> list[tuple[Any, ...]]:
        """Return the calls so far as (name, value, ...), of these functions or of all."""
        made = []
        for place in range(self.library.fake_calls()):
            call = self.library.fake_call(place).contents
            name = call.name.decode()
            if name in names or not names:
                made.append((name, *call.values[: call.count]))
        return made

    def forget(self) -> None:
        """Empty the record."""
        self.library.fake_forget()

    def alive(self, kind: int = 0) -> int:
        """Return how many things of a kind were made and not given back."""
        return int(self.library.fake_alive(kind))

    def settle(self) -> None:
        """Hold that everything was given back, once cycles of caught errors are gone."""
        if self.alive():
            gc.collect()
        assert self.alive() == 0, "something was not given back"

    @property
    def retained(self) -> int:
        """How often the context was retained and not released."""
        return int(self.library.fake_retained())

    @contextmanager
    def failing(self, name: str, code: int, after: int = 0) -> Iterator[None]:
        """Let a function return a code, after some calls that succeed."""
        self.library.fake_fail(name.encode(), code, after)
        try:
            yield
        finally:
            self.library.fake_fail(b"", 0, 0)


def copied(library: Path, into: Path) -> Fake:
    """Return a copy with a state of its own: a library is loaded once for each file."""
    return Fake(Path(shutil.copy(library, into / "libcopy.so")))
