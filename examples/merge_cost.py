"""What one merge site costs on the CPU, as a share of the transformer block that it stands in.

python -m examples.merge_cost [--rounds N] [--seconds S] prints one JSON document: for each width
and batch the times of the block, of the site in portable form and of the site as a node with its
function, in onnxruntime on one thread, taken in turns.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from effopt.backends import onnx
from effopt.capture import capture
from effopt.kernel import kernel
from effopt.measure import Timing, compare
from effopt.target import target

TOKENS, LEAVE, HEAD = 197, 8, 64
CASES = ((768, 1), (768, 8), (384, 1), (384, 8))
"""Channels and batch; heads are of 64 channels."""

FORMS = {"portable": "onnx", "function": "a100"}
"""The target whose file has the form."""


class Block(nn.Module):
    """A block of a ViT: attention and an MLP of four times the width, norms first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.parts = nn.ModuleList(nn.Linear(channels, channels) for _ in range(4))
        self.wide = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, C] to its like."""
        normed = self.norms[0](x)
        query, key, value = (
            part(normed).unflatten(2, (-1, HEAD)).transpose(1, 2) for part in self.parts[:3]
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.parts[3](mixed.transpose(1, 2).flatten(2))
        wide = nn.functional.gelu(self.wide(self.norms[1](x)))
        return torch.add(x, self.narrow(wide))


class Site(nn.Module):
    """What merging adds to a block: the mean of keys, the match, the merge."""

    def forward(self, key: Tensor, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Merge x [B, N, C] by key [B, H, N, D]; returns it and its size."""
        match = kernel("match_tokens").op
        pairs = match(key.mean(1), size, LEAVE, TOKENS - LEAVE, 1, 0, False)
        y, summed = kernel("merge_tokens").op(x, size, *pairs)
        return y, summed


def measured(channels: int, batch: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Time one width and batch; times in milliseconds, shares of the block's."""
    draw = np.random.default_rng(0)
    shapes = {"x": (batch, TOKENS, channels), "key": (batch, channels // HEAD, TOKENS, HEAD)}
    feeds = {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    feeds["size"] = np.ones((batch, TOKENS), np.float32)
    torch.manual_seed(0)
    models: dict[str, tuple[str, nn.Module, tuple[str, ...]]]
    models = {"block": ("onnx", Block(channels), ("x",))}
    models |= {form: (name, Site(), ("key", "x", "size")) for form, name in FORMS.items()}
    with tempfile.TemporaryDirectory(prefix="effopt-merge-") as scratch:
        runs = {
            name: _run(model, {key: feeds[key] for key in names}, where, Path(scratch) / name)
            for name, (where, model, names) in models.items()
        }
        times = compare(runs, rounds=rounds, budget=seconds)
    forms = {form: _figures(times[form], times["block"]) for form in FORMS}
    block = {"median_ms": times["block"].median_ms, "min_ms": times["block"].min_ms}
    return {"channels": channels, "batch": batch, "block": block, **forms}


def _run(model: nn.Module, feeds: Mapping[str, Any], where: str, folder: Path) -> Any:
    """Write the file of a model for a target, and open it with one thread."""
    folder.mkdir()
    given = {name: torch.from_numpy(array[:1].repeat(2, 0)) for name, array in feeds.items()}
    onnx.write(capture(model.eval(), given), folder, target=target(where))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / onnx.MODEL, options)
    return partial(session.run, None, dict(feeds))


def _figures(own: Timing, block: Timing) -> dict[str, float]:
    assert own.speedup is not None
    assert own.min_ms is not None
    assert block.min_ms is not None
    return {
        "median_ms": own.median_ms,
        "min_ms": own.min_ms,
        "share_of_medians": 1 / own.speedup,
        "share_of_minima": own.min_ms / block.min_ms,
    }


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.merge_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each variant")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each row")
    options = parser.parse_args()
    rows = [measured(*case, options.rounds, options.seconds) for case in CASES]
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    _main()
