"""Observers: from what was collected of activations to the range [lo, hi] that codes cover.

Every range holds 0, and lies within the one of `minmax`. References: Jacob et al. 2018 (arXiv
1712.05877) for affine codes; Migacz, "8-bit inference with TensorRT" (GTC 2017) for the entropy.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from effopt.collectors import BINS, Extremes, Histogram, Smoothed
from effopt.errors import UsageError

Range = tuple[float, float]
Floats = npt.NDArray[np.float64]

RATIOS = tuple(round(1 - 0.02 * step, 2) for step in range(46))
"""Shares of the full range that `mse` tries: 1, 0.98 to 0.1."""
LEVELS = 128
"""Codes for |x| in 8 bits with a sign: `entropy` is about |x|, so these are not 255."""
STEP = 16
TINY = 1e-9
LEAST = 1e-8
"""The least amplitude that symmetric codes are made for."""


@dataclass(frozen=True)
class Observer:
    """What to collect, and how a range follows from it.

    `start` makes the collector, whose type is the observer's own, which `range` takes.
    """

    start: Callable[[], Any]
    range: Callable[[Any], Range]


def minmax(state: Extremes) -> Range:
    """Return the extremes, with 0 among them."""
    if not state.count:
        raise _nothing()
    return min(0.0, state.lo), max(0.0, state.hi)


def moving_average(state: Smoothed) -> Range:
    """Return the moving average of the batches' extremes, with 0 among them."""
    if not state.batches:
        raise _nothing()
    return min(0.0, state.lo), max(0.0, state.hi)


def percentile(state: Histogram, p: float = 99.99) -> Range:
    """Return the quantiles 1 - p/100 and p/100, with 0 among them.

    Each is the outer edge of the bin that it falls into, within the extremes: up to one bin wider
    than the quantile of the values, never narrower. `p` is above 50, up to 100; else UsageError.
    """
    if not 50 < p <= 100:
        raise UsageError(f"percentile {p} is not above 50 and up to 100", "99.99 is common")
    lowest, highest = minmax(state.extremes)
    bins = list(state.signed())
    below = np.cumsum([count for _, _, count in bins])
    total = int(below[-1])
    # Ranks count from 1; the guard keeps p = 99 of 100 values the 99th, in spite of rounding.
    upper = max(1, math.ceil(total * (p / 100) - 1e-9 * total))
    high = bins[int(np.searchsorted(below, upper))][1]
    low = bins[int(np.searchsorted(below, total + 1 - upper))][0]
    return min(0.0, max(low, lowest)), max(0.0, min(high, highest))


def mse(state: Histogram, bits: int = 8, symmetric: bool = False) -> Range:
    """Return the share of the full range whose codes have the least squared error over the bins.

    The centres of the bins stand for the values in them. The widest range wins a tie.
    """
    lo, hi = minmax(state.extremes)
    bins = list(state.signed())
    centres = np.array([(low + high) / 2 for low, high, _ in bins])
    counts = np.array([count for _, _, count in bins], np.float64)

    def error(ratio: float) -> float:
        restored = round_trip(centres, ratio * lo, ratio * hi, bits, symmetric)
        off = (restored - centres) / state.width  # whose square is within float64
        return float(counts @ off**2)

    best = min(RATIOS, key=error)
    return best * lo, best * hi


def entropy(state: Histogram, levels: int = LEVELS, step: int = STEP) -> Range:
    """Return [-T, T] within the extremes, for the T whose codes lose least (Kullback-Leibler).

    T is an edge of the bins of |x|: `levels`, `levels + step`, ... bins. The clipped
    distribution P counts what is beyond T in its last bin; Q, what `levels` codes can tell of the
    bins below T, does not. Q spreads each of `levels` runs of bins, whose lengths differ by one
    at most, evenly over the run's bins that hold values. The least T wins a tie.

    It was made for networks of convolutions. Transformers have rare large values that matter and
    that it clips: never a default.
    """
    lo, hi = minmax(state.extremes)
    if lo == hi:
        return lo, hi
    held = state.counts.sum(0).numpy().astype(np.float64)
    sizes = range(levels, BINS + 1, step)
    best = min(sizes, key=lambda size: _divergence(held, size, levels))
    edge = best * state.width
    return max(lo, -edge), min(hi, edge)


def _divergence(held: Floats, size: int, levels: int) -> float:
    """Return KL(P | Q) for the first `size` bins, infinite where they hold nothing."""
    inside = held[:size]
    total = inside.sum()
    if not total:
        return math.inf
    p = inside.copy()
    p[-1] += held[size:].sum()
    starts = np.arange(levels) * size // levels
    lengths = np.diff([*starts, size])
    filled = np.add.reduceat((inside > 0).astype(np.float64), starts)
    sums = np.add.reduceat(inside, starts)
    means = np.divide(sums, filled, out=np.zeros(levels), where=filled > 0)
    q = np.where(inside > 0, np.repeat(means, lengths), 0.0) / total
    p /= p.sum()
    seen = p > 0
    return float(np.sum(p[seen] * np.log(p[seen] / np.where(q > 0, q, TINY)[seen])))


def affine(lo: float, hi: float, bits: int = 8, symmetric: bool = False) -> tuple[float, int]:
    """Return (step, origin) of the codes of a range: real = step * (code - origin).

    Asymmetric codes are 0 to 2^bits - 1, and the range is made to hold 0; symmetric ones are
    -2^(bits-1) to 2^(bits-1) - 1, with origin 0. The range (0, 0) has step 1 and origin 0, as
    ONNX Runtime's DynamicQuantizeLinear. Raises UsageError for a range that is none.
    """
    if not (math.isfinite(hi - lo) and lo <= hi):
        raise UsageError(f"[{lo}, {hi}] is no range", "observe finite values")
    if not 2 <= bits <= 16:
        raise UsageError(f"{bits} bits are not from 2 to 16", "8 and 4 are common")
    lo, hi = min(0.0, lo), max(0.0, hi)
    if lo == hi:
        return 1.0, 0
    if symmetric:
        return max(-lo, hi, LEAST) / (2 ** (bits - 1) - 1), 0
    top = 2**bits - 1
    step = (hi - lo) / top
    if not step:  # the range is narrower than float64 can part
        return 1.0, 0
    return step, int(min(max(np.rint(-lo / step), 0), top))


def round_trip(
    values: Floats, lo: float, hi: float, bits: int = 8, symmetric: bool = False
) -> Floats:
    """Return values [..] float64 as their codes for a range would be read back."""
    step, origin = affine(lo, hi, bits, symmetric)
    half = 2 ** (bits - 1)
    least, most = (-half, half - 1) if symmetric else (0, 2 * half - 1)
    codes = np.clip(np.rint(values / step) + origin, least, most)
    restored: Floats = (codes - origin) * step
    return restored


def _nothing() -> UsageError:
    return UsageError("no values were observed", "give calibration samples with real tokens")


OBSERVERS: Mapping[str, Observer] = MappingProxyType(
    {
        "minmax": Observer(Extremes, minmax),
        "moving-average": Observer(Smoothed, moving_average),
        "percentile": Observer(Histogram, percentile),
        "mse": Observer(Histogram, mse),
        "entropy": Observer(Histogram, entropy),
    }
)
"""Observers by the names that specs use."""
