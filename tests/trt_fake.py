"""A stand-in for TensorRT's Python module, as 10.16 and 11.4 name things: it builds nothing.

It notes what it is told. Names are those of the bindings' own documentation strings.
"""

import enum
from types import ModuleType, SimpleNamespace
from typing import Any

FLAGS = ("REFIT", "TF32", "WEIGHT_STREAMING")


class Fake(ModuleType):
    """One library: `told` is what it was told, `errors` are what its parser finds, in order.

    `plan` is what it builds; None says that it cannot, for the reason `reason`.
    """

    def __init__(self, version: str, name: str = "tensorrt") -> None:
        super().__init__(name)
        self.__version__ = version
        self.told: list[Any] = []
        self.errors: list[tuple[str, str, str]] = []
        self.plan: bytes | None = b"plan"
        self.reason = ""
        self.layers = ["first", "first/second"]
        self.BuilderFlag = enum.Enum("BuilderFlag", FLAGS)
        self.NetworkDefinitionCreationFlag = _creation(version)
        self.MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
        self.HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", ["AMPERE_PLUS"])
        self.ILogger = type("ILogger", (), {})
        self.IBuilderConfig = _Config
        self.Builder = lambda logger: _Builder(self, logger)
        self.OnnxParser = lambda network, logger: _Parser(self)
        self.OnnxParserRefitter = lambda refitter, logger: _Parser(self)
        self.Refitter = lambda engine, logger: _Refitter(self)
        self.Runtime = lambda logger: _Runtime(self, logger)


def _creation(version: str) -> Any:
    """Return the flags of networks: 11.x has no other than strongly typed ones."""
    members = {"STRONGLY_TYPED": 1} if version.startswith("10.") else {"PREFER_AOT": 2}
    return enum.IntEnum("NetworkDefinitionCreationFlag", members)


class _Builder:
    def __init__(self, trt: Fake, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def create_network(self, flags: int) -> Any:
        self.trt.told.append(("network", flags))
        kind = SimpleNamespace(name="PLUGIN_V3")
        layers = [SimpleNamespace(name=name, type=kind) for name in self.trt.layers]
        return SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)

    def create_builder_config(self) -> "_Config":
        return _Config(self.trt)

    def create_optimization_profile(self) -> Any:
        return SimpleNamespace(set_shape=lambda *shapes: self.trt.told.append(shapes))

    def build_serialized_network(self, network: Any, config: "_Config") -> bytes | None:
        self.logger.log(SimpleNamespace(name="WARNING"), "a warning ")
        self.logger.log(SimpleNamespace(name="INFO"), "chatter")
        if self.trt.plan is None:
            self.logger.log(SimpleNamespace(name="ERROR"), self.trt.reason)
        return self.trt.plan


class _Config:
    def __init__(self, trt: Fake) -> None:
        self.__dict__["trt"] = trt

    def __setattr__(self, name: str, value: Any) -> None:
        self.trt.told.append((name, value))

    def set_flag(self, flag: Any) -> None:
        self.trt.told.append(("set", flag.name))

    def clear_flag(self, flag: Any) -> None:
        self.trt.told.append(("clear", flag.name))

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.trt.told.append((pool.name, size))

    def add_optimization_profile(self, profile: Any) -> int:
        return 0

    def builder_optimization_level(self) -> None:
        """Exist, as the class has the property."""

    def create_timing_cache(self, data: bytes) -> Any:
        return SimpleNamespace(serialize=lambda: data + b"+")

    def set_timing_cache(self, cache: Any, ignore: bool) -> None:
        self.__dict__["cache"] = cache

    def get_timing_cache(self) -> Any:
        return self.__dict__["cache"]


class _Parser:
    def __init__(self, trt: Fake) -> None:
        self.trt = trt
        self.num_errors = len(trt.errors)

    def parse_from_file(self, path: str) -> bool:
        return not self.trt.errors

    refit_from_file = parse_from_file

    def get_error(self, place: int) -> Any:
        name, operator, text = self.trt.errors[place]
        code = SimpleNamespace(name="UNSUPPORTED_NODE")
        found = {"node_name": name, "node_operator": operator, "desc": text, "code": code}
        return SimpleNamespace(**{key: lambda value=value: value for key, value in found.items()})


class _Refitter:
    def __init__(self, trt: Fake) -> None:
        self.trt = trt

    def refit_cuda_engine(self) -> bool:
        return self.trt.plan is not None

    def get_missing_weights(self) -> list[str]:
        return ["a.weight", "b.weight"]


class _Runtime:
    def __init__(self, trt: Fake, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        self.trt.told.append(("plan", data))
        if data == b"of another version":
            self.logger.log(SimpleNamespace(name="ERROR"), "version mismatch")
            return None
        return SimpleNamespace(serialize=lambda: data + b" with new weights", num_layers=2)
