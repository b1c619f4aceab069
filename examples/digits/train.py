"""Train the digit model on CPU: `python -m examples.digits.train`.

Two things make a small transformer learn quickly here. Every patch token also has to say which
digit it belongs to, if any (the head for that is not saved). And early steps see few patches
besides those of the digit, which is both cheaper and easier; the last ones see whole canvases.
"""

import copy
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.checkpoints import save, training_parser
from examples.digits.data import Floats, Ints, Scenes, canvases, evaluation_set, scenes
from examples.digits.model import CHECKPOINT, DigitsViT


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a training run.

    Attributes:
        steps: optimiser steps.
        batch: canvases per step.
        matrix_rate: peak learning rate of Muon, for the matrices of the blocks.
        rate: peak learning rate of AdamW, for everything else.
        weight_decay: decoupled weight decay of both.
        warmup: fraction of the steps in which the learning rate rises; it then falls as a cosine.
        patch_weight: weight of the per-patch loss.
        ema: decay per step of the averaged weights, which are the ones saved.
        stages: (fraction of the steps this stage ends at, patches kept per canvas in it).
        reports: progress lines in a run.
    """

    steps: int = 3600
    batch: int = 64
    matrix_rate: float = 0.02
    rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.08
    patch_weight: float = 1.0
    ema: float = 0.995
    stages: tuple[tuple[float, int], ...] = ((0.45, 40), (0.8, 72), (1.0, 144))
    reports: int = 20

    def rate_factor(self, step: int) -> float:
        """Fraction of the peak learning rates to use at a step."""
        done = step / self.steps
        rise = min(1.0, (done + 1 / self.steps) / self.warmup)
        return rise * (0.5 + 0.5 * math.cos(math.pi * done))

    def kept(self, step: int) -> int:
        """Patches kept per canvas at a step."""
        return next(kept for end, kept in self.stages if step < end * self.steps)


class Learner(nn.Module):
    """The model together with the patch head that only training needs."""

    def __init__(self, patch_weight: float) -> None:
        super().__init__()
        self.model = DigitsViT()
        self.patch_head = nn.Linear(self.model.config.width, self.model.config.classes + 1)
        self.patch_weight = patch_weight

    def forward(self, batch: Scenes, kept: int) -> Tensor:
        """Loss, a float scalar, on n canvases of which `kept` patches each are shown."""
        labels = torch.from_numpy(batch.labels)
        blank = self.model.config.classes
        cover = F.avg_pool2d(torch.from_numpy(batch.ink), 4).flatten(1)
        targets = torch.where(cover > 0.1, labels[:, None], blank)
        tokens = self.model.embed(torch.from_numpy(batch.images))
        # The digit's patches (about 25) always rank first, then others by chance.
        chosen = ((cover > 0.02) + torch.rand_like(cover)).topk(kept, dim=1).indices
        patches = tokens[:, 1:].gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
        encoded = self.model.encode(torch.cat((tokens[:, :1], patches), dim=1))
        patch_logits = self.patch_head(encoded[:, 1:]).flatten(0, 1)
        patch_loss = F.cross_entropy(patch_logits, targets.gather(1, chosen).flatten())
        loss = F.cross_entropy(self.model.head(encoded[:, 0]), labels)
        return loss + self.patch_weight * patch_loss


def _optimisers(learner: Learner, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all other parameters."""
    matrices = [p for p in learner.model.blocks.parameters() if p.ndim == 2]
    taken = set(map(id, matrices))
    others = [p for p in learner.parameters() if id(p) not in taken]
    decay = recipe.weight_decay
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=decay),
        torch.optim.AdamW(others, lr=recipe.rate, weight_decay=decay),
    ]


@torch.inference_mode()
def correct(model: nn.Module, images: Floats, labels: Ints, batch: int = 250) -> int:
    """Count the canvases a model reads correctly.

    Args:
        model: maps float32 pixels [B, 1, 48, 48] to {"logits": [B, 10]}.
        images: float32 [n, 1, 48, 48].
        labels: int64 [n].
        batch: canvases per call of the model.
    """
    model.eval()
    starts = range(0, len(images), batch)
    logits = [model(torch.from_numpy(images[at : at + batch]))["logits"] for at in starts]
    return int((torch.cat(logits).argmax(1) == torch.from_numpy(labels)).sum())


def wilson(successes: int, total: int) -> tuple[float, float]:
    """Bounds of the 95 % Wilson score interval of a proportion."""
    z = 1.959964
    share = successes / total
    centre = share + z * z / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (centre - reach) / scale, (centre + reach) / scale


def _losses(learner: Learner, recipe: Recipe, seed: int) -> Iterator[float]:
    """Take the optimiser steps, yielding the loss of each."""
    random = np.random.default_rng(seed)
    optimisers = _optimisers(learner, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimiser, recipe.rate_factor) for optimiser in optimisers
    ]
    for step in range(recipe.steps):
        loss = learner(scenes("train", recipe.batch, random), recipe.kept(step))
        learner.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            schedule.step()
        yield loss.item()


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the exponential moving average of a model's weights by one step."""
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)


def train(recipe: Recipe, seed: int) -> DigitsViT:
    """Train from scratch, reporting on standard error; the result depends on the arguments alone.

    Returns:
        The model, in evaluation mode, with the averaged weights.
    """
    torch.manual_seed(seed)
    learner = Learner(recipe.patch_weight)
    average = copy.deepcopy(learner.model)
    images, labels = canvases("validation", 1000, seed)
    started, recent, period = time.monotonic(), 0.0, max(1, recipe.steps // recipe.reports)
    for step, loss in enumerate(_losses(learner, recipe, seed), start=1):
        _follow(average, learner.model, recipe.ema)
        recent += loss / period
        if step % period == 0:
            accuracy = correct(average, images, labels) / len(labels)
            print(
                f"step {step}/{recipe.steps}  loss {recent:.3f}  validation {accuracy:.1%}"
                f"  {time.monotonic() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            recent = 0.0
    return average.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save the checkpoint and print the accuracy on the test set."""
    parser = training_parser(
        "Train the digit model on two CPU threads and save its weights.", CHECKPOINT, Recipe.steps
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)
    model = train(Recipe(steps=options.steps), options.seed)
    save(model, options.output)
    images, labels = evaluation_set()
    right, total = correct(model, images, labels), len(labels)
    low, high = wilson(right, total)
    print(
        f"test accuracy {right / total:.2%} ({right}/{total}), "
        f"95 % Wilson interval {low:.2%} to {high:.2%}; weights in {options.output}"
    )


if __name__ == "__main__":
    main()
