"""Rules of risk: golden figures, against plain spellings of the papers, and what always holds."""

import math
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from effopt.errors import UsageError
from effopt.risk import choose, curve, held_out, least_samples, require_samples
from effopt.risk_rules import RULES, bets

Floats = NDArray[np.float64]

GOLDEN = """
100 .01 0 -1 -1 -1
100 .05 4 1 1 1
200 .02 3 1 0 0
200 .05 9 5 4 4
500 .01 4 1 1 1
500 .02 9 5 4 4
500 .05 24 18 16 16
1000 .01 9 5 4 4
1000 .02 19 13 11 12
1000 .05 49 40 37 38
2000 .01 19 13 11 12
2000 .02 39 31 28 29
2000 .05 99 87 82 83
5000 .01 49 40 37 38
5000 .02 99 86 82 83
5000 .05 249 229 222 224
"""
"""Rows, epsilon, and the most errors with which a rule passes; -1: not even without errors."""
JUDGES = (("crc", None), ("ltt-binomial", 0.1), ("ltt-hb", 0.1), ("ltt-binomial", 0.05))

LEAST = {
    (0.01, 0.10): 230,
    (0.01, 0.05): 299,
    (0.01, 0.01): 459,
    (0.02, 0.10): 114,
    (0.02, 0.05): 149,
    (0.02, 0.01): 228,
    (0.05, 0.10): 45,
    (0.05, 0.05): 59,
    (0.05, 0.01): 90,
}

WITH_DELTA = [(name, 0.1 if rule.test else None) for name, rule in RULES.items()]
seeds = st.integers(0, 2**32 - 1)


def staircase(rows: int, most: int) -> Floats:
    """Never exiting, then settings with 0, 1, ... errors."""
    errors = np.arange(-1, most + 1)
    return (np.arange(rows)[:, None] < errors).astype(np.float64)


def draw_table(
    seed: int, *, fractional: bool = False, rising: bool = False, zero: bool = True
) -> Floats:
    """Draw a table of a random size whose losses become likelier with the setting."""
    rng = np.random.default_rng(seed)
    rows, steps = int(rng.integers(1, 400)), int(rng.integers(1, 12))
    risks = np.sort(rng.uniform(0, 0.3, steps + 1))
    if zero:
        risks[0] = 0
    hits = (rng.uniform(size=(rows, steps + 1)) < risks).astype(np.float64)
    table = hits * rng.uniform(size=hits.shape) if fractional else hits
    return np.maximum.accumulate(table, axis=1) if rising else table


# --- golden figures


@pytest.mark.parametrize("line", GOLDEN.split("\n")[1:-1])
def test_the_most_errors_with_which_a_rule_passes(line: str) -> None:
    rows, epsilon, *most = (float(word) for word in line.split())
    table = staircase(int(rows), math.floor(rows * epsilon) + 2)
    found = [choose(table, rule, epsilon, delta).index - 1 for rule, delta in JUDGES]
    assert found == most


@pytest.mark.parametrize(("epsilon", "delta"), LEAST)
@pytest.mark.parametrize("rule", ["ltt", "ltt-binomial", "ltt-hb"])
def test_the_least_samples_of_ltt(rule: str, epsilon: float, delta: float) -> None:
    assert least_samples(rule, epsilon, delta) == LEAST[epsilon, delta]


def test_the_least_samples_of_crc() -> None:
    found = [least_samples("crc", epsilon) for epsilon in (0.01, 0.02, 0.05, 0.3, 0.9)]
    assert found == [99, 49, 19, 3, 1]
    assert least_samples("crc", 0.04, bound=4.0) == 99


@pytest.mark.parametrize(("rule", "delta"), WITH_DELTA)
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.5])
def test_a_rule_first_passes_on_the_least_samples(
    rule: str, delta: float | None, epsilon: float
) -> None:
    least = least_samples(rule, epsilon, delta)
    sizes = [least - 1, least, least + 1, 2 * least] if least > 1 else [1, 2]
    found = [choose(np.zeros((size, 2)), rule, epsilon, delta).index for size in sizes]
    assert found == [int(size >= least) for size in sizes]


def test_too_few_samples_are_an_error_with_the_number() -> None:
    with pytest.raises(UsageError) as error:
        require_samples(100, "ltt", 0.01, 0.05)
    assert str(error.value) == (
        "early exit with epsilon=0.01, delta=0.05 by ltt needs at least 299 calibration samples, "
        "there are 100\n  remedy: give 299 samples or more, or allow a larger epsilon"
    )
    with pytest.raises(UsageError, match=r"with epsilon=0\.01 by crc needs at least 99 "):
        require_samples(98, "crc", 0.01)
    require_samples(299, "ltt", 0.01, 0.05)
    require_samples(99, "crc", 0.01)


# --- against plain spellings


def plain_wsr(losses: Sequence[float], epsilon: float, delta: float) -> tuple[list[float], float]:
    """The bets and the p-value, row by row as the paper has it."""
    stakes, capital, most, total, squares, variance = [], 1.0, 1.0, 0.5, 0.25, 0.25
    for row, loss in enumerate(losses, start=1):
        stakes.append(min(1.0, math.sqrt(2 * math.log(1 / delta) / (len(losses) * variance))))
        capital *= 1 - stakes[-1] * (loss - epsilon)
        most = max(most, capital)
        total += loss
        squares += (loss - total / (row + 1)) ** 2
        variance = squares / (row + 1)
    return stakes, 1 / most


def plain_hb(losses: Sequence[float], epsilon: float) -> float:
    rows, mean = len(losses), math.fsum(losses) / len(losses)
    low = min(mean, epsilon)
    distance = (low * math.log(low / epsilon) if low else 0.0) + (
        (1 - low) * math.log((1 - low) / (1 - epsilon)) if low < 1 else 0.0
    )
    bentkus = math.e * stats.binom.cdf(math.ceil(rows * mean - 1e-9), rows, epsilon)
    return float(min(math.exp(-rows * distance), bentkus, 1.0))


@given(seeds, st.sampled_from([0.01, 0.05, 0.2]), st.sampled_from([0.05, 0.3]))
@settings(max_examples=60, deadline=None)
def test_figures_are_those_of_the_papers(seed: int, epsilon: float, delta: float) -> None:
    losses = draw_table(seed, fractional=True)
    stakes, table = bets(losses, delta), np.random.default_rng(seed).permutation(losses)
    found = choose(losses, "wsr", epsilon, delta, seed=seed).figures
    for column, figure in enumerate(found):
        assert stakes[:, column] == pytest.approx(
            plain_wsr(losses[:, column].tolist(), epsilon, delta)[0], rel=1e-12
        )
        expected = plain_wsr(table[:, column].tolist(), epsilon, delta)[1]
        assert figure == pytest.approx(expected, rel=1e-10)
    for column, figure in enumerate(choose(losses, "ltt", epsilon, delta).figures):
        assert figure == pytest.approx(plain_hb(losses[:, column].tolist(), epsilon), rel=1e-9)
    hits = np.ceil(losses)
    for column, figure in enumerate(choose(hits, "ltt", epsilon, delta).figures):
        expected = stats.binom.cdf(hits[:, column].sum(), len(hits), epsilon)
        assert figure == pytest.approx(expected, rel=1e-9)


def test_a_sum_a_little_above_a_whole_number_is_that_number() -> None:
    table = np.zeros((300, 2))
    table[:35, 1] = 1 / 7
    assert table.sum(axis=0)[1] > 5
    exact = staircase(300, 5)[:, [0, -1]]
    found, expected = (choose(each, "ltt-hb", 0.05, 0.1).figures[1] for each in (table, exact))
    assert found == pytest.approx(expected, rel=1e-9)


# --- what always holds


@given(seeds, st.sampled_from([0.02, 0.05, 0.1]), st.sampled_from([0.01, 0.05, 0.1]))
@settings(max_examples=150, deadline=None)
def test_rules_are_ordered_on_rising_losses(seed: int, epsilon: float, delta: float) -> None:
    table = draw_table(seed, rising=True)
    naive = int(np.flatnonzero(table.mean(axis=0) <= epsilon).max())
    crc = choose(table, "crc", epsilon).index
    ltt = choose(table, "ltt", epsilon, delta).index
    hb = choose(table, "ltt-hb", epsilon, delta).index
    assert hb <= ltt <= crc <= naive


@given(seeds, st.booleans(), st.sampled_from([0.01, 0.05, 0.3]))
@settings(max_examples=100, deadline=None)
def test_the_walk_ends_at_the_first_failure(seed: int, fractional: bool, epsilon: float) -> None:
    table = draw_table(seed, fractional=fractional)
    for rule, delta in WITH_DELTA:
        if rule == "ltt-binomial" and fractional and table.any():
            continue
        found = choose(table, rule, epsilon, delta)
        limit = (delta or epsilon) * (1 + 1e-9)
        assert all(figure <= limit for figure in found.figures[1 : found.index + 1])
        failed = found.figures[found.index + 1 :]
        assert len(failed) == int(found.index + 1 < table.shape[1])
        assert all(figure > limit for figure in failed)
        assert found.samples == len(table)


def test_a_setting_that_passes_after_a_failure_is_not_taken() -> None:
    table = np.zeros((500, 4))
    table[:100, 2] = 1
    for rule, delta in WITH_DELTA:
        assert choose(table, rule, 0.05, delta).index == 1


def test_crc_counts_a_row_that_lost_before_for_good() -> None:
    table = np.zeros((100, 3))
    table[:4, 1] = table[4:8, 2] = 1
    assert choose(table, "crc", 0.05).index == 1
    assert choose(table, "crc", 0.1).index == 2
    assert choose(table, "crc", 0.1).figures == pytest.approx([1 / 101, 5 / 101, 9 / 101])


@pytest.mark.parametrize(("rule", "delta"), WITH_DELTA)
def test_without_a_success_nothing_exits(rule: str, delta: float | None) -> None:
    table = np.ones((50, 5))
    table[:, 0] = 0
    assert choose(table, rule, 0.05, delta).index == 0
    assert choose(table[:, :1], rule, 0.05, delta).index == 0
    assert choose(np.zeros((5, 5)), rule, 0.01, delta).index == 0


@given(seeds, st.booleans(), st.sampled_from([0.05, 0.1]), st.floats(1e-3, 1e3))
@settings(max_examples=100, deadline=None)
def test_scaled_losses_give_the_same_choice(
    seed: int, fractional: bool, epsilon: float, scale: float
) -> None:
    table = draw_table(seed, fractional=fractional)
    for rule, delta in [("crc", None), ("ltt", 0.1), ("ltt-hb", 0.1), ("wsr", 0.1)]:
        found = choose(table, rule, epsilon, delta)
        scaled = choose(table * scale, rule, epsilon * scale, delta, bound=scale)
        assert (scaled.index, scaled.rule) == (found.index, found.rule)
        unit = scale if rule == "crc" else 1.0
        assert scaled.figures == pytest.approx([unit * f for f in found.figures], rel=1e-9)


def test_rounding_of_a_scaled_epsilon_does_not_decide() -> None:
    # Ten of 200 are a share of 0.05, which 0.05 * 0.7 / 0.7 is a bit below.
    assert 0.05 * 0.7 / 0.7 < 0.05
    assert choose(staircase(199, 12) * 0.7, "crc", 0.05 * 0.7, bound=0.7).index - 1 == 9


def test_float32_losses_at_a_bound_that_float32_rounds_up_are_inside() -> None:
    table = np.zeros((200, 2), np.float32)
    table[:3, 1] = 0.1
    assert float(table[0, 1]) > 0.1
    found = choose(table, "ltt", 0.01, 0.1, bound=0.1)
    assert (found.rule, found.index) == ("ltt", 1)


@given(seeds, st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_a_bet_reads_earlier_rows_only(seed: int, row: int) -> None:
    rng = np.random.default_rng(seed)
    losses = rng.uniform(size=(100, 3)) ** 4
    later = np.concatenate([losses[:row], rng.permutation(losses[row:])])
    assert np.array_equal(bets(losses, 0.1)[: row + 1], bets(later, 0.1)[: row + 1])
    assert np.array_equal(
        bets(losses, 0.1)[: row + 1], bets(np.r_[losses[:row], 1 - losses[row:]], 0.1)[: row + 1]
    )


def test_the_order_of_rows_is_drawn_by_the_seed() -> None:
    # Sorted losses, worst last, would let the bettor win before it sees them.
    table = np.zeros((400, 2))
    table[300:, 1] = 1
    assert plain_wsr(table[:, 1].tolist(), 0.05, 0.1)[1] <= 0.1
    assert [choose(table, "wsr", 0.05, 0.1, seed=seed).index for seed in range(20)] == [0] * 20
    figures = {choose(table, "wsr", 0.05, 0.9, seed=seed).figures[-1] for seed in (0, 0, 1, 2)}
    assert len(figures) == 3


def test_fractional_losses_choose_the_test_of_ltt() -> None:
    table = staircase(500, 10)
    assert choose(table, "ltt", 0.05, 0.1).rule == "ltt"
    assert choose(table / 2, "ltt", 0.05, 0.1).rule == "ltt-hb"
    assert choose(table * 7, "ltt", 0.35, 0.1, bound=7.0).rule == "ltt"
    assert choose(table.astype(bool), "ltt", 0.05, 0.1).rule == "ltt"


def test_another_reference_may_leave_no_safe_setting() -> None:
    table = staircase(500, 40)[:, 20:]
    with pytest.raises(UsageError, match=r"setting 0, the safest, loses 0\.038 on 500 samples"):
        choose(table, "ltt", 0.02, 0.1)
    assert choose(table, "ltt", 0.06, 0.1).index == 3
    assert choose(table, "ltt", 0.052, 0.1).index == 0


# --- bounds


@given(seeds, st.booleans(), st.sampled_from([0.02, 0.1, 0.25]))
@settings(max_examples=40, deadline=None)
def test_a_setting_passes_where_its_bound_is_at_most_epsilon(
    seed: int, fractional: bool, epsilon: float
) -> None:
    table = draw_table(seed, fractional=fractional)
    for rule, delta in [("crc", None), ("ltt", 0.1), ("ltt-hb", 0.1), ("wsr", 0.1)]:
        found = choose(table, rule, epsilon, delta, seed=3)
        drawn = curve(table, rule, delta, seed=3)
        limit = delta or epsilon
        passed = [figure <= limit * (1 + 1e-9) for figure in found.figures]
        assert passed == [bound <= epsilon * (1 + 1e-9) for bound in drawn.upper[: len(passed)]]
        assert drawn.risk == pytest.approx(table.mean(axis=0))
        # wsr may have won its bets before the losses came, so its bound may be below the mean.
        above = [up >= mean for up, mean in zip(drawn.upper, drawn.risk, strict=True)]
        assert all(above) or rule == "wsr"


def test_bounds_of_errors_are_exact() -> None:
    drawn = curve(staircase(200, 30) * 4, "ltt", 0.1, bound=4.0)
    errors = np.r_[0, np.arange(31)]
    assert drawn.upper == pytest.approx(4 * stats.beta.ppf(0.9, errors + 1, 200 - errors))
    assert curve(np.ones((20, 1)), "ltt", 0.1).upper == (1.0,)


@pytest.mark.parametrize("errors", [0, 1, 7, 50, 99, 100])
def test_held_out_errors_have_the_bounds_of_clopper_and_pearson(errors: int) -> None:
    found = held_out(np.arange(100) < errors, 0.05, 0.05)
    # A two-sided interval at 90 % has 5 % on either side.
    exact = stats.binomtest(errors, 100, 0.05).proportion_ci(0.9, "exact")
    assert [found.lower, found.upper] == pytest.approx([exact.low, exact.high], abs=1e-12)
    assert found.p_value == pytest.approx(stats.binom.cdf(errors, 100, 0.05))
    assert (found.mean, found.samples) == (errors / 100, 100)
    assert (found.confirmed, found.contradicted) == (errors < 2, errors > 9)


def test_held_out_fractions_have_wider_bounds_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    losses = rng.uniform(0, 0.2, 500)
    found = held_out(3 * losses, 0.6, 0.05, bound=3.0)
    assert found.lower < found.mean < found.upper
    assert found.mean == pytest.approx(3 * losses.mean())
    assert found.confirmed
    assert not found.contradicted
    assert plain_hb(losses.tolist(), found.upper / 3) == pytest.approx(0.05)
    assert plain_hb((1 - losses).tolist(), 1 - found.lower / 3) == pytest.approx(0.05)
    assert held_out(3 * losses, 0.1, 0.05, bound=3.0).contradicted


# --- what is refused

TABLE = np.zeros((10, 3))
REFUSED = {
    "epsilon is 0,": lambda: choose(TABLE, "crc", 0.0),
    "epsilon is 1,": lambda: choose(TABLE, "crc", 1.0),
    "epsilon is nan,": lambda: choose(TABLE, "crc", math.nan),
    r"epsilon is 5, and must be from 4e-05 up to but not 4": lambda: least_samples(
        "crc", 5.0, bound=4.0
    ),
    "delta is missing": lambda: choose(TABLE, "ltt", 0.1),
    "delta is 0,": lambda: choose(TABLE, "wsr", 0.1, 0.0),
    "delta is 1,": lambda: curve(TABLE, "ltt-hb", 1.0),
    "delta is nan,": lambda: held_out(TABLE[:, 0], 0.1, math.nan),
    "crc bounds the mean loss over calibrations: it has no delta": lambda: choose(
        TABLE, "crc", 0.1, 0.1
    ),
    "unknown rule 'lt'\n  remedy: did you mean 'ltt'": lambda: least_samples("lt", 0.1),
    "the largest loss is -1": lambda: choose(TABLE, "crc", 0.1, bound=-1.0),
    r"the loss at \[0, 1\] is 2, outside \[0, 1\]": lambda: choose([[0, 2]], "crc", 0.1),
    r"the loss at \[1, 0\] is nan,": lambda: choose([[0.0], [math.nan]], "crc", 0.1),
    r"the loss at \[2\] is -0.5,": lambda: held_out([0, 0, -0.5], 0.1, 0.1),
    r"losses have the shape \[0, 3\]": lambda: choose(TABLE[:0], "crc", 0.1),
    r"losses have the shape \[10\]\n  remedy: give \[samples, settings\]": lambda: choose(
        TABLE[:, 0], "crc", 0.1
    ),
    "ltt-binomial takes losses that are 0 or the bound": lambda: choose(
        TABLE + 0.5, "ltt-binomial", 0.1, 0.1
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_out_of_range_is_refused_with_a_remedy(words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        REFUSED[words]()
    assert error.value.remedy


def test_the_rules_load_neither_torch_nor_scipy() -> None:
    code = (
        "import sys, effopt.risk, effopt.exit_losses;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
