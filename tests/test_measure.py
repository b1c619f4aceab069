"""Latency, proportions and differences, against figures worked out by hand or published."""

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effopt import measure
from effopt.errors import UsageError, VerificationError
from effopt.measure import (
    accuracy,
    compare,
    cosine,
    max_difference,
    median_interval,
    top1_agreement,
    wilson,
)


class Clock:
    """A clock that only the variants move, so that timing is exact."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.order: list[str] = []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)

    def variant(self, name: str, seconds: float) -> Callable[[], None]:
        """Make a call that takes so many seconds of this clock."""

        def call() -> None:
            self.order.append(name)
            self.now += seconds

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_speedup_is_the_ratio_of_the_medians_of_a_round(clock: Clock) -> None:
    found = compare({"a": clock.variant("a", 0.4), "b": clock.variant("b", 0.1)}, rounds=7)
    a, b = found["a"], found["b"]
    assert (a.speedup, a.baseline) == (None, "")
    assert b.baseline == "a"
    assert [b.speedup, b.speedup_low, b.speedup_high] == pytest.approx([4.0, 4.0, 4.0])
    assert [a.median_ms, a.p99_ms, b.median_ms] == pytest.approx([400.0, 400.0, 100.0])
    assert [a.min_ms, b.min_ms, b.speedup_min] == pytest.approx([400.0, 100.0, 4.0])
    assert a.speedup_min is None
    assert b.repeats > a.repeats


def test_rounds_interleave_and_turn(clock: Clock) -> None:
    variants = {name: clock.variant(name, 1.0) for name in "ab"}
    compare(variants, rounds=4, budget=10.0)
    assert "".join(clock.order) == "aabb" + "abbaabba"


def test_the_baseline_can_be_named(clock: Clock) -> None:
    found = compare(
        {"fast": clock.variant("f", 0.1), "slow": clock.variant("s", 0.2)}, baseline="slow"
    )
    assert found["slow"].baseline == ""
    assert found["fast"].speedup == pytest.approx(2.0)


def test_the_budget_bounds_slow_variants(clock: Clock) -> None:
    variants = {name: clock.variant(name, 10.0) for name in "ab"}
    found = compare(variants, rounds=50, budget=20.0)
    assert found["a"].repeats == 3
    assert clock.now <= 2 * (2 + 3) * 10.0 + 1e-6


@pytest.mark.parametrize("variants", [{}, {"a": lambda: None}])
def test_nothing_to_time_is_wrong_usage(variants: dict[str, Callable[[], None]]) -> None:
    with pytest.raises(UsageError):
        compare(variants, baseline="other" if variants else None)


def test_what_a_variant_raises_comes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        compare({"a": lambda: 1 / 0})


@pytest.mark.parametrize(
    ("count", "wanted"),
    [(1, (0, 0)), (5, (0, 4)), (6, (0, 5)), (8, (0, 7)), (9, (1, 7)), (20, (5, 14))],
)
def test_median_interval_is_that_of_the_sign_test(count: int, wanted: tuple[int, int]) -> None:
    assert median_interval([float(n) for n in range(count)]) == wanted


@pytest.mark.parametrize(
    ("successes", "samples", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilson_interval(successes: int, samples: int, low: float, high: float) -> None:
    """The last two rows are the examples of R. G. Newcombe, Statistics in Medicine 17, 1998."""
    assert wilson(successes, samples) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilson_interval_holds_the_share(samples: int, share: float) -> None:
    hits = round(share * samples)
    low, high = wilson(hits, samples)
    assert 0 <= low <= hits / samples + 1e-12
    assert hits / samples - 1e-12 <= high <= 1


def test_what_is_hidden_in_both_does_not_turn_a_row() -> None:
    found = cosine([[1.0, -np.inf]], [[2.0, -np.inf]])
    assert (found.mean, found.min) == (1.0, 1.0)


def test_cosine_is_by_row() -> None:
    found = cosine([[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 1.0]])
    assert (found.rows, found.min) == (2, pytest.approx(math.sqrt(0.5)))
    assert found.mean == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_cosine_of_zero_rows_and_of_nan() -> None:
    assert cosine([[0.0, 0.0]], [[0.0, 0.0]]).min == 1.0
    assert cosine([[0.0, 0.0]], [[0.0, 1.0]]).min == 0.0
    assert math.isnan(cosine([[1.0, 2.0], [1.0, 1.0]], [[1.0, float("nan")], [1.0, 1.0]]).min)


def test_top1_agreement_and_accuracy() -> None:
    reference = np.eye(4)
    got = np.eye(4)[[0, 1, 2, 0]]
    agreement = top1_agreement(reference, got)
    assert (agreement.value, agreement.samples) == (0.75, 4)
    assert (agreement.low, agreement.high) == wilson(3, 4)
    assert accuracy(got, [0, 1, 2, 3]) == agreement


def test_max_difference() -> None:
    assert max_difference([1, 2], [1, 5]) == 3.0
    assert max_difference(np.zeros((0, 3)), np.zeros((0, 3))) == 0.0


@pytest.mark.parametrize("compared", [cosine, max_difference, top1_agreement])
def test_shapes_must_agree(compared: Callable[..., object]) -> None:
    with pytest.raises(VerificationError, match=r"\[1, 2\] and \[2, 2\]"):
        compared(np.zeros((1, 2)), np.zeros((2, 2)))


def test_no_sample_is_no_proportion() -> None:
    with pytest.raises(UsageError, match="0 of 0"):
        top1_agreement(np.zeros((0, 3)), np.zeros((0, 3)))


def test_peak_memory_keeps_what_was_held_and_let_go() -> None:
    """In a process of its own, so that what other tests have held does not count."""
    code = (
        "import numpy; from effopt.measure import peak_rss_mb; before = peak_rss_mb()\n"
        "numpy.ones(2**24)\n"
        "assert before + 96 < peak_rss_mb() < before + 192, (before, peak_rss_mb())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
