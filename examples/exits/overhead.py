"""What exits cost where no row takes one: a ViT-S with exits against the same without.

python -m examples.exits.overhead [--threads 1,2] [--seconds S] [--small] [--json]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from rich import box
from rich.table import Table
from torch import nn

import effopt
from effopt.backend import Array, backend
from effopt.console import Progress
from effopt.cuts import find_cuts
from effopt.edit import Edit
from effopt.exits import insert_exits
from effopt.kernel import kernel
from effopt.measure import compare
from effopt.plain import time_text
from effopt.program import Program
from effopt.report import Latency
from effopt.target import target
from examples.variants import text_of

BATCHES = (1, 4)
SECONDS = 40.0
FORMS = ("if", "compact")
FULL, CONTROL = "without exits", "without exits, again"

THRESHOLDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "none leaves": (np.inf, np.inf),
        "all leave at 1": (-np.inf, -np.inf),
        "all leave at 2": (np.inf, -np.inf),
    }
)

Session = Any
"""onnxruntime.InferenceSession, which has no types."""


def model(small: bool) -> tuple[nn.Module, tuple[int, int, int]]:
    """Make a ViT-S/16 with random weights, and the sizes of an image."""
    side = 64 if small else 224
    sizes: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6}
    if small:
        sizes = {"hidden_size": 64, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 4 * sizes["hidden_size"], "image_size": side}
    config = transformers.ViTConfig(**{**sizes, "num_labels": 1000})
    made: nn.Module = transformers.ViTForImageClassification(config)
    return made.eval(), (3, side, side)


def with_exits(program: Program, form: str) -> Program:
    """Return a fork with exits behind the fourth and the eighth block, heads of random weights."""
    fork = program.fork()
    cuts, edit = fork.get(find_cuts), Edit(fork, "exits")
    name = fork.signature.outputs[0].name
    answers, scores = [], []
    for cut in (cuts[3], cuts[7]):
        width = cut.node.meta["val"].shape[-1]
        weight = edit.constant("exit_weight", torch.randn(1000, width) / width**0.5)
        with edit.after(cut.node):
            first = edit.call(torch.ops.aten.select.int, cut.node, 1, 0)
            answers.append(edit.call(torch.ops.aten.linear.default, first, weight))
            scores.append(edit.call(kernel("exit_score").op, answers[-1:], "margin"))
    insert_exits(edit, scores, {name: answers}, form)
    edit.close()
    fork.compile()
    return fork


def opened(program: Program, folder: Path, threads: int) -> Session:
    """Build the engine of a program, and open it; its threads do not spin while they wait."""
    folder.mkdir()
    backend("ort").build(program, target("cpu"), folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(folder / "model.onnx", options)


def measured(
    threads: Sequence[int], seconds: float, progress: Progress, *, small: bool = False
) -> list[Latency]:
    """Time all variants, interleaved, at each number of threads and each batch size."""
    torch.manual_seed(0)
    made, sizes = model(small)
    progress.stage("convert")
    inputs = torch.randn(2, *sizes)
    program = effopt.optimize(made, inputs, recipe="exact").program
    found = list[Latency]()
    with tempfile.TemporaryDirectory(prefix="effopt-overhead-") as scratch:
        for count in threads:
            progress.stage(f"build for {count} threads")
            home = Path(scratch) / str(count)
            home.mkdir()
            plain = {
                name: opened(program, home / str(len(name)), count) for name in (FULL, CONTROL)
            }
            exits = {form: opened(with_exits(program, form), home / form, count) for form in FORMS}
            for batch in BATCHES:
                progress.stage(f"time batch {batch}")
                x = np.random.default_rng(0).standard_normal((batch, *sizes), dtype=np.float32)
                calls = _calls(plain, exits, x)
                timings = compare(calls, baseline=FULL, budget=seconds)
                found += [Latency.of(n, batch, count, timing) for n, timing in timings.items()]
    return found


def _calls(
    plain: Mapping[str, Session], exits: Mapping[str, Session], x: Array
) -> dict[str, partial[Any]]:
    feeds = {"pixel_values": x}
    calls = {name: partial(session.run, None, feeds) for name, session in plain.items()}
    for form, session in exits.items():
        for name, tau in THRESHOLDS.items():
            given = {**feeds, "tau": np.array(tau, np.float32)}
            calls[f"{form}: {name}"] = partial(session.run, None, given)
    return calls


def text(rows: Sequence[Latency]) -> str:
    """Write the table: times, and their ratio to that of the engine without exits."""
    made = Table(title="ViT-S/16, exits behind 4 and 8 of 12 blocks", title_justify="left")
    made.box, made.show_edge, made.pad_edge = box.SIMPLE_HEAD, False, False
    made.add_column("engine", no_wrap=True)
    for head in ("threads", "batch", "ms", "time over that without exits"):
        made.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(
            row.variant, str(row.threads), str(row.batch), time_text(row.median_ms), _ratio(row)
        )
    caption = "Medians of interleaved rounds, with the 95 % interval of the ratio within a round."
    return text_of(made, "", caption, "", colour=False)


def _ratio(row: Latency) -> str:
    if row.speedup is None or row.speedup_low is None or row.speedup_high is None:
        return "1"
    return f"{1 / row.speedup:.3f} ({1 / row.speedup_high:.3f}-{1 / row.speedup_low:.3f})"


def main(words: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="examples.exits.overhead", description=__doc__)
    parser.add_argument("--threads", default="1,2", help="numbers to run with (default 1,2)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each batch size")
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args(words)
    threads = [int(word) for word in given.threads.split(",")]
    with redirect_stdout(sys.stderr), Progress(quiet=False) as progress:
        rows = measured(threads, given.seconds, progress, small=given.small)
    print(
        json.dumps([asdict(row) for row in rows], indent=1) if given.json else text(rows).rstrip()
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
