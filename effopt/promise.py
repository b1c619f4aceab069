"""What a calibration of exits promises, and how a report or a manifest holds it. Free of torch.

Sources: conformal risk control (arXiv 2208.02814), learn then test (2110.01052), betting
(2010.09686); the rules are in `effopt.risk`.
"""

import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass
from math import isinf
from reprlib import repr as short
from types import MappingProxyType
from typing import Any

from effopt.errors import UnsafeFileError
from effopt.losses import LOSSES
from effopt.risk_rules import RULES

_MOST = 1 << 53
"""Counts from here on are no counts."""
_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Promise:
    """The loss of the exits is at most `epsilon`: by `rule`, with probability 1 - `delta`.

    For crc, which has no delta, that is the mean over calibrations. `loss`, one of `effopt.losses`,
    is of an answer to that of `reference`: "self", the engine that never exits, or "original", the
    model as it was given. `output` is what is compared: at the last place of dimension `position`
    alone, or everywhere (None). `unit` is what is drawn independently. `samples` of them
    calibrated, `fitted` other rows fitted heads and the grid, `rows` is the hash of all, and
    `engine` ran them. `risk` is their mean loss at `tau`, as the rule counts it; `shares` say how
    many rows leave at each exit, `cost` what a row costs, as a part of the whole model. `grid`
    [K+1, E] are the thresholds that were tried, in order, with the mean loss and its bound at each
    in `risks` and `bounds`; `index` is the one that was taken. `graph` is the hash of the program.
    """

    rule: str
    epsilon: float
    delta: float | None
    loss: str
    reference: str
    unit: str
    output: str
    position: int | None
    samples: int
    fitted: int
    rows: str
    engine: str
    graph: str
    tau: tuple[float, ...]
    index: int
    risk: float
    shares: tuple[float, ...]
    cost: float
    grid: tuple[tuple[float, ...], ...]
    risks: tuple[float, ...]
    bounds: tuple[float, ...]

    @property
    def exits(self) -> bool:
        """Tell whether any row may leave early."""
        return self.index > 0

    def words(self) -> str:
        """Say the promise in a line."""
        other = {"self": "the engine that never exits", "original": "the original model"}
        place = "" if self.position is None else " at the last token"
        what = f"{LOSSES[self.loss].title}{place} against {other[self.reference]}"
        sure = f"with {100 * (1 - self.delta):.6g}% confidence" if self.delta else "on average"
        most = f"{self.epsilon:.2%}" if self.epsilon >= 1e-3 else f"{100 * self.epsilon:.3g}%"
        return f"{what} at most {most} {sure} ({self.rule}, {self.samples} {self.unit}s)"

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON types; a threshold that is infinite is written in words."""
        return {name: _plain(held) for name, held in asdict(self).items()}

    @staticmethod
    def from_json(record: object) -> "Promise":
        """Read the record back, which may come from a stranger.

        Every field has its type and range, and all fit together; else it is an UnsafeFileError.
        """
        if not isinstance(record, dict):
            raise _damaged(f"it is {short(record)}")
        if odd := sorted(record.keys() ^ _FIELDS.keys(), key=str):
            raise _damaged(f"{short(odd[0])} is missing, or there without a meaning")
        made = Promise(**{name: _read(name, given) for name, given in record.items()})
        if not _fits(made):
            raise _damaged("its figures are not of the same exits and settings")
        return made


def _plain(held: Any) -> Any:
    if isinstance(held, tuple):
        return [_plain(one) for one in held]
    return str(held) if isinstance(held, float) and isinf(held) else held


# --- reading: each function returns what a field holds, or raises ValueError


def _read(name: str, given: Any) -> Any:
    try:
        return _FIELDS[name](given)
    except ValueError as error:
        raise _damaged(f"{name} is {short(given)}") from error


def _fits(made: Promise) -> bool:
    """Tell whether the figures are as many as there are exits and settings, and the rest fits."""
    exits, settings = len(made.tau), len(made.grid)
    return (
        (made.delta is None) == (RULES[made.rule].test is None)
        and not (LOSSES[made.loss].labelled and made.unit == "token")
        and exits > 0
        and len(made.shares) == exits + 1
        and {len(row) for row in made.grid} == {exits}
        and len(made.risks) == len(made.bounds) == settings > made.index
    )


def _must(holds: bool, given: Any) -> Any:
    if not holds:
        raise ValueError(given)
    return given


def _word(given: Any) -> Any:
    return _must(isinstance(given, str), given)


def _count(given: Any) -> Any:
    return _must(type(given) is int and 0 <= given < _MOST, given)


def _between(low: float, given: Any, high: float) -> float:
    return float(_must(type(given) in (int, float) and low <= given <= high, given))


def _number(given: Any) -> float:
    return _between(0, given, _LARGEST)


def _part(given: Any) -> float:
    return _between(0, given, 1)


def _level(given: Any) -> float:
    return float(_must(given not in (0, 1), _part(given)))


def _threshold(given: Any) -> float:
    if given in ("inf", "-inf"):
        return float(given)
    return _between(-_LARGEST, given, _LARGEST)


def _one_of(words: Container[str]) -> Callable[[Any], Any]:
    return lambda given: _must(_word(given) in words, given)


def _or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda given: None if given is None else read(given)


def _row(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    return lambda given: tuple(map(read, _must(isinstance(given, list), given)))


_FIELDS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        **dict.fromkeys(("output", "rows", "engine", "graph"), _word),
        **dict.fromkeys(("samples", "fitted", "index"), _count),
        **dict.fromkeys(("shares", "risks", "bounds"), _row(_part)),
        "rule": _one_of(RULES),
        "loss": _one_of(LOSSES),
        "reference": _one_of(("self", "original")),
        "unit": _one_of(("sample", "token")),
        "position": _or_none(_count),
        "epsilon": _level,
        "delta": _or_none(_level),
        "risk": _part,
        "cost": _number,
        "tau": _row(_threshold),
        "grid": _row(_row(_threshold)),
    }
)
"""How each field of a promise is read."""


def _damaged(what: str) -> UnsafeFileError:
    return UnsafeFileError(f"the promise of the exits is damaged: {what}")
