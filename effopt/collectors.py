"""Collectors: what is kept of the values that stream by, in memory that does not grow with them.

Every collector takes values in float32 or float64 (half precision is widened) and raises
UsageError for NaN and infinity. `merge` gives what one collector would hold that had seen the
values of the first and then those of the second.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from effopt.errors import UsageError

ROWS = 512
"""Rows that `Rows` keeps at most."""
BINS = 2048
"""Bins of a histogram, for each sign."""
_CHUNK = 1 << 20
_DEEPEST = -1000
"""Exponent of the narrowest range of a histogram, so that its bins are no denormal numbers."""


class Collector(Protocol):
    """Takes the values of one node, batch by batch."""

    def update(self, rows: Tensor) -> None:
        """Take rows [T, K]; T may be 0."""
        ...


def _finite(values: Tensor) -> Tensor:
    wide = values if values.dtype == torch.float64 else values.float()
    if wide.numel():
        low, high = wide.aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise UsageError("the values hold NaN or infinity", "leave such samples out")
    return wide


def _table(rows: Tensor) -> Tensor:
    """Return finite rows as [T, K]."""
    return _finite(rows).reshape(-1, rows.shape[-1])


def _parts(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Cut rows into parts, so that what is computed of them stays small."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


# --- for each channel


@dataclass
class MeanAbs:
    """The mean of |x| of each channel: `total` [K] float64 over `rows` rows."""

    total: Tensor | None = None
    rows: int = 0

    def update(self, rows: Tensor) -> None:
        """Take rows [T, K]."""
        table = _table(rows)
        found = table.abs().sum(0, dtype=torch.float64)
        self.total = found if self.total is None else self.total + found
        self.rows += len(table)

    @property
    def mean(self) -> Tensor:
        """The mean [K] float64; UsageError where nothing was seen."""
        return _known(self.total, self.rows) / self.rows


@dataclass
class ChannelExtremes:
    """The least and the greatest x of each channel: `lo` and `hi` [K] in the type of the values."""

    lo: Tensor | None = None
    hi: Tensor | None = None
    rows: int = 0

    def update(self, rows: Tensor) -> None:
        """Take rows [T, K]."""
        table = _table(rows)
        if not len(table):
            return
        low, high = table.aminmax(dim=0)
        self.lo = low if self.lo is None else torch.minimum(self.lo, low)
        self.hi = high if self.hi is None else torch.maximum(self.hi, high)
        self.rows += len(table)

    @property
    def max_abs(self) -> Tensor:
        """The largest |x| [K]; UsageError where nothing was seen."""
        return torch.maximum(-_known(self.lo, self.rows), _known(self.hi, self.rows))


@dataclass
class Gram:
    """The sum of x^T x: `total` [K, K], of K * K * 8 bytes in float64 (134 MB at K = 4096).

    Half of the Hessian of a linear layer's squared error in one row of its weight.
    """

    dtype: torch.dtype = torch.float64
    total: Tensor | None = None
    rows: int = 0

    def update(self, rows: Tensor) -> None:
        """Take rows [T, K]; products are summed in `dtype`, at most 2^20 elements at a time."""
        table = _table(rows)
        if self.total is None:
            self.total = torch.zeros(table.shape[1], table.shape[1], dtype=self.dtype)
        for part in _parts(table, max(1, _CHUNK // max(1, table.shape[1]))):
            wide = part.to(self.dtype)
            self.total.addmm_(wide.T, wide)
        self.rows += len(table)


def _known(found: Tensor | None, rows: int) -> Tensor:
    if found is None or not rows:
        raise UsageError("no values were seen", "give calibration samples with real tokens")
    return found


# --- a sample of rows


@dataclass
class Rows:
    """At most `limit` of all rows, each with the same chance: `kept` [<= limit, K], as they came.

    A row's lot is a hash of the seed and of its number in the stream, and the least lots stay: so
    the choice does not depend on how rows are cut into batches, nor on lengths being even.
    """

    limit: int = ROWS
    seed: int = 0
    kept: Tensor | None = None
    lots: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    rows: int = 0

    def update(self, rows: Tensor) -> None:
        """Take rows [T, K]; no batch is kept alive."""
        table = _table(rows)
        numbers = np.arange(self.rows, self.rows + len(table), dtype=np.uint64)
        before = len(self.lots)
        lots = np.concatenate([self.lots, _mixed(numbers, self.seed)])
        chosen = np.sort(np.argsort(lots, kind="stable")[: self.limit])
        fresh = table[torch.from_numpy(chosen[chosen >= before] - before)]
        if self.kept is not None:
            old = self.kept[torch.from_numpy(chosen[chosen < before])]
            fresh = torch.cat([old, fresh])
        self.kept, self.lots = fresh, lots[chosen]
        self.rows += len(table)


def _mixed(numbers: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Hash numbers to 64 bits that look drawn (the finalizer of SplitMix64, Steele et al. 2014)."""
    golden, modulus = 0x9E3779B97F4A7C15, 1 << 64
    z = numbers * np.uint64(golden) + np.uint64((seed + 1) * golden % modulus)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


# --- of all values together


@dataclass
class Extremes:
    """The least and the greatest of `count` values."""

    lo: float = math.inf
    hi: float = -math.inf
    count: int = 0

    def update(self, rows: Tensor) -> None:
        """Take values of any shape."""
        values = _finite(rows)
        if values.numel():
            low, high = values.aminmax()
            self.lo, self.hi = min(self.lo, float(low)), max(self.hi, float(high))
            self.count += values.numel()

    def merge(self, later: "Extremes") -> "Extremes":
        """Return the extremes of both."""
        count = self.count + later.count
        return Extremes(min(self.lo, later.lo), max(self.hi, later.hi), count)


@dataclass
class Smoothed:
    """The moving average of each batch's extremes: `m <- keep * m + (1 - keep) * batch`.

    The first batch begins it. It depends on how values are cut into batches.
    """

    keep: float = 0.9
    lo: float = 0.0
    hi: float = 0.0
    first: tuple[float, float] = (0.0, 0.0)
    batches: int = 0

    def update(self, rows: Tensor) -> None:
        """Take values of any shape as one batch; none is no batch."""
        batch = Extremes()
        batch.update(rows)
        if not batch.count:
            return
        if not self.batches:
            self.first = self.lo, self.hi = batch.lo, batch.hi
        else:
            self.lo = self.keep * self.lo + (1 - self.keep) * batch.lo
            self.hi = self.keep * self.hi + (1 - self.keep) * batch.hi
        self.batches += 1

    def merge(self, later: "Smoothed") -> "Smoothed":
        """Return the average over both: the later one's first batch began it at full weight."""
        if not (self.batches and later.batches):
            return replace(self if self.batches else later)
        weight = self.keep**later.batches
        lo = later.lo + weight * (self.lo - later.first[0])
        hi = later.hi + weight * (self.hi - later.first[1])
        return Smoothed(self.keep, lo, hi, self.first, self.batches + later.batches)


@dataclass
class Histogram:
    """How many values lie in each of 2048 bins of |x|, for negative and other values: `counts`.

    `counts` is [2, 2048] int64. The bins cover [0, 2^exponent), the least such range above all
    |x| seen; where a value exceeds it, it doubles and pairs of bins become one. As widths are
    powers of two, the result is the same however the values are cut into batches, exactly.
    `exponent` is None while all values are 0.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(2, BINS, dtype=torch.int64))
    exponent: int | None = None
    extremes: Extremes = field(default_factory=Extremes)

    @property
    def width(self) -> float:
        """The width of a bin."""
        return math.ldexp(1.0 / BINS, self.exponent or 0)

    def update(self, rows: Tensor) -> None:
        """Take values of any shape."""
        values = _finite(rows).reshape(-1)
        self.extremes.update(values)
        top = max(abs(self.extremes.lo), abs(self.extremes.hi)) if self.extremes.count else 0.0
        if top:
            self._widen(max(math.frexp(top)[1], _DEEPEST))
        for part in _parts(values, _CHUNK):
            wide = part.double()
            bins = (wide.abs() / self.width).long() + BINS * (wide >= 0)
            self.counts += torch.bincount(bins, minlength=2 * BINS).reshape(2, BINS)

    def merge(self, later: "Histogram") -> "Histogram":
        """Return the histogram of both."""
        known = [h.exponent for h in (self, later) if h.exponent is not None]
        both = replace(self, counts=self.counts, extremes=self.extremes.merge(later.extremes))
        other = replace(later)
        for one in (both, other) if known else ():
            one._widen(max(known))
        both.counts = both.counts + other.counts
        return both

    def signed(self) -> Iterator[tuple[float, float, int]]:
        """Yield (lower edge, upper edge, count) of the bins that hold values, in rising order."""
        for row, order in ((0, -1), (1, 1)):
            held = torch.nonzero(self.counts[row]).reshape(-1).tolist()[::order]
            for place in held:
                edges = sorted((place * order * self.width, (place + 1) * order * self.width))
                yield edges[0], edges[1], int(self.counts[row, place])

    def _widen(self, exponent: int) -> None:
        """Make the range 2^exponent, if that is wider than it is."""
        if self.exponent is not None and exponent > self.exponent:
            place = torch.arange(BINS) >> min(exponent - self.exponent, 62)
            self.counts = torch.zeros_like(self.counts).index_add_(1, place, self.counts)
        self.exponent = exponent if self.exponent is None else max(exponent, self.exponent)
