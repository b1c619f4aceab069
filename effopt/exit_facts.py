"""A promise of exits as a report or a manifest holds it, which may come from a stranger.

Free of torch.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from types import MappingProxyType

from effopt.errors import UnsafeFileError
from effopt.promise import Promise
from effopt.risk_rules import RULES

_MOST = 1 << 53
"""Counts from here on are no counts."""


def read_promise(record: object) -> Promise:
    """Read a promise from JSON: every field has its type and range, and all fit together.

    Raises UnsafeFileError where one does not.
    """
    try:
        made = Promise.from_json(record)
    except (TypeError, OverflowError) as error:
        raise _damaged(str(error)) from error
    for name, holds in _FIELDS.items():
        if not holds(getattr(made, name)):
            raise _damaged(f"{name} is {getattr(made, name)!r:.60}")
    if not _fits(made):
        raise _damaged("its figures are not of the same exits and settings")
    return made


def _fits(made: Promise) -> bool:
    """Tell whether the figures are as many as there are exits and settings."""
    exits, settings = len(made.tau), len(made.grid)
    return (
        (made.delta is None) == (RULES[made.rule].test is None)
        and exits > 0
        and len(made.shares) == exits + 1
        and {len(row) for row in made.grid} == {exits}
        and len(made.risks) == len(made.bounds) == settings > made.index
    )


def _is_word(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_number(value: object, most: float = sys.float_info.max) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and 0 <= value <= most  # type: ignore[operator]


def _is_part(value: object) -> bool:
    return _is_number(value, 1.0)


def _is_level(value: object) -> bool:
    return _is_part(value) and value not in (0, 1)


def _are_parts(values: Sequence[float]) -> bool:
    return all(map(_is_part, values))


def _are_thresholds(values: Sequence[float]) -> bool:
    return not any(map(isnan, values))


_FIELDS: Mapping[str, Callable[..., bool]] = MappingProxyType(
    {
        **dict.fromkeys(("output", "rows", "engine", "graph"), _is_word),
        **dict.fromkeys(("samples", "fitted", "index"), _is_count),
        **dict.fromkeys(("shares", "risks", "bounds"), _are_parts),
        "rule": lambda rule: _is_word(rule) and rule in RULES,
        "unit": lambda unit: unit in ("sample", "token"),
        "position": lambda place: place is None or _is_count(place),
        "epsilon": _is_level,
        "delta": lambda delta: delta is None or _is_level(delta),
        "risk": _is_part,
        "cost": _is_number,
        "tau": _are_thresholds,
        "grid": lambda grid: all(map(_are_thresholds, grid)),
    }
)
"""What must hold of each field; `Promise.from_json` has looked at the others."""


def _damaged(what: str) -> UnsafeFileError:
    return UnsafeFileError(f"the promise of the exits is damaged: {what}")
