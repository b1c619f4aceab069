"""A library of C++ plugins in a process that stands for TensorRT: `stubs/plugin_host.cpp`."""

import ctypes
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from effopt.plugin import Plugin

STUBS = Path(__file__).parent / "stubs"
GXX = ("g++", "-std=c++17", "-Wall", "-Wextra", "-Werror")
SHARED = ("-O0", "-shared", "-fPIC", "-I", str(STUBS))
TYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.int8: 2,
    torch.int32: 3,
    torch.bfloat16: 7,
    torch.int64: 8,
}
INT32, FLOAT32, INT64 = 5, 1, 10
STREAM = 0x5EED


class Field(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    ]


class Fields(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int32), ("fields", ctypes.POINTER(Field))]


class Description(ctypes.Structure):
    _fields_ = [
        ("rank", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 8),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


class Launched(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_char * 96),
        ("numbers", ctypes.c_int32 * 7),
        ("count", ctypes.c_int32),
        ("stream", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 32),
    ]


def compiled(source: Path, folder: Path) -> "Host":
    """Compile a folder of source, and the host beside it, without optimisation; load both."""
    sources = {"library": sorted(source.glob("*.cpp")), "host": [STUBS / "plugin_host.cpp"]}
    options = {"library": ["-fvisibility=hidden"], "host": []}
    running = [
        subprocess.Popen([*GXX, *SHARED, *options[name], "-o", folder / f"{name}.so", *files])
        for name, files in sources.items()
    ]
    assert [process.wait() for process in running] == [0, 0]
    return Host(folder / "host.so", folder / "library.so")


def described(kind: torch.dtype, sizes: Sequence[int]) -> Description:
    return Description(len(sizes), tuple(sizes), TYPES[kind], 0, 1.0)


def addresses(count: int) -> list[int]:
    """Return where the tensors of a call are said to be: all 64 bits of an address count."""
    return [0x1000 * (1 + at) + (1 << 40) for at in range(count)]


class Host:
    """A library of plugins in the process that `plugin_host.cpp` stands for."""

    def __init__(self, host: Path, library: Path) -> None:
        self.host = ctypes.CDLL(str(host), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(library))
        for name in ("host_said", "host_image"):
            getattr(self.host, name).restype = ctypes.c_char_p
        for name in ("host_build", "host_attach"):
            getattr(self.host, name).restype = ctypes.c_void_p
        self.host.host_fields.restype = ctypes.POINTER(Fields)
        self.host.host_last.restype = ctypes.POINTER(Launched)
        entry_points = (self.library.getCreators, self.library.setLoggerFinder)
        self.count = self.host.host_register(*entry_points)

    def said(self) -> str:
        return self.host.host_said().decode()

    def make(self, plugin: Plugin, attributes: Mapping[str, float]) -> int | None:
        kinds = {int: (INT32, ctypes.c_int32), float: (FLOAT32, ctypes.c_float)}
        fields = list[tuple[str, int, Any]]()
        for name, kind in plugin.attributes.items():
            if name in attributes:
                number, cell = kinds[kind]
                fields.append((name, number, cell(attributes[name])))
        return self.make_of(plugin.name, fields)

    def make_of(self, name: str, fields: Sequence[tuple[str, int, Any]]) -> int | None:
        made = (Field * len(fields))(*(
            Field(key.encode(), ctypes.addressof(cell), kind, 1) for key, kind, cell in fields
        ))  # fmt: skip
        return self.host.host_build(name.encode(), made, len(fields))

    def attached(self, made: int) -> "Attached":
        return Attached(self.host, self.host.host_attach(ctypes.c_void_p(made)))


class Attached:
    """One plugin, read from what it serialised, in a context."""

    def __init__(self, host: ctypes.CDLL, made: int) -> None:
        self.host, self.handle = host, ctypes.c_void_p(made)

    def supports(self, at: int, every: Sequence[Description], inputs: int) -> bool:
        counts = (inputs, len(every) - inputs)
        return bool(self.host.host_supports(self.handle, at, _array(every), *counts))

    def results(self, inputs: Sequence[Description]) -> list[tuple[int, list[int]]]:
        made = (Description * 16)()
        count = self.host.host_results(self.handle, _array(inputs), len(inputs), made)
        return [(one.type, list(one.sizes[: one.rank])) for one in made[: max(count, 0)]]

    def change(self, every: Sequence[Description], inputs: int) -> int:
        counts = (inputs, len(every) - inputs)
        return int(self.host.host_change(self.handle, _array(every), *counts))

    def enqueue(self, every: Sequence[Description], inputs: int) -> int:
        places = addresses(len(every))
        given = (ctypes.c_void_p * inputs)(*places[:inputs])
        made = (ctypes.c_void_p * (len(every) - inputs))(*places[inputs:])
        where = (_array(every), inputs, given, made, ctypes.c_void_p(STREAM))
        return int(self.host.host_enqueue(self.handle, *where))

    def last(self) -> Launched:
        return self.host.host_last().contents

    def drop(self) -> None:
        self.host.host_drop(self.handle)


def _array(every: Sequence[Description]) -> Any:
    return (Description * len(every))(*every)
