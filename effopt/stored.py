"""Which inputs an engine folder stores: to check the engine by, and to time it on."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from effopt.exits import find_exits
from effopt.program import Program

ROWS = 32
"""Rows that an engine with exits is timed on, since its time depends on them."""

_BATCH = "batch"


def stored_samples(program: Program, original: Program) -> tuple[Tensor, ...]:
    """Return the example inputs; for a program with exits the last rows of the calibration data.

    An input that does not count rows is that of the last batch. Of batches of a fixed size, or
    that differ in another size than their rows, there is the last alone.
    """
    data = original.calibration
    if data is None or program.get(find_exits) is None:
        return original.samples
    axes = [_rows(spec.shape) for spec in original.signature.inputs]
    last = deque((_tail(batch, axes) for batch in data), maxlen=ROWS)
    alike = [batch for batch in last if _others(batch, axes) == _others(last[-1], axes)]
    if all(axis is None for axis in axes):
        return last[-1]
    joined = zip(axes, zip(*alike, strict=True), strict=True)
    return tuple(
        parts[-1] if axis is None else _end(torch.cat(parts, axis), axis) for axis, parts in joined
    )


def _rows(shape: Sequence[int | str]) -> int | None:
    return shape.index(_BATCH) if _BATCH in shape else None


def _others(batch: Sequence[Tensor], axes: Sequence[int | None]) -> list[list[int]]:
    """Return the sizes of a batch but for its rows."""
    pairs = zip(batch, axes, strict=True)
    return [[size for n, size in enumerate(x.shape) if n != axis] for x, axis in pairs]


def _tail(batch: Sequence[Tensor], axes: Sequence[int | None]) -> tuple[Tensor, ...]:
    """Keep no more of a batch than may be stored."""
    return tuple(x if axis is None else _end(x, axis) for x, axis in zip(batch, axes, strict=True))


def _end(joined: Tensor, axis: int) -> Tensor:
    count = min(ROWS, joined.shape[axis])
    return joined.narrow(axis, joined.shape[axis] - count, count).clone()
