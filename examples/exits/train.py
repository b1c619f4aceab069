"""Train the plain-digit models on one CPU thread: `python -m examples.exits.train`."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.checkpoints import save
from examples.digits.train import correct
from examples.exits.model import SEEDS, SIDE, PlainViT, Split, checkpoint, splits


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a training run.

    Attributes:
        epochs: passes over the training digits.
        batch: digits per step.
        rate: peak learning rate of AdamW, on a one-cycle schedule.
        weight_decay: its decoupled weight decay.
        smoothing: label smoothing.
        shifted: part of the digits that are moved by a pixel, in any of eight directions.
    """

    epochs: int = 40
    batch: int = 64
    rate: float = 2e-3
    weight_decay: float = 0.05
    smoothing: float = 0.05
    shifted: float = 0.3


def _shift(pixels: Tensor, part: float, random: torch.Generator) -> Tensor:
    """Move a part of the images [B, 1, 8, 8] by a pixel down or up, right or left, or both."""
    count = len(pixels)
    moves = torch.randint(8, (count,), generator=random)
    moves = torch.where(moves < 4, moves, moves + 1)  # the middle of 3x3 is where they are
    stays = torch.rand(count, generator=random) >= part
    place = torch.where(stays, 4, moves)
    padded = F.pad(pixels[:, 0], (1, 1, 1, 1), value=-0.5)
    axis = torch.arange(SIDE)
    rows, columns = (place // 3)[:, None] + axis, (place % 3)[:, None] + axis
    picked = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked[:, None]


def views(data: Split, count: int, random: torch.Generator) -> Tensor:
    """Return digits `count` times, each time shifted as in training: float [count * n, 1, 8, 8]."""
    pixels = torch.from_numpy(data.pixels)
    return torch.cat([_shift(pixels, Recipe.shifted, random) for _ in range(count)])


def _batches(data: Split, recipe: Recipe, random: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    """Yield shifted pixels and labels, in a new order each epoch."""
    pixels, labels = torch.from_numpy(data.pixels), torch.from_numpy(data.labels)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(labels), generator=random)
        for start in range(0, len(order), recipe.batch):
            rows = order[start : start + recipe.batch]
            yield _shift(pixels[rows], recipe.shifted, random), labels[rows]


def train(seed: int, recipe: Recipe | None = None) -> PlainViT:
    """Train from scratch; the result depends on the arguments alone, and is in evaluation mode."""
    recipe, data = recipe or Recipe(), splits()[0]
    torch.manual_seed(seed)
    model, random = PlainViT(), torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * -(-len(data.labels) // recipe.batch)
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, recipe.rate, total_steps=steps)
    for pixels, labels in _batches(data, recipe, random):
        logits = model(pixels)["logits"]
        loss = F.cross_entropy(logits, labels, label_smoothing=recipe.smoothing)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        cycle.step()
    return model.eval()


def main(words: Sequence[str] | None = None) -> None:
    """Train the instance of each seed, and save it beside this file."""
    parser = argparse.ArgumentParser(prog="examples.exits.train", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="which to train")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    pool = splits()[2]
    for seed in given.seeds:
        began = time.monotonic()
        model = train(seed)
        save(model, checkpoint(seed))
        right = correct(model, pool.pixels, pool.labels)
        print(
            f"seed {seed}: {right}/{len(pool.labels)} of the pool, {right / len(pool.labels):.2%}, "
            f"in {time.monotonic() - began:.0f} s; weights in {checkpoint(seed)}",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main()
