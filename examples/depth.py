"""How the time of analysis and rewriting grows with the depth of a model.

python -m examples.depth [--layers 6,12,24,48] [--repeats N] [--json]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import nn

from effopt.capture import capture
from effopt.console import Progress
from effopt.pipeline import Pipeline
from effopt.recipe import steps_of
from examples.variants import text_of

LAYERS = (6, 12, 24, 48)
RECIPE = "merge-tokens{r=1}"
"""Tokens merge in every block: the most that a rewrite has to do."""


@dataclass(frozen=True)
class Depth:
    """CPU seconds for one depth, the least of all repeats: of torch.export, and of all effopt."""

    layers: int
    nodes: int
    export: float
    total: float

    @property
    def beyond(self) -> float:
        """What effopt takes beyond torch.export: capture, normal form, analysis, rewriting."""
        return self.total - self.export


def _model(layers: int) -> tuple[nn.Module, torch.Tensor]:
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=128,
        patch_size=16,
    )
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model.eval(), torch.randn(2, 3, 128, 128)


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    made = work()
    return time.process_time() - start, made


def measured(
    layers: Sequence[int], repeats: int, stage: Callable[[str], None] = lambda name: None
) -> list[Depth]:
    """Time each depth `repeats` times, the depths in turn, after a run that warms torch up."""
    export, total, nodes = dict[int, list[float]](), dict[int, list[float]](), dict[int, int]()
    _timed(2)
    for _ in range(repeats):
        for depth in layers:
            stage(f"{depth} layers")
            alone, own, count = _timed(depth)
            export.setdefault(depth, []).append(alone)
            total.setdefault(depth, []).append(own)
            nodes[depth] = count
    return [Depth(n, nodes[n], min(export[n]), min(total[n])) for n in layers]


def _timed(depth: int) -> tuple[float, float, int]:
    """Return the seconds of torch.export alone and of all of effopt, and the nodes captured."""
    model, images = _model(depth)
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1)}}

    def plain() -> Any:
        given = {"pixel_values": images}
        return torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)

    def whole() -> int:
        program = capture(model, {"pixel_values": images})
        Pipeline(steps_of(RECIPE)).run(program)
        return sum(node.op == "call_function" for node in program.nodes())

    alone, _ = _seconds(plain)
    own, count = _seconds(whole)
    return alone, own, count


def text(found: Sequence[Depth]) -> str:
    """Write the curve as a table."""
    made = Table("layers", "operators", "torch.export", "effopt beyond it", "ms an operator")
    for column in made.columns:
        column.justify = "right"
    for row in found:
        per = 1000 * row.beyond / row.nodes
        made.add_row(
            str(row.layers),
            str(row.nodes),
            f"{row.export:.2f} s",
            f"{row.beyond:.2f} s",
            f"{per:.2f}",
        )
    title = f"Analysis and rewriting by depth: ViT, {RECIPE} in every block"
    return text_of(title, made, "", "CPU seconds: the least of all repeats.", "", colour=False)


def document(found: Sequence[Depth]) -> list[dict[str, Any]]:
    """Return the curve as JSON types."""
    return [{**asdict(row), "beyond": row.beyond} for row in found]


def main(words: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="examples.depth", description=__doc__)
    listed = ",".join(map(str, LAYERS))
    parser.add_argument("--layers", default=listed, help=f"depths to time (default {listed})")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each depth (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args(words)
    layers = tuple(int(word) for word in given.layers.split(","))
    with redirect_stdout(sys.stderr), Progress(quiet=False) as progress:
        found = measured(layers, given.repeats, progress.stage)
    print(json.dumps(document(found), indent=1) if given.json else text(found).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
