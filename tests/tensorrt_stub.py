"""A stand-in for TensorRT's compiled module, beneath the Python plugin package of its bindings.

That package registers plugins, reads the signatures of their functions and computes launches, in
Python alone; what it takes from the compiled module is here: names, an algebra of sizes, a
registry.
"""

import enum
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def package() -> Path | None:
    """Return the folder of the plugin package of installed bindings, or None."""
    found = importlib.util.find_spec("tensorrt_bindings")
    places = (found.submodule_search_locations or []) if found else []
    folders = [Path(place) / "plugin" for place in places]
    return next((folder for folder in folders if (folder / "_lib.py").exists()), None)


class DataType(enum.Enum):
    FLOAT = enum.auto()
    HALF = enum.auto()
    BF16 = enum.auto()
    INT64 = enum.auto()
    INT32 = enum.auto()
    INT8 = enum.auto()


class Operation(enum.Enum):
    SUM = enum.auto()
    SUB = enum.auto()
    PROD = enum.auto()
    FLOOR_DIV = enum.auto()
    CEIL_DIV = enum.auto()
    MAX = enum.auto()
    MIN = enum.auto()
    EQUAL = enum.auto()
    LESS = enum.auto()


_APPLIED = {
    Operation.SUM: lambda a, b: a + b,
    Operation.SUB: lambda a, b: a - b,
    Operation.PROD: lambda a, b: a * b,
    Operation.FLOOR_DIV: lambda a, b: a // b,
    Operation.CEIL_DIV: lambda a, b: -(-a // b),
}


@dataclass
class DimensionExpr:
    """A size whose value is known: the algebra is computed at once."""

    value: int = 0

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class ExprBuilder:
    def constant(self, value: int) -> DimensionExpr:
        return DimensionExpr(value)

    def operation(self, op: Operation, a: DimensionExpr, b: DimensionExpr) -> DimensionExpr:
        return DimensionExpr(_APPLIED[op](a.value, b.value))


class Logger:
    WARNING = 2

    def log(self, severity: int, text: str) -> None:
        """Take what the package says when it is imported."""


@dataclass
class Field:
    """An attribute of a node, as the parser hands it over."""

    name: str
    data: Any
    kind: Any = None


@dataclass
class TensorDescription:
    """What is known of a tensor when a launch is computed; it holds itself as `desc`."""

    dims: tuple[int, ...]
    type: DataType
    format: str = "LINEAR"
    scale: float = 1.0

    @property
    def desc(self) -> "TensorDescription":
        return self


def dims_exprs(count: int) -> list[Any]:
    return [None] * count


@dataclass
class LaunchParameters:
    """Where a plugin writes its launch."""

    grid_x: Any = None
    grid_y: Any = None
    grid_z: Any = None
    block_x: Any = None
    block_y: Any = None
    block_z: Any = None
    shared_mem: Any = None


class Scalars(dict[int, Any]):
    """Where a plugin writes its scalars."""

    nbSymExprs = 0


@dataclass
class Registry:
    creators: dict[tuple[str, str], Any] = field(default_factory=dict)

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.creators[creator.name, namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, namespace]


@contextmanager
def tensorrt(version: str = "11.4.0") -> Iterator[Any]:
    """Put the stand-in where `import tensorrt` finds it, with the package above it."""
    folder = package()
    assert folder is not None
    made = _module(version, folder.parent)
    before = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "tensorrt"}
    for name in before:
        del sys.modules[name]
    sys.modules["tensorrt"] = made
    try:
        yield made
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "tensorrt"]:
            del sys.modules[name]
        sys.modules.update(before)


def _module(version: str, folder: Path) -> Any:
    made: Any = types.ModuleType("tensorrt")
    made.__path__, made.__version__ = [str(folder)], version
    made.registry = Registry()
    made.get_plugin_registry = lambda: made.registry
    made.DataType, made.DimensionOperation, made.IDimensionExpr = DataType, Operation, DimensionExpr
    made.float32, made.float16, made.bfloat16 = DataType.FLOAT, DataType.HALF, DataType.BF16
    made.int64, made.int32, made.int8 = DataType.INT64, DataType.INT32, DataType.INT8
    made.Dims = types.SimpleNamespace(MAX_DIMS=8)
    for name in ("QuickPluginCreationRequest", "PluginArgType", "PluginArgDataType"):
        setattr(made, name, _Anything(name))
    for name in ("PluginFieldType", "TensorFormat", "TensorRTPhase", "PluginCapabilityType"):
        setattr(made, name, _Anything(name))
    made.PluginField, made.PluginFieldCollection, made.DimsExprs = Field, list, dims_exprs
    made.DynamicPluginTensorDesc = TensorDescription
    made.Logger = Logger
    made.__getattr__ = _base
    return made


def _base(name: str) -> Any:
    """Make a class that the package derives from."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


class _Anything:
    """An enumeration of which only the names matter."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, member: str) -> Any:
        if member.startswith("__"):
            raise AttributeError(member)
        return f"{self.name}.{member}"
