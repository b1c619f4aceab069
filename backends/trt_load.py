"""Opening a TensorRT plan to run it: what it takes, at which sizes, and why it does not load.

`tensorrt` 10.x and 11.x and TensorRT-RTX have one API here. Free of torch. Run with TensorRT-RTX
1.7 up to where a GPU is needed; beyond that checked against a stand-in, not run on a device.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from effopt.backends.cuda_driver import Device
from effopt.backends.trt_child import Messages
from effopt.errors import EffoptError, MissingError, UnsafeFileError, UsageError, VerificationError
from effopt.signature import Signature, TensorSpec

MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
"""The modules that can run plans; no other name is imported, whatever a folder says."""

DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "float32": "FLOAT",
        "float16": "HALF",
        "int64": "INT64",
        "int32": "INT32",
        "int8": "INT8",
        "uint8": "UINT8",
        "bool": "BOOL",
    }
)
"""What TensorRT calls the types that an input or output of an engine can have."""

Shape = tuple[int, ...]
Range = tuple[Shape, Shape]
"""The least and the largest shape of an input."""


@dataclass(frozen=True)
class Options:
    """How a plan is run.

    `graphs` is the number of shapes, at most, that get a CUDA graph and an execution context of
    their own; 0 for none. `weight_budget` is how many bytes of weights stay on the device, where
    the plan was built to stream them; None leaves it to the library, by the memory that is free.
    """

    graphs: int = 4
    weight_budget: int | None = None


DEFAULTS = Options()

_BUILD = "build the engine again on this machine: effopt build DIR"
_Meaning = tuple[type[EffoptError], str, str]

SAID: tuple[tuple[str, _Meaning], ...] = (
    (
        r"magic ?tag",
        (VerificationError, "the file is no plan of this library, or of another release", _BUILD),
    ),
    (
        r"version tag does not match|not compatible with this version|newer plan file"
        r"|same version of tensorrt|created with tensorrt",
        (VerificationError, "the plan was written by another version of TensorRT", _BUILD),
    ),
    (
        r"incompatible device|expecting compute|rebuild the engine for compute capability",
        (VerificationError, "the plan was built for another GPU", _BUILD),
    ),
    (
        r"driver version|no cuda-capable|cuda error (35|100)\b",
        (MissingError, "the NVIDIA driver is not one that it can use", "install a newer driver"),
    ),
    (
        r"host code|hostcodeallowed|lean runtime",
        (
            UnsafeFileError,
            "the plan carries code for this machine",
            "do not run this file; build the engine yourself: effopt build DIR",
        ),
    ),
    (
        r"out ?of ?memory|insufficient memory|gpu memory|cuda error 2\b",
        (
            MissingError,
            "the GPU has not enough memory",
            "use smaller sizes or a smaller weight budget, or end other work on this GPU",
        ),
    ),
    (
        r"plugin",
        (
            MissingError,
            "the plan needs a plugin that is not registered",
            "load the library of the plugins first, or convert the model with plugins=off",
        ),
    ),
)
"""What the library's own messages mean, by a pattern; the first that fits counts.

The wording is that of the library of TensorRT-RTX 1.7, and of reports on NVIDIA/TensorRT (issues
564, 2041, 2176); the first was seen here, the others need a GPU.
"""


def explain(said: Messages, what: str) -> EffoptError:
    """Make the error of a call that failed, from what the library has said since the last."""
    text = " ".join(" ".join(said.errors).split())
    said.errors.clear()
    for pattern, (kind, reason, remedy) in SAID:
        if re.search(pattern, text, re.IGNORECASE):
            return kind(f"{what}: {reason} (it says: {text:.300})", remedy)
    tail = f"TensorRT says: {text:.300}" if text else "TensorRT says nothing more"
    return VerificationError(f"{what}: {tail}", _BUILD)


@dataclass(frozen=True)
class Plan:
    """An opened plan: the library's engine, and for each profile the range of each input.

    `runtime` and `said` are kept because the engine uses them as long as it lives.
    """

    engine: Any
    runtime: Any
    said: Messages
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Mapping[str, Range], ...]

    def profile(self, shapes: Sequence[Shape]) -> int:
        """Return the first profile that takes these shapes; UsageError where none does."""
        named = {spec.port: shape for spec, shape in zip(self.inputs, shapes, strict=True)}
        for place, ranges in enumerate(self.profiles):
            if all(_within(named[port], ranges[port]) for port in named):
                return place
        wrong = next(
            spec
            for spec in self.inputs
            if not all(_within(named[spec.port], ranges[spec.port]) for ranges in self.profiles)
        )
        taken = " or ".join(
            f"{list(least)} to {list(most)}"
            for least, most in (ranges[wrong.port] for ranges in self.profiles)
        )
        reason = f"input {wrong.name!r} has shape {list(named[wrong.port])}"
        remedy = "pass sizes within it, or build the engine for others: effopt build DIR"
        raise UsageError(f"{reason}, the engine was built for {taken}", remedy)


def _within(shape: Shape, bounds: Range) -> bool:
    least, most = bounds
    return len(shape) == len(least) and all(
        low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
    )


def open_plan(
    path: Path, signature: Signature, module: str, device: Device, options: Options = DEFAULTS
) -> Plan:
    """Load a plan on a device and check that it takes and gives what the signature says.

    Raises MissingError where the library is not installed or memory is short, VerificationError
    for a plan of another version, another GPU or another model, UnsafeFileError for one that
    carries code for this machine.
    """
    trt = library(module)
    said = Messages()
    device.use()
    runtime = _runtime(trt, said)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise explain(said, f"{path.name} cannot be loaded")
    _check_ports(trt, engine, signature, path.name)
    _limit_weights(engine, options.weight_budget)
    ranges = tuple(
        {spec.port: _range(engine, spec.port, place) for spec in signature.inputs}
        for place in range(engine.num_optimization_profiles)
    )
    said.errors.clear()
    return Plan(engine, runtime, said, signature.inputs, signature.outputs, ranges)


def _runtime(trt: Any, said: Messages) -> Any:
    """Start the library; it loads no plan that carries code for this machine."""
    try:
        runtime = trt.Runtime(said.logger(trt))
    except TypeError as error:  # what the bindings raise where the library returns none
        raise explain(said, f"{trt.__name__} cannot be started") from error
    runtime.engine_host_code_allowed = False
    return runtime


def library(module: str) -> Any:
    """Import a module that can run plans; MissingError where it cannot be."""
    if module not in MODULES:
        raise UsageError(f"{module[:100]!a} is no TensorRT", f"known: {', '.join(MODULES)}")
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library of it is not there
        first = (str(error).splitlines() or ["no reason given"])[0]
        remedy = "install TensorRT for this machine: pip install 'effopt[tensorrt]'"
        raise MissingError(f"{module} cannot be imported: {first}", remedy) from error


def _range(engine: Any, port: str, profile: int) -> Range:
    least, _, most = engine.get_tensor_profile_shape(port, profile)
    return tuple(least), tuple(most)


def _limit_weights(engine: Any, budget: int | None) -> None:
    """Say how many weights stay on the device, where the plan streams them."""
    if engine.streamable_weights_size:
        fitting = engine.get_weight_streaming_automatic_budget() if budget is None else budget
        engine.weight_streaming_budget_v2 = fitting


def _check_ports(trt: Any, engine: Any, signature: Signature, name: str) -> None:
    """Raise VerificationError where names, types or places of tensors are not the signature's."""
    ports = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
    found = {port: engine.get_tensor_mode(port) == trt.TensorIOMode.INPUT for port in ports}
    wanted = {spec.port: True for spec in signature.inputs}
    wanted |= {spec.port: False for spec in signature.outputs}
    if found != wanted:
        reason = f"{name} takes and gives {sorted(found)}, its signature says {sorted(wanted)}"
        raise VerificationError(reason, _BUILD)
    for spec in (*signature.inputs, *signature.outputs):
        has = engine.get_tensor_dtype(spec.port)
        member = DTYPES.get(spec.dtype)
        if member is None or has != getattr(trt.DataType, member):
            reason = f"{spec.port} of {name} is {has.name}, its signature says {spec.dtype}"
            raise VerificationError(reason, _BUILD)
        if engine.get_tensor_location(spec.port) == trt.TensorLocation.HOST:
            reason = f"{name} reads {spec.port} as a shape, on the host"
            raise VerificationError(reason, "report this model: the export is at fault")
