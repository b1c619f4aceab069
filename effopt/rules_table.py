"""The rules as a table to read: what each family of operators does to axes and along tokens."""

from dataclasses import dataclass
from typing import Any

from effopt.axis_table import FAMILIES, UNKNOWABLE
from effopt.effect_rules import Along, Always
from effopt.effects import EFFECTS

TAGGED = {"pointwise": ("and all that torch tags as pointwise",)}
"""What a family has beside the operators that it lists."""


@dataclass(frozen=True)
class RuleRow:
    """One family: its operators, what its rule does to axes, and its effect along tokens."""

    family: str
    operators: tuple[str, ...]
    axes: str
    effect: str


def rules() -> tuple[RuleRow, ...]:
    """Return a row for each family, and one for each reason why operators have no rule."""
    known = (
        RuleRow(name, (*_names(targets), *TAGGED.get(name, ())), _first_line(rule), _effect(name))
        for name, (rule, targets) in FAMILIES.items()
    )
    unknown = (
        RuleRow("", _names(targets), f"unknown: {reason}", "order")
        for reason, targets in UNKNOWABLE.items()
    )
    return (*known, *unknown)


def _names(targets: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the names of operators, without namespace and overload, each once."""
    packets = (getattr(target, "overloadpacket", target) for target in targets)
    return tuple(dict.fromkeys(packet.__name__ for packet in packets))


def _first_line(rule: object) -> str:
    return (rule.__doc__ or "").partition("\n")[0]


def _effect(family: str) -> str:
    """Say what a family does along tokens: the first line of its rule, or where it is order."""
    row = EFFECTS.get(family)
    if row is None:
        return "order: it has no rule along tokens"
    if isinstance(row, Along):
        return f"map, or order: {row.reason}"
    return f"order: {row.reason}" if isinstance(row, Always) else _first_line(row)
