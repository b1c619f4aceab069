"""The words of an explanation, which its text and its picture share."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import PurePath
from typing import TYPE_CHECKING

from effopt.collapse import alike
from effopt.explain_records import AxisRow, CallRow, Refusal, Size
from effopt.program import Place

if TYPE_CHECKING:
    from effopt.explanation import Explanation


class Refusals:
    """The refusals of an explanation, numbered: those with one reason have one number."""

    def __init__(self, found: "Explanation") -> None:
        tried = (t.refusal for axis in found.axes for t in axis.techniques.values())
        sites = (site.refusal for axis in found.axes for site in axis.sites)
        every = [refusal for refusal in chain(found.refused, sites, tried) if refusal]
        groups = alike(every, lambda refusal: (refusal.reason, refusal.remedy))
        self._rows = groups
        self._numbers = {key: number for number, (key, _) in enumerate(groups, 1)}

    def number(self, refusal: Refusal) -> int:
        """Return the number under which a refusal is explained."""
        return self._numbers[refusal.reason, refusal.remedy]

    def rows(self) -> Iterator[tuple[int, str, str, str]]:
        """Yield the number, the reason, the place and the remedy of each."""
        for number, ((reason, remedy), refusals) in enumerate(self._rows, 1):
            places = list(dict.fromkeys(row.place for row in refusals if row.place.node))
            yield number, reason, first_of(places) if places else "", remedy


def first_of(places: Sequence[Place]) -> str:
    """Write the first of some places, and how many more there are."""
    more = f", and at {len(places) - 1} more" if len(places) > 1 else ""
    return f"{spot(places[0])}{more}"


def spot(place: Place) -> str:
    """Write a place in short: the source file without its folders."""
    operator = f" ({place.operator})" if place.operator else ""
    path = f" in {place.path}" if place.path else ""
    source = f", {PurePath(place.source).name}" if place.source else ""
    return f"{place.node}{operator}{path}{source}"


def protected(axis: AxisRow) -> str:
    """Say which tokens never leave."""
    ends = ((axis.prefix, "at the front"), (axis.suffix, "at the end"))
    return ", ".join(f"{count} {side}" for count, side in ends if count) or "none"


def outputs(axis: AxisRow) -> str:
    """Say what outputs read of the tokens."""
    picks = ", ".join(str(pick) for pick in axis.picks)
    words = [f"token {picks} picked"] if axis.picks else []
    words += ["an average over the tokens"] if axis.effects.get("pool") else []
    words += ["every token named"] if axis.emitted else []
    return ", ".join(words) or "no token by its place"


def attention(axis: AxisRow) -> str:
    """Say which tokens see which."""
    sees = "causal" if axis.causal else "every token sees all"
    return f"{sees}, {'with' if axis.padding else 'no'} padding mask"


def heads(row: CallRow) -> str:
    """Say how many heads of which width an attention call has."""
    return f"{row.heads} {'head' if row.heads == 1 else 'heads'} of {row.head_dim}"


def masked(row: CallRow) -> str:
    """Say what the mask of an attention call does."""
    return "no mask" if row.mask == "none" else f"mask: {row.mask.replace('+', ', ')}"


def over(row: CallRow) -> str:
    """Say between which tokens an attention call runs."""
    asks, asked = named(row.queries, row.queries_size), named(row.keys, row.keys_size)
    return f"{asks} to {asked}" if row.cross else asks


def named(name: str, size: Size) -> str:
    """Name a token axis, or count places that are none."""
    return name or f"{size} {'place' if size == 1 else 'places'}"
