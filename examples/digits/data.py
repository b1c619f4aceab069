"""Cluttered canvases: one whole handwritten digit among strokes, scraps of digits and noise.

The handwriting is scikit-learn's bundled `load_digits` (1,797 images of 8x8 pixels). Its images
are split once, by digit image, so that no handwriting seen in training occurs in a test canvas.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Split = Literal["train", "validation", "test"]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

CANVAS = 48
"""Side of a canvas in pixels."""

_SOURCE = 8  # side of a source image in pixels
_STAMP = 26  # side of the window a digit is drawn in: a 20 px digit, tilted, fits
_BOUNDS: dict[Split, slice] = {
    "train": slice(0, 1197),
    "validation": slice(1197, 1397),
    "test": slice(1397, 1797),
}
_SPLIT_SEED = 1797
_TEST_SEED = 48


@dataclass(frozen=True)
class Clutter:
    """How much besides the digit a canvas shows.

    Attributes:
        scraps: rotated pieces of other digits per canvas, each about a quarter of a digit.
        strokes: straight line segments per canvas.
        noise: standard deviation of the Gaussian noise on a pixel; a digit's ink is 0.8 to 1.
    """

    scraps: int = 5
    strokes: int = 3
    noise: float = 0.06


@dataclass(frozen=True)
class Scenes:
    """A batch of n canvases with their annotation.

    Attributes:
        images: float32 [n, 1, 48, 48] in 0..1, 0 is blank paper and 1 full ink.
        labels: int64 [n], the class of the whole digit.
        ink: float32 [n, 48, 48] in 0..1, the whole digit alone.
    """

    images: Floats
    labels: Ints
    ink: Floats


@cache
def _handwriting(split: Split) -> tuple[Floats, Ints]:
    """Source digits of a split: float32 [m, 8, 8] in 0..1 and their int64 classes [m]."""
    source = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(source.target))[_BOUNDS[split]]
    images = (source.images[order] / 16).astype(np.float32)
    return images, source.target[order].astype(np.int64)


def _draw(digits: Floats, side: Floats, angle: Floats, slant: Floats) -> Floats:
    """Draw digits enlarged, rotated and slanted, by bilinear interpolation.

    Args:
        digits: float32 [n, 8, 8].
        side: float32 [n], drawn side in pixels.
        angle: float32 [n], rotation in radians.
        slant: float32 [n], horizontal shift per unit of height.

    Returns:
        float32 [n, 26, 26] with each digit in the middle of its window.
    """
    count = len(digits)
    axis = np.arange(_STAMP, dtype=np.float32) - (_STAMP - 1) / 2
    down, right = axis[None, :, None], axis[None, None, :]
    scale = (_SOURCE / side)[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    row = (cos * down - sin * right) * scale
    column = (sin * down + cos * right) * scale + slant[:, None, None] * row
    row = np.clip(row + (_SOURCE + 1) / 2, 0, _SOURCE + 0.999)
    column = np.clip(column + (_SOURCE + 1) / 2, 0, _SOURCE + 0.999)
    padded = np.pad(digits, ((0, 0), (1, 1), (1, 1)))
    top, left = row.astype(np.int64), column.astype(np.int64)
    row, column = row - top, column - left
    flat = padded.reshape(count, -1)
    at = (top * (_SOURCE + 2) + left).reshape(count, -1)

    def corner(offset: int) -> Floats:
        return np.take_along_axis(flat, at + offset, axis=1).reshape(row.shape)

    upper = corner(0) * (1 - column) + corner(1) * column
    lower = corner(_SOURCE + 2) * (1 - column) + corner(_SOURCE + 3) * column
    drawn: Floats = upper * (1 - row) + lower * row
    return drawn


def _paste(canvases: Floats, stamps: Floats, row: Ints, column: Ints) -> None:
    """Ink stamps onto canvases in place, the darker of the two winning.

    Args:
        canvases: float32 [n, 74, 74], canvases with a margin of half a stamp on every side.
        stamps: float32 [n, 26, 26].
        row: int64 [n], row of each stamp's middle on the canvas without its margin.
        column: int64 [n], likewise its column.
    """
    axis = np.arange(_STAMP)
    index = (
        np.arange(len(canvases))[:, None, None],
        row[:, None, None] + axis[None, :, None],
        column[:, None, None] + axis[None, None, :],
    )
    canvases[index] = np.maximum(canvases[index], stamps)


def _uniform(random: np.random.Generator, low: float, high: float, count: int) -> Floats:
    """Uniform float32 [count] between two bounds."""
    return random.uniform(low, high, count).astype(np.float32)


def _scrap(random: np.random.Generator, digits: Floats, count: int) -> Floats:
    """Cut quarters out of random digits and turn them any way: float32 [count, 26, 26]."""
    half = _SOURCE // 2
    chosen = random.integers(len(digits), size=count)
    offset = random.integers(half, size=(2, count, 1), endpoint=True)
    row, column = offset + np.arange(half)
    pieces = digits[chosen[:, None, None], row[:, :, None], column[:, None, :]]
    pieces = np.pad(pieces, ((0, 0), (half // 2, half // 2), (half // 2, half // 2)))
    side, angle = _uniform(random, 16, 20, count), _uniform(random, -np.pi, np.pi, count)
    faded = _uniform(random, 0.4, 0.8, count)[:, None, None]
    return _draw(pieces, side, angle, np.zeros_like(side)) * faded


def _beside(random: np.random.Generator, row: Ints, column: Ints) -> tuple[Ints, Ints]:
    """Random places, int64 [n] each, at least 13 px beside or above or below the given ones."""
    far = random.integers(13, CANVAS - 13, size=len(row), endpoint=True)
    free = random.integers(CANVAS, size=len(row))
    upright = random.random(len(row)) < 0.5
    down, right = np.where(upright, far, free), np.where(upright, free, far)
    return (row + down) % CANVAS, (column + right) % CANVAS


def _stroke(random: np.random.Generator, count: int) -> Floats:
    """Draw one straight stroke of 6 to 14 px per canvas: float32 [count, 48, 48]."""
    axis = np.arange(CANVAS, dtype=np.float32)
    middle = random.uniform(0, CANVAS, (2, count, 1, 1)).astype(np.float32)
    angle = _uniform(random, 0, np.pi, count)[:, None, None]
    reach = _uniform(random, 3, 7, count)[:, None, None]
    down, right = axis[None, :, None] - middle[0], axis[None, None, :] - middle[1]
    along = np.abs(np.cos(angle) * down + np.sin(angle) * right)
    across = np.sin(angle) * down - np.cos(angle) * right
    distance = np.hypot(np.maximum(along - reach, 0), across)
    faded = _uniform(random, 0.3, 0.8, count)[:, None, None]
    stroke: Floats = np.clip(1.5 - distance, 0, 1) * faded
    return stroke


def scenes(
    split: Split, count: int, random: np.random.Generator, clutter: Clutter = Clutter()
) -> Scenes:
    """Compose annotated canvases, each with one digit of 16 to 20 px at a random place.

    Digits of the train split are also tilted and slanted a little, to augment them.

    Args:
        split: which digits to draw from.
        count: number of canvases.
        random: source of all randomness, advanced by the call.
        clutter: what else to put on the canvases.
    """
    digits, classes = _handwriting(split)
    margin, inside = _STAMP // 2, slice(_STAMP // 2, _STAMP // 2 + CANVAS)
    chosen = random.integers(len(digits), size=count)
    side = _uniform(random, 16, 20, count)
    distortion = _uniform(random, -1, 1, 2 * count) * np.float32(split == "train")
    drawn = _draw(digits[chosen], side, 0.2 * distortion[:count], 0.25 * distortion[count:])
    drawn *= _uniform(random, 0.8, 1, count)[:, None, None]
    ink = np.zeros((count, CANVAS + 2 * margin, CANVAS + 2 * margin), np.float32)
    row, column = random.integers(10, CANVAS - 10, size=(2, count), endpoint=True)
    _paste(ink, drawn, row, column)
    images = ink.copy()
    for _ in range(clutter.scraps):
        _paste(images, _scrap(random, digits, count), *_beside(random, row, column))
    images, ink = images[:, inside, inside], ink[:, inside, inside]
    for _ in range(clutter.strokes):
        images = np.maximum(images, _stroke(random, count))
    noise = random.standard_normal(images.shape, dtype=np.float32) * np.float32(clutter.noise)
    return Scenes(np.clip(images + noise, 0, 1)[:, None], classes[chosen], ink)


def canvases(split: Split, count: int, seed: int) -> tuple[Floats, Ints]:
    """Compose canvases that depend on the arguments alone.

    Returns:
        Images, float32 [count, 1, 48, 48] in 0..1, and their digit classes, int64 [count].
    """
    batch = scenes(split, count, np.random.default_rng(seed))
    return batch.images, batch.labels


def evaluation_set(count: int = 2000) -> tuple[Floats, Ints]:
    """Compose the fixed test canvases, whose digits occur in no training canvas.

    Returns:
        Images, float32 [count, 1, 48, 48] in 0..1, and their digit classes, int64 [count].
    """
    return canvases("test", count, _TEST_SEED)
