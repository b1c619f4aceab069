"""Launching a kernel through the driver, with its outputs poisoned and its buffers guarded.

A launch is given as a `Case`: entry name, PTX, grid, block, shared bytes and ordered arguments,
which is all that a plugin passes. `case` makes it of a plugin; `OnDevice` runs plugins so.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from effopt.backend import Array
from effopt.backends.cuda_driver import Buffer, Device, Stream
from effopt.backends.cuda_launch import Module, Three, launch
from effopt.plugin import Plugin, results
from tests.plugin_runs import float_type, poisoned

GUARD = 256
"""Elements behind each buffer, which no kernel may touch."""

PATTERN = 0xA5

Ptx = Callable[[str], str]
"""Gives the PTX of a source, by its stem, for the GPU at hand."""


@dataclass(frozen=True)
class Out:
    """An output: its type and sizes."""

    dtype: torch.dtype
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One launch; arguments are inputs, int32 scalars and outputs, in the order of the entry."""

    entry: str
    ptx: str
    grid: Three
    block: Three
    shared: int
    arguments: tuple[Tensor | int | Out, ...]

    @property
    def moved(self) -> int:
        """The bytes of all inputs and outputs: what a launch moves at the least."""
        total = 0
        for argument in self.arguments:
            if isinstance(argument, Tensor):
                total += argument.numel() * argument.element_size()
            elif isinstance(argument, Out):
                total += int(np.prod(argument.sizes)) * argument.dtype.itemsize
        return total


def case(
    plugin: Plugin, inputs: Sequence[Tensor], attributes: Mapping[str, float], ptx: Ptx
) -> Case:
    """Make the launch of a plugin: inputs, then scalars, then outputs."""
    held = [tensor.contiguous() for tensor in inputs]
    rule = plugin.launch(plugin.known([tensor.shape for tensor in held], attributes))
    made = [Out(kind, tuple(sizes)) for kind, sizes in results(plugin, held, attributes)]
    entry = plugin.entry(float_type(plugin, held))
    block = (rule.block, 1, 1)
    arguments = (*held, *rule.scalars, *made)
    return Case(entry, ptx(plugin.stem), rule.grid, block, rule.shared, arguments)


class Loaded:
    """A case on a device, to be launched once or often; a context manager."""

    def __init__(self, gpu: Device, stream: Stream, case: Case) -> None:
        """Load the code; take buffers with guards, poison the outputs."""
        self._case, self._stream, self._held = case, stream, ExitStack()
        gpu.use()
        module = self._held.enter_context(Module(gpu, case.ptx.encode()))
        self._function = module.function(case.entry)
        self._start = [_bytes(argument) for argument in case.arguments]
        self._arguments: list[Buffer | int] = []
        for argument, start in zip(case.arguments, self._start, strict=True):
            if isinstance(argument, int):
                self._arguments.append(argument)
                continue
            buffer = self._held.enter_context(Buffer(gpu, start.nbytes))
            stream.upload(buffer, start)
            self._arguments.append(buffer)
        stream.synchronize()

    def launch(self) -> None:
        """Put one launch into the stream."""
        case = self._case
        where = (case.grid, case.block, case.shared, self._stream)
        launch(self._function, *where, self._arguments)

    def outputs(self) -> list[Tensor]:
        """Wait and return the outputs; AssertionError for what was written beside them."""
        self._stream.synchronize()
        made = []
        rows = zip(self._case.arguments, self._arguments, self._start, strict=True)
        for place, (argument, buffer, start) in enumerate(rows):
            if isinstance(argument, int) or isinstance(buffer, int):
                continue
            now = np.empty_like(start)
            self._stream.download(now, buffer)
            self._stream.synchronize()
            size = start.nbytes - GUARD * _itemsize(argument)
            what = f"argument {place} of {self._case.entry}"
            assert np.array_equal(now[size:], start[size:]), f"written behind {what}"
            if isinstance(argument, Out):
                flat = torch.from_numpy(now[:size].copy()).view(argument.dtype)
                made.append(flat.reshape(argument.sizes))
            else:
                assert np.array_equal(now, start), f"an input is overwritten: {what}"
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()


def _itemsize(argument: Tensor | Out) -> int:
    return argument.dtype.itemsize


def _bytes(argument: Tensor | int | Out) -> Array:
    """Return what a buffer begins with: the input or poison, and the guard behind it."""
    if isinstance(argument, int):
        return np.empty(0, np.uint8)
    tensor = poison(argument) if isinstance(argument, Out) else argument
    body = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    guard = np.full(GUARD * _itemsize(argument), PATTERN, np.uint8)
    return np.concatenate([body, guard])


def poison(out: Out) -> Tensor:
    """Return an output of NaN, or of what no kernel writes, so that a place left out shows."""
    if out.dtype is torch.bool:
        return torch.full(out.sizes, 255, dtype=torch.uint8)
    return poisoned(out.dtype, out.sizes)


class OnDevice:
    """Runs plugins on a GPU: an `Execute` for `effopt.plugin.running`."""

    def __init__(self, gpu: Device, stream: Stream, ptx: Ptx) -> None:
        self._gpu, self._stream, self._ptx = gpu, stream, ptx

    def __call__(
        self, plugin: Plugin, inputs: Sequence[Tensor], attributes: Mapping[str, float]
    ) -> list[Tensor]:
        made = case(plugin, inputs, attributes, self._ptx)
        with Loaded(self._gpu, self._stream, made) as loaded:
            loaded.launch()
            return loaded.outputs()
