"""A small vision transformer for plain digits of 8x8 pixels, its data, and three instances."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

from examples.checkpoints import load
from examples.digits.model import Block, DigitsConfig

SEEDS = (0, 1, 2)
"""The seeds of the three trainings."""

SIDE = 8
PATCH = 2
CONFIG = DigitsConfig(image_size=SIDE, width=48)
"""Sizes of the blocks; the stem of the canvases is not used."""

_TRAIN, _HELD = 600, 100
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """Digits: `pixels` float32 [n, 1, 8, 8] in -0.5..0.5, and their classes, `labels` int64 [n]."""

    pixels: NDArray[np.float32]
    labels: NDArray[np.int64]


class PlainViT(nn.Module):
    """Vision transformer of six pre-norm blocks over 16 patches and a class token."""

    def __init__(self, config: DigitsConfig = CONFIG) -> None:
        super().__init__()
        width, patches = config.width, (config.image_size // PATCH) ** 2
        self.patch = nn.Conv2d(1, width, kernel_size=PATCH, stride=PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Map float pixels [B, 1, 8, 8] to {"logits": float [B, 10]}."""
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(self.norm(x)[:, 0])}


@cache
def splits() -> tuple[Split, Split, Split]:
    """Split scikit-learn's 1,797 digits: 600 to train on, 100 held out, and a pool of 1,097."""
    source = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(source.target))
    pixels = (source.images[order, None] / 16 - 0.5).astype(np.float32)
    labels = source.target[order].astype(np.int64)
    bounds = (slice(_TRAIN), slice(_TRAIN, _TRAIN + _HELD), slice(_TRAIN + _HELD, None))
    train, held, pool = (Split(pixels[part], labels[part]) for part in bounds)
    return train, held, pool


def checkpoint(seed: int) -> Path:
    """Return the file of the instance of a seed."""
    return Path(__file__).with_name(f"plain-{seed}.safetensors")


def trained(seed: int = 0) -> PlainViT:
    """Load one of the committed instances, in evaluation mode.

    Raises FileNotFoundError where it has not been trained yet.
    """
    return load(PlainViT(), checkpoint(seed), "examples.exits.train")
