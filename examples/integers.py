"""Integer engines against onnxruntime's own quantizer: speed, worst output and size.

python -m examples.integers [--models NAMES] [--threads 1,2] [--seconds S] [--small] [--json]
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
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich import box
from rich.table import Table
from torch import nn

import effopt
from effopt.console import Progress, print_error
from effopt.errors import EffoptError
from effopt.measure import Cosine, compare, cosine
from effopt.plain import figure, time_text
from effopt.report import Latency
from examples.integer_models import CASES, ROWS, Case
from examples.variants import Feeds, Floats, Tensors, chosen, rows_of, text_of

BATCHES = (1, 8)
THREADS = (1, 2)
SECONDS = 60.0
ROUNDS = 8
"""At most eight ratios have no 95 % interval narrower than from the least to the greatest of them
(`effopt.measure.median_interval`), so one pair of figures is both."""

Run = Callable[[Feeds], Floats]
Listen = Callable[[str], None]

# --- engines ------------------------------------------------------------------------------------

BASE = "fp32"
OURS: Mapping[str, str] = MappingProxyType(
    {
        BASE: "exact",
        "int8-dynamic": "quantize{scheme=int8-dynamic,embeddings=true}",
        "int8-dynamic\nactivations=row": (
            "quantize{scheme=int8-dynamic,activations=row,embeddings=true}"
        ),
        "int4-rtn": "quantize{scheme=int4-rtn,embeddings=true}",
    }
)
"""The recipe of each engine that effopt makes; a name may have a second line.

quantize_dynamic puts embeddings on 8 bits too.
"""

THEIRS: Mapping[str, bool] = MappingProxyType(
    {"quantize_dynamic\nper tensor": False, "quantize_dynamic\nper channel": True}
)
"""`per_channel` of each engine that onnxruntime's quantizer makes of the file of fp32."""


def engines(model: nn.Module, inputs: Tensors, folder: Path, stage: Listen) -> dict[str, Path]:
    """Make the file of every engine in `folder`; the second half of the rows calibrates."""
    sample = {name: tensor[:2] for name, tensor in inputs.items()}
    data = [
        {name: tensor[start : start + 8] for name, tensor in inputs.items()}
        for start in range(ROWS, 2 * ROWS, 8)
    ]
    made = dict[str, Path]()
    for place, (name, recipe) in enumerate(OURS.items()):
        stage(f"convert with recipe {recipe}")
        optimized = effopt.optimize(model, sample, recipe=recipe, calibration=data)
        made[name] = optimized.save(folder / str(place), measure=False) / "model.onnx"
    prepared = folder / "prepared.onnx"
    stage("prepare for quantize_dynamic")
    quant_pre_process(made[BASE], prepared)
    for name, split in THEIRS.items():
        stage(f"quantize_dynamic with per_channel={split}")
        made[name] = folder / f"theirs-{split}.onnx"
        quantize_dynamic(prepared, made[name], per_channel=split, weight_type=QuantType.QInt8)
    return {name: made[name] for name in (BASE, *THEIRS, *OURS)}


def _size(path: Path) -> int:
    """Return the bytes of a file and of the weights beside it."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


def opened(path: Path, threads: int, output: str) -> Run:
    """Open a file in onnxruntime on the CPU; the result runs it and returns one output.

    Threads do not spin while they wait, so that engines in one process leave each other alone.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only
    made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in made.get_inputs()]

    def run(feeds: Feeds) -> Floats:
        found: Floats = made.run([output], {name: feeds[name] for name in names})[0]
        return found

    return run


# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One engine: its bytes over those of fp32, and by batch size its time and its outputs.

    A cosine is of each row to the row of fp32, where both ran in batches of that size.
    """

    name: str
    bytes: int
    size: float
    latency: tuple[Latency, ...]
    cosine: tuple[Cosine, ...]

    def document(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {**asdict(self), "name": _flat(self.name)}


@dataclass(frozen=True)
class Result:
    """All engines of one model with one number of threads."""

    title: str
    threads: int
    lines: tuple[Line, ...]

    def document(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        rows = [line.document() for line in self.lines]
        return {"title": self.title, "threads": self.threads, "rows": rows}

    def text(self) -> str:
        """Return the table and what its figures are."""
        made = Table(title=self.title, title_justify="left", title_style="bold")
        made.box, made.show_edge, made.pad_edge = box.SIMPLE_HEAD, False, False
        made.padding, made.leading = (0, 0), 1
        made.add_column("engine", no_wrap=True)
        for head in (*(h for n in BATCHES for h in _heads(n)), "size\n"):
            made.add_column(head, justify="right", no_wrap=True)
        for line in self.lines:
            pairs = zip(line.latency, line.cosine, strict=True)
            made.add_row(line.name, *(c for pair in pairs for c in _cells(*pair)), _share(line))
        return text_of(made, "", self._caption(), "", colour=False)

    def _caption(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return (
            f"{threads}, no spinning. Milliseconds: the median and the least. Speed-up: the median "
            f"over the rounds of the ratio to fp32 within a round; the least and the greatest "
            f"ratio, of at most {ROUNDS}, which is its interval; the ratio of the least times. "
            f"Cosine: the worst of {ROWS} rows, to fp32. Size: over fp32. "
            f"quantize_dynamic is onnxruntime's, with QInt8 weights, after its own preparation, "
            f"and all else as it comes: it also takes heads, embeddings and convolutions. The "
            f"others are effopt's, calibrated on {ROWS} other rows. Weights and inputs are "
            f"random: the order of the cosines says something, their values do not."
        )


def _flat(name: str) -> str:
    return name.replace("\n", " ")


def _heads(batch: int) -> tuple[str, str, str]:
    return f"batch {batch}\nms", "speed-up\n", "cosine\n"


def _cells(one: Latency, found: Cosine) -> tuple[str, str, str]:
    assert one.min_ms is not None
    times = f"{time_text(one.median_ms)}\n{time_text(one.min_ms)}"
    if one.speedup is None:
        return times, "1", "1"
    speeds = f"{one.speedup:.2f}x\n{one.speedup_low:.2f}-{one.speedup_high:.2f}"
    return times, f"{speeds}\n{one.speedup_min:.2f}x", f"{found.min:.5f}"


def _share(line: Line) -> str:
    return f"{line.size:.3f}\n{figure(line.bytes / 2**20)} MiB"


def bench(
    case: Case,
    threads: Sequence[int],
    seconds: float,
    stage: Listen,
    *,
    small: bool = False,
) -> list[Result]:
    """Make the engines of one model, and time them interleaved with each number of threads.

    `seconds` is the time for each batch size and number of threads; slow engines take longer, as
    three rounds are the least. `stage` hears what begins. Raises what `effopt.optimize` does.
    """
    torch.manual_seed(0)
    model, inputs = case.make(small)
    feeds = {name: tensor[:ROWS].numpy() for name, tensor in inputs.items()}
    title = f"{case.title} (tiny)" if small else case.title
    found = []
    with tempfile.TemporaryDirectory(prefix="effopt-integers-") as scratch:
        made = engines(model, inputs, Path(scratch), stage)
        sizes = {name: _size(path) for name, path in made.items()}
        for count in threads:
            stage(f"time with {count} threads")
            runs = {name: opened(path, count, case.output) for name, path in made.items()}
            found.append(Result(title, count, _lines(runs, sizes, feeds, count, seconds)))
    return found


def _lines(
    runs: Mapping[str, Run], sizes: Mapping[str, int], feeds: Feeds, threads: int, seconds: float
) -> tuple[Line, ...]:
    latency: dict[str, list[Latency]] = {name: [] for name in runs}
    cosines: dict[str, list[Cosine]] = {name: [] for name in runs}
    for batch in BATCHES:
        outputs = {name: in_batches(run, feeds, batch) for name, run in runs.items()}
        rows = rows_of(feeds, batch)
        calls = {name: partial(run, rows) for name, run in runs.items()}
        timings = compare(calls, baseline=BASE, rounds=ROUNDS, budget=seconds)
        for name, timing in timings.items():
            latency[name].append(Latency.of(_flat(name), batch, threads, timing))
            cosines[name].append(cosine(outputs[BASE], outputs[name]))
    return tuple(
        Line(name, size, size / sizes[BASE], tuple(latency[name]), tuple(cosines[name]))
        for name, size in sizes.items()
    )


def in_batches(run: Run, feeds: Feeds, batch: int) -> Floats:
    """Run all rows, `batch` at a time: a range that a batch shares depends on what is in it."""
    parts = [
        run({name: array[start : start + batch] for name, array in feeds.items()})
        for start in range(0, ROWS, batch)
    ]
    return np.concatenate(parts)


def measured(
    models: Sequence[str],
    threads: Sequence[int],
    seconds: float,
    stage: Listen,
    *,
    small: bool = False,
) -> dict[str, list[Result]]:
    """Run the named models as `bench` does."""
    return {name: bench(CASES[name], threads, seconds, stage, small=small) for name in models}


def document(found: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """Return the results of each model as JSON types."""
    return {name: [result.document() for result in results] for name, results in found.items()}


def text(found: Mapping[str, Sequence[Result]]) -> str:
    """Write all tables, one below the other."""
    return "\n".join(result.text() for results in found.values() for result in results)


# --- command line -------------------------------------------------------------------------------


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(word) for word in text.split(","))
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text} has a number under one")
    return counts


def main(words: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="examples.integers", description=__doc__)
    every, counts = ",".join(CASES), ",".join(map(str, THREADS))
    parser.add_argument("--models", type=chosen(CASES), default=every, help=f"of {every}")
    parser.add_argument(
        "--threads", type=_counts, default=counts, help=f"numbers to run with (default {counts})"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="S",
        help=f"timing of each batch size (default {SECONDS:.0f})",
    )
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args(words)
    try:
        with redirect_stdout(sys.stderr), Progress(quiet=False) as progress:
            asked = (given.models, given.threads, given.seconds, progress.stage)
            found = measured(*asked, small=given.small)
    except EffoptError as error:
        print_error(error, error.exit_code, given.json, sys.stdout)
        return error.exit_code
    print(json.dumps({"models": document(found)}, indent=1) if given.json else text(found).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
