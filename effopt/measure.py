"""Measuring: latency with its spread, quality with its bounds, and memory. Free of torch."""

import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from effopt.errors import UsageError, VerificationError, unknown

Call = Callable[[], object]
Variant = Call | Sequence[Call]
"""One call; or several that take turns, such as one for each input, where times differ by input."""

_WARMUP_SECONDS = 0.2
_LEAST_WARMUP = 2
_LEAST_ROUNDS = 3
_MOST_CALLS = 200
_SETTLE_SECONDS = 0.01
"""A pause before each slice: the threads of the variant before may still spin for work."""

_NORMAL_95 = 1.959963984540054
"""The two-sided 95 % point of the normal distribution."""


@dataclass(frozen=True)
class Timing:
    """The time of one call, in milliseconds over all rounds.

    `low_ms` and `high_ms` are the quartiles. `speedup` is the median over the rounds of
    (baseline's median / own median) in the same round, of means where calls differ by input;
    `speedup_low` and `speedup_high` are its interval as of `median_interval`. The baseline has no
    speed-up and names no baseline. `mean_ms` and `p95_ms` are of calls that differ by input.
    `min_ms` is the least time of all, and `speedup_min` the ratio of these least times.
    """

    median_ms: float
    p90_ms: float
    p99_ms: float
    low_ms: float
    high_ms: float
    repeats: int
    warmup: int
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    baseline: str = ""
    mean_ms: float | None = None
    p95_ms: float | None = None
    min_ms: float | None = None
    speedup_min: float | None = None

    def figures(self) -> dict[str, Any]:
        """Return all fields by name."""
        return dict(vars(self))


def compare(
    variants: Mapping[str, Variant],
    *,
    baseline: str | None = None,
    rounds: int = 9,
    budget: float = 20.0,
) -> dict[str, Timing]:
    """Time several variants against each other on a machine that may be busy with other work.

    Every variant is warmed up; then each round calls each variant some times in a row (of several
    calls all, one after the other, as many in each variant), and the
    order turns from round to round, so that slow drift (clock, heat, load) falls on all alike and
    the ratios *within* a round stay true. `baseline` is the first variant unless named. `budget`
    bounds the whole in seconds: calls in a round are cut first, then rounds, to three at the
    least, so a slow variant may overrun by that much. Raises UsageError for no variants or an
    unknown baseline; what a variant raises comes through.
    """
    if not variants or rounds < 1:
        raise UsageError("there is nothing to time", "name one variant and one round at least")
    base = next(iter(variants)) if baseline is None else baseline
    if base not in variants:
        raise unknown("baseline", base, variants)
    start = time.perf_counter()
    turns = {name: _turns(variant) for name, variant in variants.items()}
    several = max(map(len, turns.values())) > 1
    if several and len(set(map(len, turns.values()))) > 1:
        raise UsageError("variants have different numbers of calls", "give each the same inputs")
    warm = {name: _warm_up(calls, budget / (4 * len(variants))) for name, calls in turns.items()}
    share = (budget - (time.perf_counter() - start)) / (rounds * len(variants))
    calls = {n: max(1, min(_MOST_CALLS, int(share / max(s, 1e-7)))) for n, (_, s) in warm.items()}
    samples: dict[str, list[list[float]]] = {name: [] for name in variants}
    with _no_collection():
        for turn in range(rounds):
            if turn >= min(_LEAST_ROUNDS, rounds) and time.perf_counter() - start > budget:
                break
            for name in _turned(list(variants), turn):
                time.sleep(_SETTLE_SECONDS)
                samples[name].append(_sample(turns[name], calls[name]))
    middle = statistics.fmean if several else statistics.median
    return {
        name: _timing(
            samples[name], warm[name][0], base if name != base else "", samples[base], middle
        )
        for name in variants
    }


def _turns(variant: Variant) -> Sequence[Call]:
    return variant if isinstance(variant, Sequence) else (variant,)


def _turned(names: list[str], turn: int) -> Iterator[str]:
    return itertools.islice(
        itertools.cycle(names), turn % len(names), turn % len(names) + len(names)
    )


def _warm_up(calls: Sequence[Call], most: float) -> tuple[int, float]:
    """Call until it has had time to settle; return how many calls, and the seconds of the best."""
    start, sums, count = time.perf_counter(), list[float](), 0
    while True:
        times = _sample(calls, 1)
        sums.append(sum(times))
        count += len(times)
        spent = time.perf_counter() - start
        if len(sums) >= _LEAST_WARMUP and spent >= min(_WARMUP_SECONDS, most):
            return count, min(sums)


def _sample(calls: Sequence[Call], count: int) -> list[float]:
    """Return the seconds of each call, of `count` turns."""
    times = []
    for call in (call for _ in range(count) for call in calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the timed calls, as `timeit` does."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _timing(
    own: list[list[float]],
    warmup: int,
    baseline: str,
    base: list[list[float]],
    middle: Callable[[Sequence[float]], float],
) -> Timing:
    calls = 1e3 * np.concatenate([np.asarray(part) for part in own])
    low, median, high, p90, p99 = (float(q) for q in np.percentile(calls, (25, 50, 75, 90, 99)))
    plain = Timing(median, p90, p99, low, high, len(calls), warmup, min_ms=float(calls.min()))
    if middle is statistics.fmean:
        plain = replace(plain, mean_ms=float(calls.mean()), p95_ms=float(np.percentile(calls, 95)))
    if not baseline:
        return plain
    ratios = [middle(b) / max(middle(o), 1e-12) for b, o in zip(base, own, strict=True)]
    least, most = median_interval(ratios)
    fastest = 1e3 * min(itertools.chain.from_iterable(base))
    return replace(
        plain,
        speedup=statistics.median(ratios),
        speedup_min=fastest / max(float(calls.min()), 1e-9),
        speedup_low=least,
        speedup_high=most,
        baseline=baseline,
    )


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % interval of the median that assumes nothing about the distribution.

    From the sign test: the k-th smallest and the k-th largest of n values enclose the median with
    probability 1 - 2 P(Binomial(n, 1/2) < k); k is the largest that keeps 95 %. Under six values
    no k does: then the least and the greatest are returned, which cover 1 - 2^(1-n).
    """
    ordered, count = sorted(values), len(values)
    tail, k = 0.0, 0
    while 2 * (tail + math.comb(count, k) / 2**count) <= 0.05:
        tail += math.comb(count, k) / 2**count
        k += 1
    place = max(k - 1, 0)
    return ordered[place], ordered[count - 1 - place]


@dataclass(frozen=True)
class Cosine:
    """The cosine of the angle between two outputs, row by row: its mean and its least value."""

    mean: float
    min: float
    rows: int


def cosine(reference: ArrayLike, got: ArrayLike) -> Cosine:
    """Compare two outputs row by row (first axis; the rest of a row is one vector).

    cos = <a, b> / (|a| |b|) in float64; two zero rows agree (1), a zero and a non-zero one do not
    (0); NaN anywhere gives NaN; what is infinite in both, such as a hidden logit, is left out.
    Raises VerificationError where the shapes differ.
    """
    left, right = (_rows(side) for side in _pair(reference, got))
    hidden = np.isinf(left) & (left == right)
    left, right = (np.where(hidden, 0.0, side) for side in (left, right))
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    same = np.all(left == right, axis=1)
    found = np.where(norms == 0, 0.0, np.sum(left * right, axis=1) / np.where(norms == 0, 1, norms))
    each = np.where(same, 1.0, np.clip(found, -1.0, 1.0))
    return Cosine(float(each.mean()), float(each.min()), len(each))


def _rows(array: NDArray[Any]) -> NDArray[np.float64]:
    return array.reshape(array.shape[0] if array.ndim else 1, -1).astype(np.float64)


def max_difference(reference: ArrayLike, got: ArrayLike) -> float:
    """Return max |reference - got|, in the units of the output; 0 for empty outputs.

    Raises VerificationError where the shapes differ.
    """
    left, right = _pair(reference, got)
    return float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max(initial=0.0))


@dataclass(frozen=True)
class Proportion:
    """A share of samples, between 0 and 1, with its 95 % interval and the number of samples."""

    value: float
    low: float
    high: float
    samples: int


def top1_agreement(reference: ArrayLike, got: ArrayLike) -> Proportion:
    """Tell how often two outputs have their largest value at the same place of the last axis.

    Every index of the leading axes is one sample. Raises VerificationError where the shapes
    differ, UsageError where there is no sample.
    """
    left, right = _pair(reference, got)
    return _share(left.argmax(axis=-1) == right.argmax(axis=-1))


def accuracy(logits: ArrayLike, labels: ArrayLike) -> Proportion:
    """Tell how often the largest of the logits [..., classes] is at the label [...].

    Raises VerificationError where there is not one label for each row of logits, UsageError where
    there is no sample.
    """
    found, wanted = _pair(np.asarray(logits).argmax(axis=-1), labels)
    return _share(found == wanted)


def _share(hits: NDArray[np.bool_]) -> Proportion:
    count = int(hits.size)
    low, high = wilson(int(hits.sum()), count)
    return Proportion(float(hits.mean()), low, high, count)


def wilson(successes: int, samples: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (E. B. Wilson, JASA 22, 1927).

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with p = successes / n and z = 1.96; it
    stays true near 0 and 1, where the usual p ± z·sqrt(p(1-p)/n) shrinks to nothing.
    Raises UsageError without samples.
    """
    if samples < 1 or not 0 <= successes <= samples:
        raise UsageError(f"{successes} of {samples} samples is no proportion", "pass some samples")
    share, square = successes / samples, _NORMAL_95**2
    middle = share + square / (2 * samples)
    spread = _NORMAL_95 * math.sqrt(
        share * (1 - share) / samples + square / (4 * samples * samples)
    )
    scale = 1 + square / samples
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def _pair(reference: ArrayLike, got: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    left, right = np.asarray(reference), np.asarray(got)
    if left.shape != right.shape:
        raise VerificationError(
            f"the outputs differ in shape: {list(left.shape)} and {list(right.shape)}",
            "compare the same output of both models on the same inputs",
        )
    return left, right


def peak_rss_mb() -> float:
    """Return the most memory that this process has held at once, in MiB (resident set)."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage keeps the peak of the process that started this one
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
