"""An explanation as text for a terminal: what holds of many blocks alike is said once."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from effopt.collapse import alike, bare, braced, ranges, starred
from effopt.explain_records import (
    AxisRow,
    CallRow,
    ExitRow,
    GroupRow,
    SiteRow,
    UnknownRow,
)
from effopt.explain_words import (
    Refusals,
    attention,
    first_of,
    heads,
    masked,
    outputs,
    over,
    protected,
    spot,
)
from effopt.plain import clean, count_text
from effopt.report_text import plain_table
from effopt.rules_table import RuleRow

if TYPE_CHECKING:
    from effopt.explanation import Explanation

_INDENT = 17
"""The column at which facts begin, behind their names."""

_SHOWN = 3
"""How many operators of a family are named."""

_KINDS = {
    "folded": "folded",
    "tied": "folded and tied",
    "mul": "by a multiplication",
    "none": "without scales",
}
"""How the scales of a group are taken up."""

Entry = tuple[str, Sequence[str]]
"""A name at the left and the lines beside it."""

Numbered = SiteRow | CallRow | ExitRow


def render(found: "Explanation", width: int) -> str:
    """Write an explanation in at most `width` columns."""
    refusals = Refusals(found)
    parts = [
        _head(found, width),
        *(_axis(axis, refusals, width) for axis in found.axes),
        "" if found.axes else _filled("", _no_axis(found), width),
        _section("Attention calls", _calls(found), width),
        _section("Exits: behind these blocks, one value carries everything", _exits(found), width),
        _section("Groups: layers that share scales of their inputs", _groups(found.groups), width),
        _section("Operators that were not understood", _unknown(found), width),
        _reasons(refusals, width),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, entries: Iterable[Entry], width: int) -> str:
    """Write entries: each has a name at the left and lines beside it; "" where there are none."""
    lines = [
        _filled(f"  {'' if place else name}".ljust(_INDENT), words, width)
        for name, texts in entries
        for place, words in enumerate(texts)
    ]
    return "\n".join([_filled("", title, width), *lines]) if lines else ""


def _no_axis(found: "Explanation") -> str:
    known = "No token axis was found" if found.calls or found.refused else "There is no attention"
    return f"{known}: nothing is known to count tokens."


def _reasons(refusals: Refusals, width: int) -> str:
    """Write every refusal: why, where, and what to do."""
    lines = list[str]()
    for number, reason, places, remedy in refusals.rows():
        lines.append(_filled(f"{number:>3}  ", reason, width))
        lines += [_filled("     at  ", places, width)] if places else []
        lines += [_filled("     do  ", remedy, width)] if remedy else []
    return "\n".join(["Refusals", *lines]) if lines else ""


def _filled(begin: str, words: str, width: int) -> str:
    return fill(clean(words), width, initial_indent=begin, subsequent_indent=" " * len(begin))


def _head(found: "Explanation", width: int) -> str:
    count = count_text(found.parameters, "").strip()
    lines = [_filled("", found.model, width), f"  {count} parameters, {found.operators} operators"]
    for row in found.inputs:
        sizes = ", ".join(map(str, row.shape))
        lines.append(_filled("  input ", f"{row.name} [{sizes}] {row.dtype}", width))
    return "\n".join(lines)


def _axis(axis: AxisRow, refusals: Refusals, width: int) -> str:
    lines = [_filled("", f"{axis.name}: {axis.size} tokens", width)]
    for name, words in _facts(axis, refusals):
        lines.append(_filled(f"  {name}".ljust(_INDENT), words, width))
    return "\n".join(lines)


def _facts(axis: AxisRow, refusals: Refusals) -> Iterator[tuple[str, str]]:
    if axis.made_by.node:
        yield "made by", spot(axis.made_by)
    yield "protected", protected(axis)
    yield "outputs", outputs(axis)
    yield "attention", attention(axis)
    for name, tried in axis.techniques.items():
        yield name, "possible" if not tried.refusal else f"no, see {refusals.number(tried.refusal)}"
    states = alike(axis.sites, lambda s: refusals.number(s.refusal) if s.refusal else 0)
    for place, (number, sites) in enumerate(states):
        verdict = f"no, see {number}" if number else "tokens may leave"
        yield "" if place else "sites", f"{_blocks(sites)}: {verdict}"


def _blocks(rows: Sequence[Numbered]) -> str:
    numbers = ranges(row.block for row in rows)
    return f"block{'s' if len(rows) > 1 else ''} {numbers}"


def _calls(found: "Explanation") -> Iterator[Entry]:
    for (_, facts), rows in alike(found.calls, _call_key):
        paths = starred([row.place.path or row.place.node for row in rows])
        yield _blocks(rows), (paths, facts)


def _call_key(row: CallRow) -> tuple[str, str]:
    path = bare(row.place.path) or row.place.operator
    return path, f"{over(row)}, {heads(row)}, {masked(row)}"


def _exits(found: "Explanation") -> Iterator[Entry]:
    groups = alike(found.exits, lambda row: (bare(row.place.path), row.place.operator))
    for (_, operator), rows in groups:
        shares = [f"{100 * row.share:.0f} %" for row in rows if row.share is not None]
        path = starred([row.place.path or row.place.node for row in rows])
        work = (f"{_span(shares)} of the work is done by then",) if shares else ()
        yield _blocks(rows), (f"{path} ({operator})", *work)
    if early := [row.block for row in found.exits[:-1]]:
        thirds = sorted({early[len(early) // 3], early[2 * len(early) // 3]})
        cuts = ",".join(map(str, thirds))
        yield "in a recipe", (f"exit-early{{cuts=[{cuts}]}}, or cuts=N to spread N of them",)
    if found.calls and not found.exits:
        yield "none", ("several values are needed behind every block",)


def _span(shares: Sequence[str]) -> str:
    few = len(shares) < _INDENT // 2
    return ", ".join(shares) if few else f"{', '.join(shares[:2])}, ... {shares[-1]}"


def _groups(groups: Sequence[GroupRow]) -> Iterator[Entry]:
    if groups:
        kinds = alike(groups, lambda row: row.kind)
        yield "in all", (", ".join(f"{len(rows)} {_KINDS[kind]}" for kind, rows in kinds),)
    for _, rows in alike(groups, _group_key):
        layers = _columns([row.linears for row in rows])
        read = starred([row.source.path or row.source.node for row in rows])
        yield f"{len(rows)} x", (layers, f"read {rows[0].family} {read}", _taken_up(rows))


def _group_key(row: GroupRow) -> tuple[Hashable, ...]:
    path = bare(row.source.path) or row.source.operator
    linears, producers = (tuple(map(bare, paths)) for paths in (row.linears, row.producers))
    return row.kind, row.family, path, linears, producers, row.channels, row.scales


def _taken_up(rows: Sequence[GroupRow]) -> str:
    """Say who takes the scales of some groups alike up."""
    row = rows[0]
    if not row.producers:
        more = f", and {len(rows) - 1} more alike" if len(rows) > 1 else ""
        return _KINDS[row.kind] + (f": {row.pinned}{more}" if row.pinned else "")
    tied = f"{row.scales} scales for {row.channels} channels, " if row.kind == "tied" else ""
    return f"{tied}folded into {_columns([row.producers for row in rows])}"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    return braced([starred(list(column)) for column in zip(*rows, strict=True)])


def _unknown(found: "Explanation") -> Iterator[Entry]:
    def key(row: UnknownRow) -> tuple[str, str, str]:
        return bare(row.place.path), row.place.operator, row.reason

    for (_, _, reason), rows in alike(found.unknown, key):
        yield f"{len(rows)} x", (reason, f"at {first_of([row.place for row in rows])}")


def rules_text(rows: Sequence[RuleRow]) -> str:
    """Write the table of families."""
    cells = [
        (row.family or "-", _few(row.operators), f"{row.axes}\n  tokens: {row.effect}")
        for row in rows
    ]
    return plain_table("Axis rules", ("family", "operators", "to axes, along tokens"), cells)


def _few(operators: Sequence[str]) -> str:
    more = len(operators) - _SHOWN
    return ", ".join(operators[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
