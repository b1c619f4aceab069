"""Engines against each other: their times and how far their outputs agree. Free of torch."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from effopt.backend import Array
from effopt.engine import Engine, bind, has_exits, without_exits
from effopt.errors import UsageError
from effopt.measure import Call, compare, cosine, top1_agreement
from effopt.report import Latency, Quality

Feeds = dict[str, Array]

NEVER = ", no exits"
"""What the name of an engine gets where it is timed with thresholds that are never reached."""

_BATCH = "batch"
_PATIENCE = 600.0
"""Seconds that loading engines may take beyond their timing."""


def batches(engine: Engine) -> tuple[int, ...]:
    """Return the batch sizes to measure: 1 and 8, or the one that the engine was fixed to."""
    shapes = [spec.shape for spec in engine.signature.inputs]
    if any(_BATCH in shape for shape in shapes):
        return (1, 8)
    return next(((shape[0],) for shape in shapes if shape and isinstance(shape[0], int)), (1,))


def feeds(engine: Engine, batch: int, turn: int = 0) -> Feeds:
    """Return the stored inputs by name, with their rows repeated or cut to the batch size.

    Each `turn` takes the rows that follow those of the turn before.
    Raises UsageError where the folder stores no inputs, or the batch is fixed to another size.
    """
    stored, found = engine.reference, Feeds()
    for spec in engine.signature.needed:
        array = stored.get(f"input.{spec.name}")
        if array is None:
            raise UsageError(f"{engine.folder} holds no reference inputs", "write the engine again")
        axis = spec.shape.index(_BATCH) if _BATCH in spec.shape else None
        rows = (turn * batch + np.arange(batch)) % array.shape[axis] if axis is not None else None
        found[spec.name] = array if rows is None else np.take(array, rows, axis=axis)
    fixed = batches(engine)
    if len(fixed) == 1 and batch not in fixed:
        raise UsageError(
            f"{engine.folder} was made for a batch of {fixed[0]} only",
            "convert the model again with --dynamic batch",
        )
    return found


def turns(engine: Engine, batch: int) -> list[Feeds]:
    """Return what to time an engine on: the stored rows, in batches that differ if times do.

    With early exits the time of a call depends on its inputs, so that one input says little.
    """
    if not has_exits(engine.signature):
        return [feeds(engine, batch)]
    rows = (
        engine.reference[f"input.{spec.name}"].shape[spec.shape.index(_BATCH)]
        for spec in engine.signature.needed
        if _BATCH in spec.shape
    )
    return [feeds(engine, batch, turn) for turn in range(max(1, next(rows, 1) // batch))]


def time_engines(
    engines: Mapping[str, Engine], inputs: Sequence[Feeds], batch: int, budget: float = 20.0
) -> tuple[Latency, ...]:
    """Time engines on the same inputs, one after the other, interleaved, within `budget` seconds.

    The first engine is the baseline of the speed-ups. An engine with early exits is timed without
    them as well. Only the run itself is timed: the inputs are checked before.
    """
    calls: dict[str, list[Call]] = {}
    for name, engine in engines.items():
        if has_exits(engine.signature):
            never = (without_exits(engine.signature, given) for given in inputs)
            calls[f"{name}{NEVER}"] = [partial(engine.run, given) for given in never]
        bound = (bind(engine.signature, (), given) for given in inputs)
        calls[name] = [partial(engine.run, given) for given in bound]
    timings = compare(calls, budget=budget)
    return tuple(Latency.of(name, batch, threads(), timing) for name, timing in timings.items())


def threads() -> int:
    """Return the processors that this process may use: the engines use as many threads at most."""
    allowed = getattr(os, "sched_getaffinity", None)  # absent on some systems
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def agreement(reference: Engine, other: Engine, inputs: Feeds, data: str) -> tuple[Quality, ...]:
    """Compare the outputs that two engines give by the same name on the same inputs.

    For each: the mean cosine over the rows, with the least row as its lower bound; for `logits`,
    or the only output where it is a table, also how often the largest is at the same place, with
    its 95 % interval. An output of two shapes has no value, and a note in its place.
    """
    return tuple(agreement_of(_outputs(reference, inputs), _outputs(other, inputs), data))


def _outputs(engine: Engine, inputs: Feeds) -> dict[str, Array]:
    names = [spec.name for spec in engine.signature.outputs]
    got = engine.run(bind(engine.signature, (), inputs))
    return dict(zip(names, got, strict=True))


def agreement_of(want: Feeds, got: Feeds, data: str) -> Iterator[Quality]:
    """Compare outputs by name, as `agreement` does for engines."""
    for name in [name for name in want if name in got]:
        if want[name].shape != got[name].shape:
            note = f"not compared: the shapes are {list(want[name].shape)}, {list(got[name].shape)}"
            yield Quality(f"cosine of {name}", None, data=note)
            continue
        found = cosine(want[name], got[name])
        yield Quality(f"cosine of {name}", found.mean, found.min, None, found.rows, data)
        if name == "logits" or (len(want) == 1 and _is_choice(want[name])):
            share = top1_agreement(want[name], got[name])
            yield Quality(
                f"top-1 agreement of {name}",
                share.value,
                share.low,
                share.high,
                share.samples,
                data,
            )


def _is_choice(array: Array) -> bool:
    """Tell whether an array may hold a row of scores for each sample."""
    return array.ndim == 2 and array.shape[1] > 1
