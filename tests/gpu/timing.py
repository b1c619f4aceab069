"""Times of launches by events of the stream, and the table and document that they make."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from effopt.backends.cuda_driver import Device, Event, Stream
from effopt.plain import figure

WARM, COUNT = 20, 200
"""Launches ahead of those that are timed, and how many of them."""


@dataclass(frozen=True)
class Row:
    """One kernel at one size: seconds of our launch and of the same in plain torch, or None.

    `moved` are the bytes of inputs and outputs: `bandwidth` is what they make a second.
    """

    kernel: str
    sizes: str
    dtype: str
    ours: float
    torch: float | None
    moved: int

    @property
    def speedup(self) -> float | None:
        """How many times as long plain torch takes."""
        return None if self.torch is None else self.torch / self.ours

    @property
    def bandwidth(self) -> float:
        """GB/s, if each input is read and each output written once."""
        return self.moved / self.ours / 1e9


class Times:
    """The rows of one run, on one GPU."""

    def __init__(self) -> None:
        self._gpu: Device | None = None
        self._rows: list[Row] = []

    def add(self, gpu: Device, row: Row) -> None:
        """Keep a row."""
        self._gpu = gpu
        self._rows.append(row)

    def text(self) -> str:
        """Return the table and, behind it, the document."""
        return f"{table(self._rows)}\n\n{document(self._gpu, self._rows)}" if self._gpu else ""


def median_time(gpu: Device, stream: Stream, work: Callable[[], None]) -> float:
    """Return the median of the seconds between an event ahead of the work and one behind it."""
    for _ in range(WARM):
        work()
    pairs = [(Event(gpu), Event(gpu)) for _ in range(COUNT)]
    for start, stop in pairs:
        start.record(stream)
        work()
        stop.record(stream)
    stream.synchronize()
    return statistics.median(stop.since(start) for start, stop in pairs)


def torch_time(operator: Callable[..., Any], arguments: Sequence[Any]) -> float | None:
    """Time plain torch in the same way, on the GPU; None where this torch has no CUDA."""
    if not torch.cuda.is_available():
        return None
    moved = [part.cuda() if isinstance(part, Tensor) else part for part in arguments]
    for _ in range(WARM):
        operator(*moved)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(COUNT)]
    for start, stop in pairs:
        start.record()
        operator(*moved)
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) / 1000 for start, stop in pairs)


def table(rows: Sequence[Row]) -> str:
    """Write the rows in Markdown, for docs/gpu.md."""
    head = ["kernel", "sizes", "type", "ours, µs", "plain torch, µs", "ratio", "GB/s"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        other = "" if row.torch is None else figure(row.torch * 1e6, 3)
        ratio = "" if row.speedup is None else f"{row.speedup:.1f}"
        ours, wide = figure(row.ours * 1e6, 3), f"{row.bandwidth:.0f}"
        lines.append([row.kernel, row.sizes, row.dtype, ours, other, ratio, wide])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def document(gpu: Device, rows: Sequence[Row]) -> str:
    """Write the rows in JSON, with what they were measured on."""
    where = {
        "device": gpu.name,
        "arch": gpu.arch,
        "driver_cuda": gpu.cuda,
        "torch": torch.__version__,
        "warm": WARM,
        "count": COUNT,
    }
    return json.dumps({**where, "rows": [asdict(row) for row in rows]})
