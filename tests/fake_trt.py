"""A stand-in for TensorRT's Python module: names as there, on the memory of the driver stand-in.

A plan is a JSON text that says what it takes and gives. It computes y = 2 x and next = ids + 1.
It holds a caller to what the library's documentation asks: shapes within the profile, addresses
of all tensors, and no change of a context after its work was captured.
"""

import ctypes
import enum
import json
from types import ModuleType
from typing import Any

import numpy as np

from tests.fake_cuda import Fake


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        pass

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


KINDS = {"float32": DataType.FLOAT, "int64": DataType.INT64, "bfloat16": DataType.BF16}
RANGES = [
    {"x": [[1, 4], [2, 4], [8, 4]], "ids": [[1], [2], [8]]},
    {"x": [[1, 4], [8, 4], [32, 16]], "ids": [[1], [8], [32]]},
]


def plan(**changes: Any) -> bytes:
    """Return a plan of two inputs, two outputs and two profiles, with changes."""
    record = {
        "inputs": {"x": "float32", "ids": "int64"},
        "outputs": {"y": "float32", "next": "int64"},
        "ranges": RANGES,
        **changes,
    }
    return json.dumps(record).encode()


_Back = ctypes.CFUNCTYPE(None, ctypes.c_int)


class IExecutionContext:
    def __init__(self, engine: "ICudaEngine") -> None:
        self._engine, self._profile, self._captured = engine, 0, False
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._back = _Back(self._compute)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._changed()
        self._profile, self._shapes = profile_index, {}
        return 0 <= profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._changed()
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        inside = all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        if inside:
            self._shapes[name] = tuple(shape)
        return inside

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._changed()
        self._addresses[name] = memory
        return memory % 4 == 0

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.record["inputs"] if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert not self.infer_shapes()
        if name == self._engine.record.get("open"):
            return (-1,)
        return self._shapes[{"y": "x", "next": "ids"}.get(name, name)]

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert set(self._addresses) == {"x", "ids", "y", "next"}
        said = self._engine.record.get("fails")
        capturing = bool(self._engine.fake.library.fake_capturing(ctypes.c_void_p(stream_handle)))
        if said and (capturing or not said.startswith("capture")):
            self._engine.logger.log(ILogger.Severity.ERROR, said)
            return False
        self._captured |= capturing
        enqueue = self._engine.fake.library.fake_enqueue
        return enqueue(ctypes.c_void_p(stream_handle), self._back, 0) == 0

    def _changed(self) -> None:
        assert not self._captured, "a context that was captured must stay as it is"

    def _compute(self, _: int) -> None:
        self._view("y", ctypes.c_float)[:] = 2 * self._view("x", ctypes.c_float)
        self._view("next", ctypes.c_int64)[:] = self._view("ids", ctypes.c_int64) + 1

    def _view(self, name: str, kind: Any) -> Any:
        count = int(np.prod(self.get_tensor_shape(name)))
        return np.ctypeslib.as_array((kind * count).from_address(self._addresses[name]))


class ICudaEngine:
    def __init__(self, fake: Fake, logger: Any, record: dict[str, Any]) -> None:
        self.fake, self.logger, self.record = fake, logger, record
        self._names = [*record["inputs"], *record["outputs"]]
        self.num_io_tensors = len(self._names)
        self.num_optimization_profiles = len(record["ranges"])
        self.streamable_weights_size = record.get("streamable", 0)
        self.weight_streaming_budget_v2 = self.streamable_weights_size
        self.contexts: list[IExecutionContext] = []

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.record["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return KINDS[{**self.record["inputs"], **self.record["outputs"]}[name]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        host = name == self.record.get("host")
        return TensorLocation.HOST if host else TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.record["ranges"][profile_index][name]]

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.streamable_weights_size // 2

    def create_execution_context(self) -> IExecutionContext | None:
        if len(self.contexts) >= self.record.get("contexts", 100):
            self.logger.log(ILogger.Severity.ERROR, "Requested amount of GPU memory (8 bytes)")
            return None
        self.contexts.append(IExecutionContext(self))
        return self.contexts[-1]


CLASSES = (DataType, TensorIOMode, TensorLocation, ILogger, IExecutionContext, ICudaEngine)
OWN = {"fake", "logger", "record", "contexts"}
"""Attributes that are the stand-in's own."""


class RuntimeNames:
    """What `Runtime` has; the class itself is made for each stand-in of the driver."""

    engine_host_code_allowed: bool = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        raise NotImplementedError


def module(fake: Fake, said: str = "") -> ModuleType:
    """Make the module; with `said`, every plan is refused with these words in the log."""
    engines: list[ICudaEngine] = []

    class Runtime(RuntimeNames):
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            record = json.loads(serialized_engine)
            refused = said or (
                "the plan contains host code" * bool(record.get("code"))
                if not self.engine_host_code_allowed
                else ""
            )
            if refused:
                self._logger.log(ILogger.Severity.ERROR, refused)
                return None
            engines.append(ICudaEngine(fake, self._logger, record))
            return engines[-1]

    made = ModuleType("tensorrt")
    for kind in CLASSES:
        setattr(made, kind.__name__, kind)
    made.Runtime, made.engines, made.__version__ = Runtime, engines, "10.0"  # type: ignore[attr-defined]
    return made
