"""The rules by which a mean loss is held to be small, and their tests. Losses are in [0, 1].

A test is of the hypothesis "the mean loss is above epsilon". It begins with the losses [n, K] of K
settings, rows independent and alike, and yields their p-values [K] at an epsilon. Each p-value
falls as epsilon grows, so a test also gives an upper bound of the mean: the least epsilon at which
it rejects. Free of torch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Test = Callable[[float | Floats], Floats]
"""From epsilon, one or one for each of K settings, to the p-values [K]."""

_ROUNDING = 1e-9
"""What a sum of losses may be above a whole number and still be counted as that number."""
_HALVINGS = 50


def zero_one(losses: Floats) -> bool:
    """Say whether every loss is 0 or 1."""
    return bool(((losses == 0) | (losses == 1)).all())


def binomial(losses: Floats, delta: float) -> Test:
    """Begin the exact test of n losses that are 0 or 1: P(Binomial(n, epsilon) <= errors)."""
    from scipy.special import bdtr

    rows, errors = len(losses), np.rint(losses.sum(axis=0))
    return lambda epsilon: np.asarray(bdtr(errors, rows, epsilon), np.float64)


def hoeffding_bentkus(losses: Floats, delta: float) -> Test:
    """Begin the test of losses in [0, 1] that Bates et al. give (arXiv 2101.02703).

    The lesser of Hoeffding's exp(-n h(R, epsilon)) and Bentkus' e P(Binomial(n, epsilon) <= nR),
    with nR rounded up.
    """
    from scipy.special import bdtr, rel_entr

    rows, total = len(losses), losses.sum(axis=0)
    errors = np.ceil(total - _ROUNDING)

    def test(epsilon: float | Floats) -> Floats:
        mean = np.minimum(total / rows, epsilon)
        distance = rel_entr(mean, epsilon) + rel_entr(1 - mean, 1 - np.asarray(epsilon))
        bentkus = np.minimum(1.0, math.e * bdtr(errors, rows, epsilon))
        return np.asarray(np.minimum(np.exp(-rows * distance), bentkus), np.float64)

    return test


def betting(losses: Floats, delta: float) -> Test:
    """Begin the betting test of Waudby-Smith and Ramdas (arXiv 2010.09686), by `bets` at `delta`.

    Capital 1 is bet, row by row, against losses above epsilon. If the mean were above epsilon, the
    capital would reach 1/p at any time with a probability of p at most (Ville), so p is one over
    the largest capital. The order of the rows must not follow from the losses.
    """
    stakes = bets(losses, delta)

    def test(epsilon: float | Floats) -> Floats:
        capital = np.cumsum(np.log1p(stakes * (epsilon - losses)), axis=0)
        return np.asarray(np.exp(-np.maximum(capital.max(axis=0), 0.0)), np.float64)

    return test


def bets(losses: Floats, delta: float) -> Floats:
    """Return the share [n, K] of the capital that is bet on each row; it reads earlier rows only.

    The bet on row t is min(1, sqrt(2 ln(1/delta) / (n v))), where v is the variance after t - 1
    rows: (1/4 + the squared differences from the running mean) / t, that mean begun with one 1/2.
    """
    rows = len(losses)
    counts = np.arange(2, rows + 2)[:, None]
    means = (0.5 + np.cumsum(losses, axis=0)) / counts
    variances = (0.25 + np.cumsum((losses - means) ** 2, axis=0)) / counts
    before = np.concatenate([np.full_like(variances[:1], 0.25), variances[:-1]])
    return np.asarray(np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (rows * before))))


def upper_bound(test: Test, delta: float, settings: int) -> Floats:
    """Return the least epsilon [K] at which a test rejects at `delta`, by bisection; 1 for none."""
    low, high = np.zeros(settings), np.ones(settings)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        rejected = test(middle) <= delta
        low, high = np.where(rejected, low, middle), np.where(rejected, middle, high)
    return high


@dataclass(frozen=True)
class Rule:
    """A rule for when a setting passes; losses are in [0, 1] here.

    With a `test`, a setting passes while its p-value is at most delta. Without, the rule bounds
    the mean over calibrations, so it has no delta. `fractional` is the rule for losses that are
    not all 0 or 1: this one where it has that name, none where it is empty.
    """

    about: str
    test: Callable[[Floats, float], Test] | None
    fractional: str
    shuffled: bool = False
    """Whether the rule reads rows one by one, so that they need a random order."""


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "crc": Rule(
            "the loss is at most epsilon on average over calibrations (arXiv 2208.02814); "
            "a single calibration may exceed it",
            None,
            "crc",
        ),
        "ltt": Rule(
            "the loss is at most epsilon with probability 1 - delta (arXiv 2110.01052): "
            "ltt-binomial where every loss is 0 or the bound, else ltt-hb",
            binomial,
            "ltt-hb",
        ),
        "ltt-binomial": Rule(
            "as ltt, by the exact test for losses that are 0 or the bound",
            binomial,
            "",
        ),
        "ltt-hb": Rule(
            "as ltt, by the Hoeffding-Bentkus test for any bounded loss",
            hoeffding_bentkus,
            "ltt-hb",
        ),
        "wsr": Rule(
            "the loss is at most epsilon with probability 1 - delta, by betting on rows in a "
            "random order (arXiv 2010.09686); for fractional losses of small variance",
            betting,
            "wsr",
            shuffled=True,
        ),
    }
)


def figures(name: str, losses: Floats, epsilon: float, delta: float) -> tuple[Floats, float]:
    """Return the figures [K+1] of the settings, and the limit that they must not exceed."""
    begin = RULES[name].test
    if begin is None:
        return inflated(losses), epsilon
    return begin(losses, delta)(epsilon), delta


def inflated(losses: Floats) -> Floats:
    """Return the means of running maxima, as if one more row had the largest loss there is."""
    totals = np.maximum.accumulate(losses, axis=1).sum(axis=0)
    return np.asarray((totals + 1) / (len(losses) + 1))
