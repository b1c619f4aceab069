"""Collectors and observers against plain numpy, and the invariants that hold for all of them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effopt.collectors import (
    BINS,
    ChannelExtremes,
    Collector,
    Extremes,
    Gram,
    Histogram,
    MeanAbs,
    Rows,
    Smoothed,
)
from effopt.errors import UsageError
from effopt.passes.observers import OBSERVERS, affine, entropy, mse, percentile, round_trip

X = torch.randn(3000, 8, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 1, 8)
NAMES = sorted(OBSERVERS)
SPLIT_FREE = [name for name in NAMES if name != "moving-average"]


def seen(name: str, *batches: Tensor) -> Any:
    state = OBSERVERS[name].start()
    for batch in batches:
        state.update(batch)
    return state


def observed(name: str, *batches: Tensor) -> tuple[float, float]:
    return OBSERVERS[name].range(seen(name, *batches))


def bin_width(values: Tensor) -> float:
    """The least power of two above all |x|, by 2048."""
    return float(2.0 ** (math.floor(math.log2(float(values.abs().max()))) + 1) / 2048)


# --- ranges against numpy ---------------------------------------------------------------------


def test_minmax_holds_zero() -> None:
    assert observed("minmax", X) == (float(X.min()), float(X.max()))
    assert observed("minmax", X.abs() + 1) == (0.0, float(X.abs().max() + 1))
    assert observed("minmax", -X.abs() - 1) == (float(-X.abs().max() - 1), 0.0)


def test_the_moving_average_is_the_recurrence() -> None:
    batches = X.split(700)
    lo, hi = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        lo, hi = (0.9 * m + 0.1 * float(b) for m, b in ((lo, batch.min()), (hi, batch.max())))
    assert observed("moving-average", *batches) == pytest.approx((lo, hi), rel=1e-12)


@pytest.mark.parametrize("p", [75.0, 99.0, 99.9, 99.99, 100.0])
def test_percentile_is_the_quantile_of_the_values_to_one_bin(p: float) -> None:
    """The outer edge of the bin that holds the ranked value: never narrower than that value."""
    values = np.sort(X.numpy().ravel())
    rank = max(1, math.ceil(round(len(values) * p / 100, 6)))
    high, low = float(values[rank - 1]), float(values[len(values) - rank])
    got = percentile(seen("percentile", X), p)
    width = bin_width(X)
    assert min(low, 0) - width <= got[0] <= min(low, 0)
    assert max(high, 0) <= got[1] <= max(high, 0) + width


@pytest.mark.parametrize("p", [50.0, 100.1, math.nan])
def test_a_percentile_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(UsageError, match="is not above 50"):
        percentile(seen("percentile", X), p)


@pytest.mark.parametrize(("bits", "symmetric"), [(8, False), (8, True), (4, False), (4, True)])
def test_mse_is_the_best_share_of_a_grid(bits: int, symmetric: bool) -> None:
    """Against the error of the values themselves, over the same 46 ranges.

    Bins are 1/512 or less of the range, and the code's step is 1/255 of it or more, so the error
    over centres is close to the true one: the choice costs at most 1 % of the least true error.
    """
    values = X.double().numpy().ravel()
    lo, hi = observed("minmax", X)

    def error(share: float) -> float:
        low, high = share * lo, share * hi
        if symmetric:
            top = 2 ** (bits - 1) - 1
            step = max(-low, high) / top
            codes = np.clip(np.rint(values / step), -top - 1, top)
            return float(np.mean((codes * step - values) ** 2))
        step = (high - low) / (2**bits - 1)
        origin = np.rint(-low / step)
        codes = np.clip(np.rint(values / step) + origin, 0, 2**bits - 1)
        return float(np.mean(((codes - origin) * step - values) ** 2))

    got = mse(seen("mse", X), bits, symmetric)
    share = got[1] / hi
    assert got == pytest.approx((share * lo, share * hi))
    assert error(share) <= 1.01 * min(error(1 - 0.02 * n) for n in range(46))
    assert bits == 8 or share < 1  # four bits do clip this data


def divergence(held: list[int], size: int, levels: int) -> float:
    """The divergence, in loops over lists."""
    p = [float(count) for count in held[:size]]
    p[-1] += sum(held[size:])
    q = [0.0] * size
    for run in range(levels):
        places = range(run * size // levels, (run + 1) * size // levels)
        filled = [place for place in places if held[place]]
        for place in filled:
            q[place] = sum(held[n] for n in places) / len(filled)
    if not sum(q):
        return math.inf
    p, q = [a / sum(p) for a in p], [b / sum(q) for b in q]
    return sum(a * math.log(a / (b or 1e-9)) for a, b in zip(p, q, strict=True) if a)


def test_entropy_is_the_least_divergence() -> None:
    values = torch.cat([torch.randn(20000), torch.tensor([30.0, -33.0])])
    state = seen("entropy", values)
    held = np.bincount((values.double().abs() / bin_width(values)).long(), minlength=2048).tolist()
    sizes = range(128, 2049, 128)  # runs of one length
    best = min(sizes, key=lambda size: divergence(held, size, 128))
    edge = best * bin_width(values)
    assert entropy(state, step=128) == (max(-33.0, -edge), min(30.0, edge))
    assert edge < 16  # two outliers do not decide, unlike with minmax


def test_entropy_lets_p_take_the_outliers_and_q_not() -> None:
    """A tenth of the values beyond a point: leaving them out there costs, so the range is full."""
    values = torch.cat([torch.rand(9000), torch.full((1000,), 7.5)])
    assert observed("entropy", values) == (0.0, 7.5)


def test_entropy_is_within_the_observed_range() -> None:
    assert observed("entropy", X.abs())[0] == 0.0


# --- invariants -------------------------------------------------------------------------------

floats = st.floats(-1e6, 1e6, width=32)
lists = st.lists(st.lists(floats, min_size=1, max_size=20), min_size=1, max_size=5)


@pytest.mark.parametrize("name", NAMES)
@given(batches=lists)
@settings(deadline=None, max_examples=25)
def test_minmax_contains_every_range(name: str, batches: list[list[float]]) -> None:
    tensors = [torch.tensor(batch) for batch in batches]
    lo, hi = observed(name, *tensors)
    least, most = observed("minmax", *tensors)
    slack = 1e-12 * (most - least)  # a mean of equal numbers may round
    assert least - slack <= lo <= 0 <= hi <= most + slack


@pytest.mark.parametrize("name", SPLIT_FREE)
@given(batches=lists)
@settings(deadline=None, max_examples=25)
def test_the_result_does_not_depend_on_batches(name: str, batches: list[list[float]]) -> None:
    tensors = [torch.tensor(batch) for batch in batches]
    assert observed(name, *tensors) == observed(name, torch.cat(tensors))
    assert observed(name, *tensors) == observed(name, *reversed(tensors))


@pytest.mark.parametrize("name", NAMES)
@given(first=lists, second=lists)
@settings(deadline=None, max_examples=25)
def test_merged_states_are_those_of_both_streams(
    name: str, first: list[list[float]], second: list[list[float]]
) -> None:
    one, two = ([torch.tensor(batch) for batch in batches] for batches in (first, second))
    a, b = seen(name, *one), seen(name, *two)
    untouched = seen(name, *two)
    merged, whole = a.merge(b), seen(name, *one, *two)
    # The moving average adds in another order; its terms are up to 1e6, and cancel.
    close = {"rel": 1e-9, "abs": 1e-8} if name == "moving-average" else {"rel": 0, "abs": 0}
    assert OBSERVERS[name].range(merged) == pytest.approx(OBSERVERS[name].range(whole), **close)
    assert OBSERVERS[name].range(b) == OBSERVERS[name].range(untouched)
    merged.update(torch.tensor([1e6]))
    assert OBSERVERS[name].range(b) == OBSERVERS[name].range(untouched)


@pytest.mark.parametrize("name", NAMES)
def test_merging_with_nothing_changes_nothing(name: str) -> None:
    state, empty = seen(name, X), OBSERVERS[name].start()
    for merged in (state.merge(empty), empty.merge(state)):
        assert OBSERVERS[name].range(merged) == observed(name, X)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_give_step_one_and_origin_zero(name: str) -> None:
    lo, hi = observed(name, torch.zeros(40))
    assert (lo, hi) == (0, 0)
    assert affine(lo, hi) == affine(lo, hi, symmetric=True) == (1.0, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_raises(name: str, wrong: float) -> None:
    state = seen(name, X)
    with pytest.raises(UsageError, match="NaN or infinity"):
        state.update(torch.tensor([1.0, wrong]))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_observed_raises(name: str) -> None:
    with pytest.raises(UsageError, match="no values were observed"):
        observed(name, torch.zeros(0, 3))


def test_small_values_after_zeros_keep_their_resolution() -> None:
    small = torch.linspace(-1e-6, 1e-6, 1001)
    lo, hi = percentile(seen("percentile", torch.zeros(10), small), 95)
    assert hi == pytest.approx(0.9e-6, rel=0.01)
    assert lo == pytest.approx(-0.9e-6, rel=0.01)


@pytest.mark.parametrize("scale", [1e-310, 1e-38, 1e38, 1.7e308])
def test_the_ends_of_float64(scale: float) -> None:
    values = torch.linspace(-0.4, 0.4, 101, dtype=torch.float64) * scale
    for name in NAMES:
        lo, hi = observed(name, values)
        assert -0.4 * scale <= lo <= 0 <= hi <= 0.4 * scale
        assert affine(lo, hi)[0] > 0


# --- codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lo", "hi", "bits", "symmetric", "step", "origin"),
    [
        (-1.0, 2.0, 8, False, 3 / 255, 85),
        (1.0, 3.0, 8, False, 3 / 255, 0),
        (-3.0, -1.0, 8, False, 3 / 255, 255),
        (-0.3, 1.2, 4, False, 0.1, 3),
        (-0.7, 0.62, 4, True, 0.1, 0),
        (0.0, 0.0, 8, False, 1.0, 0),
        (0.0, 1e-9, 8, True, 1e-8 / 127, 0),
        (0.0, 5e-324, 8, False, 1.0, 0),
    ],
)
def test_affine(lo: float, hi: float, bits: int, symmetric: bool, step: float, origin: int) -> None:
    assert affine(lo, hi, bits, symmetric) == (pytest.approx(step, rel=1e-15), origin)


def test_codes_of_the_worked_example() -> None:
    """0.5 is 42.5 steps, which rounds to 42 before the origin is added: code 127, not 128."""
    values = np.array([-1, 0, 0.5, 2])
    step, origin = affine(-1, 2)
    assert (np.rint(values / step) + origin).tolist() == [0, 85, 127, 255]
    assert round_trip(values, -1, 2) == pytest.approx([-1, 0, 42 * 3 / 255, 2])


@pytest.mark.parametrize("bad", [(1.0, -1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_what_is_no_range_is_refused(bad: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="is no range"):
        affine(*bad)
    with pytest.raises(UsageError, match="bits are not"):
        affine(0.0, 1.0, bits=1)


# --- collectors -------------------------------------------------------------------------------


def fed(collector: Collector, batches: Sequence[Tensor]) -> Any:
    for batch in batches:
        collector.update(batch)
    return collector


def test_channel_statistics_are_those_of_numpy() -> None:
    batches, table = X.split(999), X.double().numpy()
    assert np.allclose(fed(MeanAbs(), batches).mean, np.abs(table).mean(0), rtol=1e-6)
    extremes = fed(ChannelExtremes(), batches)
    assert np.array_equal(extremes.lo, X.numpy().min(0))
    assert np.array_equal(extremes.hi, X.numpy().max(0))
    assert np.array_equal(extremes.max_abs, np.abs(X.numpy()).max(0))
    # Products of float32 are exact in float64; what remains is the rounding of 3000 additions.
    assert np.allclose(fed(Gram(), batches).total, table.T @ table, rtol=1e-11, atol=1e-12)
    assert fed(Gram(torch.float32), batches).total.dtype == torch.float32


def test_half_precision_is_widened() -> None:
    half = torch.full((40000, 2), 7.0, dtype=torch.float16)  # the sum is beyond float16
    assert fed(MeanAbs(), [half]).mean.tolist() == [7, 7]
    assert observed("minmax", half.bfloat16()) == (0, 7)


@pytest.mark.parametrize("make", [MeanAbs, ChannelExtremes, Gram, Rows])
def test_channels_that_are_not_finite_raise(make: type[Any]) -> None:
    with pytest.raises(UsageError, match="NaN or infinity"):
        make().update(torch.tensor([[1.0, math.nan]]))


def test_statistics_of_nothing_raise() -> None:
    for read in (lambda: MeanAbs().mean, lambda: ChannelExtremes().max_abs):
        with pytest.raises(UsageError, match="no values were seen"):
            read()


def test_memory_does_not_grow_with_the_stream() -> None:
    rows, histogram = Rows(limit=50), Histogram()
    sizes = set()
    for batch in X.repeat(4, 1).split(400):
        rows.update(batch)
        histogram.update(batch)
        assert rows.kept is not None
        sizes.add((rows.kept.untyped_storage().nbytes(), len(rows.lots)))
        assert histogram.counts.shape == (2, BINS)
    assert sizes == {(50 * 8 * 4, 50)}
    assert rows.rows == 12000
    assert int(histogram.counts.sum()) == 12000 * 8


@pytest.mark.parametrize("size", [1, 7, 512, 3000])
def test_the_rows_kept_do_not_depend_on_batches(size: int) -> None:
    kept = fed(Rows(limit=64), X.split(size)).kept
    assert torch.equal(kept, fed(Rows(limit=64), [X]).kept)
    assert not torch.equal(kept, fed(Rows(limit=64, seed=1), [X]).kept)


def test_few_rows_are_all_kept_in_order() -> None:
    assert torch.equal(fed(Rows(), X[:100].split(13)).kept, X[:100])


def test_the_rows_kept_are_spread_over_the_stream_and_over_places_in_a_text() -> None:
    """4096 rows of texts of 128 tokens: of 512, each quarter and each eighth place has its share.

    A share is binomial: 128 +- 4 * 9.8 for a quarter, 64 +- 4 * 7.5 for places modulo 8.
    """
    numbers = torch.arange(4096.0).reshape(-1, 1)
    kept = fed(Rows(limit=512), numbers.split(128)).kept.long().reshape(-1)
    assert len(set(kept.tolist())) == 512
    assert (torch.bincount(kept // 1024, minlength=4) - 128).abs().max() < 40
    assert (torch.bincount(kept % 8, minlength=8) - 64).abs().max() < 30


def test_doubling_gives_the_bins_of_one_pass() -> None:
    """Against numpy's bins of the final range, over values that rise by nine orders."""
    values = torch.cat([torch.randn(500) * 10.0**power for power in range(-6, 4)])
    histogram = fed(Histogram(), values.split(50))
    edges = np.arange(2049) * bin_width(values)
    positive, negative = values[values >= 0].double(), values[values < 0].double()
    assert histogram.counts[1].tolist() == np.histogram(positive, edges)[0].tolist()
    assert histogram.counts[0].tolist() == np.histogram(-negative, edges)[0].tolist()


def test_the_states_of_the_observers_are_collectors() -> None:
    kinds = {name: type(OBSERVERS[name].start()) for name in NAMES}
    assert set(kinds.values()) == {Extremes, Smoothed, Histogram}
