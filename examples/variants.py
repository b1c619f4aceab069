"""One model, several ways to run it: made, timed against each other, and set side by side."""

import argparse
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import effopt
from effopt.errors import unknown
from effopt.measure import Timing, compare
from effopt.plain import figure, time_text
from effopt.report import Latency, Report

Floats = NDArray[np.float32]
Feeds = Mapping[str, NDArray[Any]]
Tensors = dict[str, Tensor]

OPSET = 20
"""The opset of the plain export, the one that effopt writes."""


@dataclass(frozen=True)
class Variant:
    """One way to run a model.

    `run` maps arrays, by input name, to the model's first output. `macs` are the
    multiply-accumulates of one sample, `size` is the bytes of its files. A speed-up counts against
    the faster of the variants that are `plain`: the exports that change no number.
    """

    name: str
    runtime: str
    run: Callable[[Feeds], Floats]
    macs: int
    size: int
    plain: bool = False


def chosen(known: Iterable[str], what: str = "model") -> Callable[[str], tuple[str, ...]]:
    """Return the reader of an option that lists some of the known names: `a,b`."""
    names = tuple(known)

    def read(text: str) -> tuple[str, ...]:
        given = tuple(name.strip() for name in text.split(","))
        for name in given:
            if name not in names:
                wrong = unknown(what, name, names)
                raise argparse.ArgumentTypeError(f"{wrong.reason}: {wrong.remedy}")
        return given

    return read


def threads() -> int:
    """Return the threads that torch uses; onnxruntime gets as many."""
    return torch.get_num_threads()


# --- making -----------------------------------------------------------------------------------


def eager(model: nn.Module, macs: int, size: int) -> Variant:
    """Run the model itself, in eager torch."""

    def run(feeds: Feeds) -> Floats:
        with torch.inference_mode():
            outputs = model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        first: Tensor = pytree.tree_leaves(outputs)[0]
        return first.numpy()

    return Variant("original", "torch eager", run, macs, size)


def plain_export(model: nn.Module, inputs: Tensors, folder: Path, macs: int) -> Variant:
    """Export the model as torch's manual says, into an empty folder; the batch is dynamic."""
    path = folder / "model.onnx"
    batch = torch.export.Dim("batch")
    with _quiet():
        torch.onnx.export(
            model,
            (),
            path,
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes={name: {0: batch} for name in inputs},
            opset_version=OPSET,
            verbose=False,
        )
    return Variant("plain export", "onnxruntime", session(path), macs, _size(folder), plain=True)


def converted(
    name: str,
    model: nn.Module,
    inputs: Tensors,
    folder: Path,
    recipe: str,
    *,
    measure: bool = False,
    plain: bool = False,
) -> tuple[Variant, Report]:
    """Convert the model with effopt into an engine folder, and open the folder's ONNX file."""
    optimized = effopt.optimize(model, inputs, recipe=recipe)
    written = optimized.save(folder, measure=measure)
    run, macs = session(written / "model.onnx"), optimized.report.macs_after
    return Variant(name, "onnxruntime", run, macs, _size(written), plain), optimized.report


def session(path: Path) -> Callable[[Feeds], Floats]:
    """Open an ONNX file in onnxruntime, on the CPU, with as many threads as torch uses."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3  # errors only
    opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in opened.get_inputs()]

    def run(feeds: Feeds) -> Floats:
        first: Floats = opened.run(None, {name: feeds[name] for name in names})[0]
        return first

    return run


def _size(folder: Path) -> int:
    """Return the bytes of the ONNX file and of the weights beside it."""
    return sum(path.stat().st_size for path in folder.glob("model.onnx*"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes to its own developers off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- timing -----------------------------------------------------------------------------------


def rows_of(feeds: Feeds, batch: int) -> dict[str, NDArray[Any]]:
    """Cut inputs to `batch` rows, or repeat their rows up to that."""
    return {name: np.take(a, np.arange(batch) % len(a), axis=0) for name, a in feeds.items()}


def timed(
    variants: Sequence[Variant], feeds: Feeds, batch: int, seconds: float
) -> dict[str, Latency]:
    """Time all variants on the same rows, interleaved, in about 1.25 `seconds`."""
    rows = rows_of(feeds, batch)
    calls = {variant.name: partial(variant.run, rows) for variant in variants}
    plain = [variant.name for variant in variants if variant.plain]
    timings = _against_faster(calls, plain, seconds)
    return {name: Latency.of(name, batch, threads(), found) for name, found in timings.items()}


def _against_faster(
    calls: Mapping[str, Callable[[], object]], plain: Sequence[str], seconds: float
) -> dict[str, Timing]:
    """Compare with the faster of the plain exports, which a short run of those alone picks.

    The whole run is repeated with another baseline where it shows that the short one was wrong.
    """
    picked = compare({name: calls[name] for name in plain}, budget=seconds / 4)
    base = max(plain, key=lambda name: picked[name].speedup or 1.0)
    found = compare(calls, baseline=base, budget=seconds)
    best = max(plain, key=lambda name: found[name].speedup or 1.0)
    return found if best == base else compare(calls, baseline=best, budget=seconds)


# --- side by side -----------------------------------------------------------------------------

Cell = tuple[str, str]
"""A figure, and below it what goes with it: its interval, its unit."""


def cells(variant: Variant, latency: Iterable[Latency]) -> list[Cell]:
    """Write what every table shows of a variant: name, times and speed-ups, work and size."""
    found: list[Cell] = [(variant.name, variant.runtime)]
    for one in latency:
        found.append((time_text(one.median_ms), f"{figure(one.low_ms)}-{figure(one.high_ms)}"))
        found.append(_speedup(one))
    return [*found, (figure(variant.macs / 1e6), figure(variant.size / 2**20))]


def _speedup(one: Latency) -> Cell:
    if one.speedup is None or one.speedup_low is None or one.speedup_high is None:
        return "1", "baseline"
    return f"{one.speedup:.2f}x", f"{one.speedup_low:.2f}-{one.speedup_high:.2f}"


def table(title: str, batches: Iterable[int], last: Iterable[str], rows: list[list[Cell]]) -> Table:
    """Set variants side by side in at most 80 columns; `last` heads the columns of quality."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    made.show_edge, made.pad_edge, made.padding, made.leading = False, False, (0, 0), 1
    heads = ["variant\nruntime"]
    for batch in batches:
        heads += [f"batch {batch}\nms", "speed-up\n"]
    for place, head in enumerate([*heads, "MMACs\nMiB", *last]):
        made.add_column(head, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        made.add_row(*("\n".join(cell) for cell in row))
    return made


def caption(latency: Iterable[Latency], quality: str) -> str:
    """Say what stands below each figure and what the speed-ups count against."""
    found = [one for one in latency if one.baseline]
    batches: dict[str, list[str]] = {}
    for base, batch in dict.fromkeys((one.baseline, str(one.batch)) for one in found):
        batches.setdefault(base, []).append(batch)
    named = ", ".join(f"{base} at batch {' and '.join(own)}" for base, own in batches.items())
    return (
        f"{found[0].threads} threads. Below: the middle half of the calls in ms; a 95 % interval "
        f"of the speed-up, which counts against the faster of the two exports that change no "
        f"number ({named}); {quality}."
    )


def text_of(*parts: RenderableType, colour: bool) -> str:
    """Render tables and words at 80 columns."""
    console = Console(width=80, force_terminal=colour, highlight=False, markup=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().split("\n"))


def record(variant: Variant, latency: Iterable[Latency]) -> dict[str, Any]:
    """Return the JSON record of a variant."""
    return {
        "variant": variant.name,
        "runtime": variant.runtime,
        "plain": variant.plain,
        "macs": variant.macs,
        "bytes": variant.size,
        "latency": [asdict(one) for one in latency],
    }
