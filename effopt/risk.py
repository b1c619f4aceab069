"""Choosing how much to risk: the last setting whose loss is bounded, by calibration rows.

Settings are ordered from the safest, 0, on. A rule walks them in that order and stops at the
first that fails, so trying many of them costs nothing. The grid and its order must be fixed before
the rows are seen, and the rows must be drawn as those to come will be, independently. Free of
torch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from effopt.errors import UsageError, unknown
from effopt.risk_rules import (
    RULES,
    Floats,
    binomial,
    figures,
    hoeffding_bentkus,
    inflated,
    upper_bound,
    zero_one,
)

_SLACK = 1 + 1e-9
"""Pays for rounding where a figure equals its limit; it moves a promise by no more than that."""
_LEAST = 1e-5
"""Of epsilon, in parts of the bound: there, even crc wants 100,000 rows."""
_LEAST_DELTA = 1e-9


@dataclass(frozen=True)
class Choice:
    """The setting that a rule chose: the last that passed before the first that did not.

    `figures` are of settings 0, 1, ... up to the one that failed, if any: what the rule compared,
    p-values with delta, or for crc the mean loss as it bounds it with epsilon. `rule` is the one
    that judged, so "ltt-hb" where "ltt" was asked for and losses were fractional.
    """

    index: int
    rule: str
    epsilon: float
    delta: float | None
    samples: int
    figures: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """The mean loss of each setting on the calibration rows, and its upper bound by a rule.

    A setting passes where its bound is at most epsilon. Each bound holds by itself, not all
    together; for crc it bounds a mean over calibrations. That of wsr may lie below the mean loss of
    these rows, where most losses came late in its order.
    """

    risk: tuple[float, ...]
    upper: tuple[float, ...]


@dataclass(frozen=True)
class HeldOut:
    """What rows that had no part in a calibration say of its promise.

    `lower` and `upper` bound the mean loss, each with probability 1 - delta; `p_value` is that of
    the hypothesis that it is above epsilon.
    """

    mean: float
    lower: float
    upper: float
    p_value: float
    epsilon: float
    delta: float
    samples: int

    @property
    def confirmed(self) -> bool:
        """Whether the mean loss is at most epsilon, with probability 1 - delta."""
        return self.p_value <= self.delta

    @property
    def contradicted(self) -> bool:
        """Whether the mean loss is above epsilon, with probability 1 - delta."""
        return self.lower > self.epsilon


def choose(
    table: ArrayLike,
    rule: str,
    epsilon: float,
    delta: float | None = None,
    *,
    bound: float = 1.0,
    seed: int = 0,
) -> Choice:
    """Choose a setting by the losses [n, K+1] in [0, bound] of n rows under settings 0 to K.

    A setting 0 without any loss is safe by what it is: the model as its own reference. With
    another reference that has to be shown, by as many rows as `require_samples` asks for; a
    setting 0 that has losses is tested as the first. crc reads running maxima of rows, so its
    losses need not rise along a row. Each row must be a unit that is drawn independently: tokens
    of one sequence are one. `seed` draws the order of rows, which wsr reads.

    "ltt" takes the test by the losses it is given. A loss that can be fractional, though here it
    never is, wants "ltt-hb".

    Raises UsageError for what is out of range or NaN, for "ltt-binomial" with fractional losses,
    for a delta with crc or none with another rule, and where setting 0 has losses and fails.
    """
    losses = _unit(table, bound, "samples", "settings")
    name, level = _judge(rule, delta, losses)
    allowed = _share(epsilon, bound)
    found, limit = figures(name, _ordered(name, losses, seed), allowed, level)
    passed = found <= limit * _SLACK
    if not passed[0] and losses[:, 0].any():
        mean = losses[:, 0].mean() * bound
        raise UsageError(
            f"setting 0, the safest, loses {mean:.4g} on {len(losses)} samples: by {name} that is "
            f"not within epsilon={epsilon:g}",
            "allow a larger epsilon, give more samples, or take the model itself as the reference",
        )
    passed[0] = True
    end = len(passed) if passed.all() else int(np.argmin(passed))
    scale = bound if RULES[name].test is None else 1.0
    walked = tuple((found[: end + 1] * scale).tolist())
    return Choice(end - 1, name, epsilon, delta, len(losses), walked)


def curve(
    table: ArrayLike,
    rule: str,
    delta: float | None = None,
    *,
    bound: float = 1.0,
    seed: int = 0,
) -> Curve:
    """Return mean losses and their upper bounds for all settings; arguments as of `choose`."""
    losses = _unit(table, bound, "samples", "settings")
    name, level = _judge(rule, delta, losses)
    begin, ordered = RULES[name].test, _ordered(name, losses, seed)
    if begin is None:
        bounds = inflated(ordered)
    else:
        bounds = upper_bound(begin(ordered, level), level, losses.shape[1])
    risk = losses.mean(axis=0)
    return Curve(tuple((risk * bound).tolist()), tuple((bounds * bound).tolist()))


def least_samples(rule: str, epsilon: float, delta: float | None = None, bound: float = 1.0) -> int:
    """Return on how many rows without any loss a rule first passes."""
    level, allowed = _level(rule, delta), _share(epsilon, bound)

    def passes(rows: int) -> bool:
        found, limit = figures(rule, np.zeros((rows, 1)), allowed, level)
        return bool(found[0] <= limit * _SLACK)

    high = 1
    while not passes(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def require_samples(
    samples: int, rule: str, epsilon: float, delta: float | None = None, bound: float = 1.0
) -> None:
    """Raise UsageError, with the number, where there are fewer rows than a rule can pass on."""
    least = least_samples(rule, epsilon, delta, bound)
    if samples < least:
        given = f"epsilon={epsilon:g}" + ("" if delta is None else f", delta={delta:g}")
        raise UsageError(
            f"early exit with {given} by {rule} needs at least {least} calibration samples, "
            f"there are {samples}",
            f"give {least} samples or more, or allow a larger epsilon",
        )


def held_out(losses: ArrayLike, epsilon: float, delta: float, *, bound: float = 1.0) -> HeldOut:
    """Judge the promise "the mean loss is at most epsilon" by losses [n] in [0, bound].

    The rows must be new: neither fitted nor calibrated on. Bounds are exact (Clopper and Pearson,
    1934) where every loss is 0 or the bound, else by Hoeffding-Bentkus.
    """
    unit = _unit(losses, bound, "samples")[:, None]
    level, allowed = _checked_delta(delta), _share(epsilon, bound)
    begin = binomial if zero_one(unit) else hoeffding_bentkus
    test = begin(unit, level)
    high = upper_bound(test, level, 1)[0]
    low = 1 - upper_bound(begin(1 - unit, level), level, 1)[0]
    return HeldOut(
        mean=float(unit.mean() * bound),
        lower=float(low * bound),
        upper=float(high * bound),
        p_value=float(test(allowed)[0]),
        epsilon=epsilon,
        delta=delta,
        samples=len(unit),
    )


def _ordered(name: str, losses: Floats, seed: int) -> Floats:
    return np.random.default_rng(seed).permutation(losses) if RULES[name].shuffled else losses


# --- what is given


def _judge(rule: str, delta: float | None, losses: Floats) -> tuple[str, float]:
    """Return the name of the rule that judges these losses, and its level."""
    level = _level(rule, delta)
    if RULES[rule].fractional == rule or zero_one(losses):
        return rule, level
    if not RULES[rule].fractional:
        raise UsageError(
            f"{rule} takes losses that are 0 or the bound, and some are between",
            "use ltt-hb or wsr",
        )
    return RULES[rule].fractional, level


def _level(rule: str, delta: float | None) -> float:
    """Check a rule's name and its delta, which a rule without a test must not have."""
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    if RULES[rule].test is not None:
        return _checked_delta(delta)
    if delta is not None:
        raise UsageError(
            f"{rule} bounds the mean loss over calibrations: it has no delta",
            "leave delta out, or use ltt or wsr for a promise with probability 1 - delta",
        )
    return 1.0


def _checked_delta(delta: float | None) -> float:
    if delta is None or not _LEAST_DELTA <= delta < 1:
        shown = "missing" if delta is None else f"{delta:g}"
        raise UsageError(
            f"delta is {shown}, and must be from {_LEAST_DELTA:g} up to but not 1",
            "0.05 is a promise with probability 0.95",
        )
    return delta


def _share(epsilon: float, bound: float) -> float:
    """Return epsilon in parts of the bound."""
    if not _LEAST <= epsilon / _checked_bound(bound) < 1:
        raise UsageError(
            f"epsilon is {epsilon:g}, and must be from {_LEAST * bound:g} up to but not {bound:g}, "
            "the largest loss",
            f"{0.01 * bound:g} allows one part in a hundred",
        )
    return epsilon / bound


def _checked_bound(bound: float) -> float:
    if not 0 < bound < np.inf:
        raise UsageError(f"the largest loss is {bound:g}", "it must be above 0, and finite")
    return bound


def _unit(losses: ArrayLike, bound: float, *axes: str) -> Floats:
    """Return losses in [0, 1] with these axes, in parts of the bound."""
    array = np.asarray(losses)
    if array.ndim != len(axes) or not array.size:
        raise UsageError(
            f"losses have the shape {list(array.shape)}", f"give [{', '.join(axes)}], none empty"
        )
    # In the type of the losses: a bound of 0.1 in float32 is above 0.1 in float64.
    inside = (array >= 0) & (array <= float(_checked_bound(bound)))
    if not inside.all():
        place = tuple(int(axis) for axis in np.argwhere(~inside)[0])
        raise UsageError(
            f"the loss at {list(place)} is {array[place]:g}, outside [0, {bound:g}]",
            "clip losses to the bound, or name a larger bound",
        )
    return np.minimum(array.astype(np.float64) / bound, 1.0)
