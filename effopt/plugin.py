"""A plugin: one launch on a GPU that stands for a kernel, as a node of the domain `effopt`.

From one record come the node of the ONNX file, its function body, the launch through CUDA's driver
API, the plugin of TensorRT in Python and that in C++.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effopt.axes import same_size
from effopt.errors import UsageError
from effopt.sizes import NUMBERS, Algebra, evaluate

DOMAIN = "effopt"
FLOATS = ("float32", "float16", "bfloat16")
"""The types that the float type `T` of a plugin may be: each has its entry in the PTX."""

FLOAT_TYPE = "T"


@dataclass(frozen=True)
class Port:
    """One tensor of a plugin: its type, `T` or a fixed one such as "int64", and its sizes.

    Sizes of an input are names, which it gives a value, or repeat one that is known; of an output
    expressions of these and of the attributes.
    """

    name: str
    dtype: str
    sizes: tuple[str, ...]


@dataclass(frozen=True)
class Launch:
    """One launch: blocks and threads, dynamic shared memory in bytes, and the int32 arguments."""

    grid: tuple[Any, Any, Any]
    block: int
    shared: Any
    scalars: tuple[Any, ...]


@dataclass(frozen=True)
class Plugin:
    """How a kernel is launched, and what stands for it where no plugin is registered.

    `stem` names the CUDA source beside the kernel; its entries are `<stem>_<float type>`, and take
    the inputs, then `scalars` as int32, then the outputs. `attributes` are those of the node, by
    name, with their type, int or float. `grid` and `shared` (bytes) are expressions of sizes and
    attributes, see `effopt.sizes`; `block` is the number of threads. `body` is the same
    function in ONNX operators of opset 20, as an onnxscript function of the inputs and attributes,
    true for every size.
    `adapt` takes the arguments of the operator and returns its results, by `call` of this plugin
    or, for arguments that no launch is made for, by standard operators.
    """

    name: str
    stem: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    body: Callable[..., Any]
    adapt: Callable[..., Any]
    attributes: Mapping[str, type] = field(default_factory=dict)
    scalars: tuple[str, ...] = ()
    grid: tuple[str, str, str] = ("1", "1", "1")
    block: int = 256
    shared: str = "0"

    def entry(self, dtype: str) -> str:
        """Return the name of the entry in the PTX for one of FLOATS."""
        return f"{self.stem}_{dtype}"

    def known(
        self, shapes: Sequence[Sequence[Any]], attributes: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return sizes by name, from the shapes of all inputs, beside the attributes."""
        known: dict[str, Any] = dict(attributes)
        for port, shape in zip(self.inputs, shapes, strict=True):
            for name, size in zip(port.sizes, shape, strict=True):
                known.setdefault(name, size)
        return known

    def launch(self, known: Mapping[str, Any], algebra: Algebra = NUMBERS) -> Launch:
        """Return the launch for sizes and attributes by name."""

        def value(text: str) -> Any:
            return evaluate(text, known, algebra)

        x, y, z = map(value, self.grid)
        return Launch((x, y, z), self.block, value(self.shared), tuple(map(value, self.scalars)))


Execute = Callable[[Plugin, Sequence[Tensor], Mapping[str, float]], Sequence[Tensor]]
"""Runs a plugin on tensors, with its attributes by name; returns its outputs."""


def call(plugin: Plugin, inputs: Sequence[Tensor], **attributes: float) -> tuple[Tensor, ...]:
    """Run a plugin as the `running` around says.

    Inputs of fixed type are cast to it. Raises NoLaunch where `T` inputs have not one type among
    them, or where a size of one name is not known to be the same everywhere: nothing is broadcast.
    """
    made = [
        tensor if port.dtype == FLOAT_TYPE else tensor.to(getattr(torch, port.dtype))
        for port, tensor in zip(plugin.inputs, inputs, strict=True)
    ]
    if len(_float_types(plugin, made)) != 1 or not _agree(plugin, made):
        shapes = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in made)
        raise NoLaunch(f"{plugin.name} is not launched on {shapes}", "call its kernel instead")
    return tuple(_execute.get()(plugin, made, attributes))


class NoLaunch(UsageError):
    """A plugin's sizes or types contradict each other: standard operators are for these inputs."""


def _float_types(plugin: Plugin, inputs: Sequence[Tensor]) -> set[torch.dtype]:
    pairs = zip(plugin.inputs, inputs, strict=True)
    return {tensor.dtype for port, tensor in pairs if port.dtype == FLOAT_TYPE}


def _agree(plugin: Plugin, inputs: Sequence[Tensor]) -> bool:
    known = plugin.known([tensor.shape for tensor in inputs], {})
    return all(
        same_size(known[name], size)
        for port, tensor in zip(plugin.inputs, inputs, strict=True)
        for name, size in zip(port.sizes, tensor.shape, strict=True)
    )


@contextmanager
def running(execute: Execute) -> Iterator[None]:
    """Let `execute` run plugins, and with them what `Plugin.adapt` computes around them."""
    token = _execute.set(execute)
    try:
        yield
    finally:
        _execute.reset(token)


def results(
    plugin: Plugin, inputs: Sequence[Tensor], attributes: Mapping[str, float]
) -> list[tuple[torch.dtype, list[Any]]]:
    """Return the type and the sizes of each output."""
    known = plugin.known([tensor.shape for tensor in inputs], attributes)
    (real,) = _float_types(plugin, inputs)
    return [
        (
            real if port.dtype == FLOAT_TYPE else getattr(torch, port.dtype),
            [evaluate(size, known) for size in port.sizes],
        )
        for port in plugin.outputs
    ]


def _nothing(
    plugin: Plugin, inputs: Sequence[Tensor], attributes: Mapping[str, float]
) -> Sequence[Tensor]:
    raise UsageError(f"nothing runs {plugin.name} here", "call it within `effopt.plugin.running`")


_execute: ContextVar[Execute] = ContextVar("effopt.plugin", default=_nothing)
