"""Early exits on cluttered canvases: engines with a promise, timed against never leaving early.

python -m examples.exits.latency [--rows NAME,...] [--small] [--seconds S] [--json]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table

import effopt
from effopt.bench import threads
from effopt.console import Progress, print_error
from effopt.engine import Engine
from effopt.errors import EffoptError
from effopt.measure import Proportion, Timing, compare, top1_agreement
from effopt.signature import EXIT_INDEX, TAU
from examples.digits.data import canvases
from examples.digits.model import trained
from examples.variants import chosen, text_of

CUTS = (0, 1, 2)
EXITS = (
    f"exit-early{{cuts=[{','.join(map(str, CUTS))}],head=ridge,pool=first-mean,"
    "rule=ltt,epsilon=0.01,delta=0.05,lower=LOWER}"
)
ROWS: Mapping[str, str] = MappingProxyType({
    "if": EXITS.replace("LOWER", "if"),
    "compact": EXITS.replace("LOWER", "compact"),
    "split": EXITS.replace("LOWER", "split"),
    "balanced": "balanced," + EXITS.replace("LOWER", "if"),
    "int8": "quantize{scheme=int8-dynamic}," + EXITS.replace("LOWER", "if"),
})  # fmt: skip
"""The recipe of each row."""

CANVASES = 2000
SMALL = 800
"""Canvases with --small: enough for the promise, at 40 % to fit heads and 60 % to calibrate."""
TURNS: Mapping[int, int] = MappingProxyType({1: 128, 16: 16})
"""Batch sizes that are timed, and how many batches take turns: canvases leave at many exits."""
_CHUNK = 50

NEVER, LEAVE, PLAIN = "never", "leave", "exact"
"""The engine with thresholds of infinity, the same with its own, and one without exits."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One engine: `same` is how often it says the class that it says if no row leaves early.

    `accuracy` and `full` are with its own thresholds and with infinity, `shares` of rows by exit.
    `promised` are the words of the promise, `cost` what it expects in work. `timings` hold PLAIN,
    NEVER and LEAVE for each batch size, with speed-ups over NEVER.
    """

    same: Proportion
    accuracy: float
    full: float
    shares: tuple[float, ...]
    promised: str
    cost: float
    timings: Mapping[int, Mapping[str, Timing]]


def measured(
    names: Sequence[str], count: int, seconds: float, stage: Callable[[str], None]
) -> dict[str, Row]:
    """Make the engines and measure them; `count` canvases calibrate, and as many are held out.

    `seconds` is the time for each engine and batch size. Raises what `effopt.optimize` does.
    """
    held, labels = canvases("test", count, seed=1)
    with tempfile.TemporaryDirectory(prefix="effopt-exits-") as scratch:
        stage("convert without exits")
        plain, _ = _engine("exact", count, Path(scratch) / PLAIN)
        found = dict[str, Row]()
        for name in names:
            stage(f"convert with recipe {ROWS[name]}")
            engine, promise = _engine(ROWS[name], count, Path(scratch) / name)
            stage(f"run and time {name}")
            found[name] = _row(engine, promise, plain, (held, labels), seconds)
    return found


def _engine(recipe: str, count: int, folder: Path) -> tuple[Engine, dict[str, Any]]:
    """Return an engine and what its exits promise."""
    pixels, _ = canvases("validation", count, seed=1)
    data = [{"pixels": torch.from_numpy(x)} for x in np.array_split(pixels, count // _CHUNK)]
    example = {"pixels": data[0]["pixels"][:8]}
    made = effopt.optimize(trained()[0], example, recipe=recipe, calibration=data)
    promise = made.program.promise
    engine = effopt.load(made.save(folder, measure=False))
    return engine, {} if promise is None else {"words": promise.words(), "cost": promise.cost}


def _row(
    engine: Engine,
    promise: Mapping[str, Any],
    plain: Engine,
    held: tuple[Floats, NDArray[np.int64]],
    seconds: float,
) -> Row:
    pixels, labels = held
    infinite = {TAU: np.full(len(CUTS), np.inf, np.float32)}
    leave, never = _answers(engine, pixels, {}), _answers(engine, pixels, infinite)
    assert bool((never[EXIT_INDEX] == len(CUTS) + 1).all()), "no score reaches infinity"
    taken = np.bincount(leave[EXIT_INDEX], minlength=len(CUTS) + 2)[1:] / len(pixels)
    timings = {}
    for batch, turns in TURNS.items():
        parts = np.split(pixels[: batch * turns], turns)
        calls = {
            NEVER: [partial(engine, pixels=part, **infinite) for part in parts],
            LEAVE: [partial(engine, pixels=part) for part in parts],
            PLAIN: [partial(plain, pixels=part) for part in parts],
        }
        timings[batch] = compare(calls, baseline=NEVER, budget=seconds)
    right = [float((x["logits"].argmax(1) == labels).mean()) for x in (leave, never)]
    return Row(
        top1_agreement(never["logits"], leave["logits"]),
        right[0],
        right[1],
        tuple(taken.tolist()),
        promise["words"],
        promise["cost"],
        timings,
    )


def _answers(engine: Engine, pixels: Floats, thresholds: Mapping[str, Floats]) -> dict[str, Any]:
    """Run all canvases; return each output by name."""
    parts = np.array_split(pixels, len(pixels) // _CHUNK)
    found = [engine(pixels=part, **thresholds) for part in parts]
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


# --- printing -----------------------------------------------------------------------------------


def text(rows: Mapping[str, Row]) -> str:
    """Write quality and times as two tables."""
    quality = _table(
        f"Against the same engine at infinity; % that leave at {len(CUTS)} exits and the end",
        ("engine", "same", "least", "accuracy", "at inf.", "leave", "work"),
    )
    times = _table(
        f"Mean ms a call, of canvases that differ; threads: {threads()}",
        ("engine", "batch", PLAIN, NEVER, LEAVE, f"over {NEVER}", "95 %", f"over {PLAIN}"),
    )
    for name, row in rows.items():
        shares = " ".join(f"{100 * share:.1f}" for share in row.shares)
        same = (f"{row.same.value:.2%}", f"{row.same.low:.2%}")
        quality.add_row(name, *same, *_percent(row.accuracy, row.full), shares, f"{row.cost:.2f}")
        for batch, found in row.timings.items():
            times.add_row(name if batch == min(row.timings) else "", str(batch), *_times(found))
    promised = "\n".join(f"{name}: {row.promised}" for name, row in rows.items())
    return text_of(quality, "", promised, "", times, "", colour=False)


def _table(title: str, heads: Sequence[str]) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    made.show_edge, made.pad_edge = False, False
    for place, head in enumerate(heads):
        made.add_column(head, justify="right" if place else "left", no_wrap=True)
    return made


def _percent(*shares: float) -> list[str]:
    return [f"{share:.2%}" for share in shares]


def _times(found: Mapping[str, Timing]) -> list[str]:
    """Write the means, the speed-up over never leaving with its interval, and over no exits."""
    leave = found[LEAVE]
    interval = f"{leave.speedup_low:.2f}-{leave.speedup_high:.2f}"
    means = [f"{found[name].mean_ms:.2f}" for name in (PLAIN, NEVER, LEAVE)]
    over = (leave.speedup or 1.0) / (found[PLAIN].speedup or 1.0)
    return [*means, f"{leave.speedup:.2f}", interval, f"{over:.2f}"]


def main(words: Sequence[str] | None = None) -> int:
    """Print the tables, or one JSON document."""
    parser = argparse.ArgumentParser(prog="examples.exits.latency", description=__doc__)
    every = ",".join(ROWS)
    parser.add_argument("--rows", type=chosen(ROWS), default=every, help=f"of {every}")
    parser.add_argument("--small", action="store_true", help=f"{SMALL} canvases, not {CANVASES}")
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S", help="timing of each batch size"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args(words)
    count = SMALL if given.small else CANVASES
    try:
        with redirect_stdout(sys.stderr), Progress(quiet=False) as progress:
            found = measured(given.rows, count, given.seconds, progress.stage)
    except EffoptError as error:
        print_error(error, error.exit_code, given.json, sys.stdout)
        return error.exit_code
    document = {"threads": threads(), "rows": {name: asdict(row) for name, row in found.items()}}
    print(json.dumps(document, indent=1) if given.json else text(found).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
