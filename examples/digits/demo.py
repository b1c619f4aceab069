"""The main job, once: the trained digits model as it is, exported plainly, and through effopt.

python -m examples.digits.demo [--json]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from effopt.console import Progress, print_error
from effopt.errors import EffoptError
from effopt.measure import Proportion, accuracy
from effopt.report import Latency
from examples.digits.data import Floats, canvases, evaluation_set
from examples.digits.model import CHECKPOINT, trained
from examples.variants import (
    Variant,
    caption,
    cells,
    converted,
    eager,
    plain_export,
    record,
    table,
    text_of,
    threads,
    timed,
)

INPUT = "pixels"
BATCHES = (1, 8)
_CHUNK = 50  # canvases a call while reading the test set
_EXAMPLES = 32  # validation canvases that effopt sees


@dataclass(frozen=True)
class Line:
    """One variant with its times, its accuracy, and what it lost against the original.

    `lost` is in points: 0.15 is a drop from 96.55 % to 96.40 %.
    """

    variant: Variant
    latency: tuple[Latency, ...]
    accuracy: Proportion
    lost: float


@dataclass(frozen=True)
class Demo:
    """All lines, the engine folder, and the seconds that it took."""

    lines: tuple[Line, ...]
    folder: Path
    seconds: float

    def document(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        rows = [
            {
                **record(line.variant, line.latency),
                "accuracy": asdict(line.accuracy),
                "lost_points": line.lost,
            }
            for line in self.lines
        ]
        return {
            "rows": rows,
            "threads": threads(),
            "folder": str(self.folder),
            "report": str(self.folder / "report.html"),
            "seconds": self.seconds,
        }

    def text(self, colour: bool) -> str:
        """Return the table, and what to do next."""
        rows = [[*cells(one.variant, one.latency), *_quality_cells(one)] for one in self.lines]
        count = self.lines[0].accuracy.samples
        title = f"Digits: a trained ViT of 145 tokens, {count:,} test canvases"
        made = table(title, BATCHES, ("accuracy\n%", "lost\npt"), rows)
        latency = [one for line in self.lines for one in line.latency]
        below = caption(latency, "a 95 % Wilson interval of the accuracy")
        return text_of(made, "", below, "", *_next(self.folder, self.seconds), colour=colour)


def _quality_cells(line: Line) -> list[tuple[str, str]]:
    found = line.accuracy
    interval = f"{100 * found.low:.1f}-{100 * found.high:.1f}"
    return [(f"{100 * found.value:.2f}", interval), (f"{line.lost:.2f}", "")]


def _next(folder: Path, seconds: float) -> list[str]:
    command = os.path.relpath(Path(sys.executable).with_name("effopt"))
    return [
        f"engine folder: {folder}    report: {folder / 'report.html'}    ({seconds:.0f} s in all)",
        f"next: {command} bench {folder} --against examples.digits.model:trained",
    ]


def demo(
    folder: Path,
    *,
    images: int = 2000,
    seconds: float = 10.0,
    stage: Callable[[str], None] = lambda name: None,
) -> Demo:
    """Make every variant, read the test canvases with each, and time them interleaved.

    `folder` gets effopt's engine; an engine that is there already is replaced. `images` is the
    number of test canvases, `seconds` the time for each batch size, `stage` hears what begins.
    """
    start = time.perf_counter()
    stage("load the checkpoint")
    model, _ = trained()
    with tempfile.TemporaryDirectory(prefix="effopt-demo-") as scratch:
        variants = _variants(model, folder, Path(scratch), stage)
        pixels, labels = evaluation_set(images)
        found = []
        for variant in variants:
            stage(f"read {images} canvases: {variant.name}")
            found.append(accuracy(_logits(variant, pixels), labels))
        latency = []
        for batch in BATCHES:
            stage(f"time batch {batch}")
            latency.append(timed(variants, {INPUT: pixels[:8]}, batch, seconds))
    lines = tuple(
        Line(variant, tuple(times[variant.name] for times in latency), own, _lost(found[0], own))
        for variant, own in zip(variants, found, strict=True)
    )
    return Demo(lines, folder, time.perf_counter() - start)


def _variants(
    model: nn.Module, folder: Path, scratch: Path, stage: Callable[[str], None]
) -> list[Variant]:
    """Make the four variants; the example inputs are canvases of the validation split."""
    inputs = {INPUT: torch.from_numpy(canvases("validation", _EXAMPLES, seed=0)[0])}
    stage("convert with effopt")
    ours, report = converted("effopt", model, inputs, folder, "balanced", measure=True)
    stage("convert with recipe exact")
    folded, _ = converted("folded export", model, inputs, scratch / "exact", "exact", plain=True)
    stage("export plainly")
    (scratch / "plain").mkdir()
    plain = plain_export(model, inputs, scratch / "plain", report.macs_before)
    return [eager(model, report.macs_before, CHECKPOINT.stat().st_size), plain, folded, ours]


def _logits(variant: Variant, pixels: Floats) -> Floats:
    parts = (pixels[start : start + _CHUNK] for start in range(0, len(pixels), _CHUNK))
    return np.concatenate([variant.run({INPUT: part}) for part in parts])


def _lost(original: Proportion, own: Proportion) -> float:
    """Return the accuracy lost, in points, without the rounding of a difference."""
    return round(100 * (original.value - own.value), 6)


def main(words: Sequence[str] | None = None) -> int:
    """Run the demo from the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="examples.digits.demo", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo-out"), metavar="DIR")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="test canvases")
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="timing of each batch size"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args(words)
    try:
        with redirect_stdout(sys.stderr), Progress(quiet=False) as progress:
            made = demo(
                given.output, images=given.images, seconds=given.seconds, stage=progress.stage
            )
    except EffoptError as error:
        print_error(error, error.exit_code, given.json, sys.stdout)
        return error.exit_code
    print(json.dumps(made.document(), indent=1) if given.json else made.text(sys.stdout.isatty()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
