"""The picture of an explanation: a lane for each token axis, a box for each attention call."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

from effopt.explain_records import AxisRow, CallRow, SiteRow
from effopt.explain_words import Refusals, attention, heads, masked, named, outputs, over, protected
from effopt.markup import Child, Markup, join, tag
from effopt.plain import clean, count_text, shorten

if TYPE_CHECKING:
    from effopt.explanation import Explanation

_WIDTH, _RIM, _GAP = 900.0, 28.0, 28.0
_LANES = 3
"""How many lanes stand side by side; more go below."""

_STREAM, _BOX = 12.0, 32.0
"""How far right of a lane's edge its residual stream and its boxes are."""

_LINE, _STEP = 17.0, 16.0
"""The height of a line of text, and the gap between two boxes."""

_CHARACTER = 6.9
"""The width that a character of the largest small text is given, so that none overlap."""

_STYLE = Markup(
    "<style>"
    ":root{color-scheme:light dark;--ink:#1d1f23;--soft:#656a73;--line:#b9bec7;--card:#f4f5f7;"
    "--page:#fff;--good:#1c8a4a;--bad:#c0362c;--exit:#2a66d9}"
    "@media (prefers-color-scheme:dark){:root{--ink:#e9eaec;--soft:#9aa0aa;--line:#4b525d;"
    "--card:#1f2328;--page:#131518;--good:#5fd08f;--bad:#f0837a;--exit:#6b9cf5}}"
    "text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,Arial,sans-serif;fill:var(--ink)}"
    ".title{font-size:19px;font-weight:650}.lane{font-size:15px;font-weight:650}"
    ".soft{fill:var(--soft)}.number{font-weight:650}.bad{fill:var(--bad);font-weight:650}"
    ".page{fill:var(--page)}.box{fill:var(--card);stroke:var(--line)}"
    ".cross{stroke-dasharray:4 3}.end{fill:none;stroke:var(--line)}"
    ".stream{stroke:var(--line);stroke-width:3}.site{fill:var(--good)}"
    ".refused{fill:var(--page);stroke:var(--bad);stroke-width:2.5}"
    ".none{fill:var(--page);stroke:var(--line);stroke-width:2.5}.exit{fill:var(--exit)}"
    "</style>"
)


@dataclass(frozen=True)
class _Lane:
    """One column of boxes: the calls whose queries are the tokens of an axis (None: of no axis)."""

    axis: AxisRow | None
    calls: tuple[CallRow, ...]


def render(found: "Explanation") -> str:
    """Draw an explanation as one SVG file that needs nothing else."""
    return str(_Picture(found).draw())


def _text(x: float, y: float, words: Child, kind: str = "", anchor: str | None = None) -> Markup:
    return tag("text", words, x=x, y=y, class_=kind or None, text_anchor=anchor)


class _Picture:
    """A drawing from top to bottom."""

    def __init__(self, found: "Explanation") -> None:
        self.found = found
        self.refusals = Refusals(found)
        self.exits = {row.block: row for row in found.exits}

    def draw(self) -> Markup:
        """Draw the title, the lanes, the reasons and the legend."""
        parts, y = [self._title()], 74.0
        lanes = _lanes(self.found)
        for start in range(0, len(lanes), _LANES):
            row = lanes[start : start + _LANES]
            width = (_WIDTH - 2 * _RIM - _GAP * (len(row) - 1)) / len(row)
            edges = [_RIM + place * (width + _GAP) for place in range(len(row))]
            drawn = [self._lane(lane, x, y, width) for lane, x in zip(row, edges, strict=True)]
            parts += [markup for markup, _ in drawn]
            y = max(foot for _, foot in drawn) + 34
        if not lanes:
            parts.append(_text(_RIM, y, "No attention call is known.", "soft"))
            y += 34
        reasons, y = self._reasons(y)
        parts += [*reasons, _legend(y + 8)]
        return _page(y + 34, f"{self.found.model}: blocks and sites", parts)

    def _title(self) -> Markup:
        count = count_text(self.found.parameters, "").strip()
        facts = (
            f"{count} parameters, {self.found.operators} operators, "
            f"{self.found.attention} attention calls"
        )
        most = int((_WIDTH - 2 * _RIM) / 11)
        name = _text(_RIM, 36, shorten(clean(self.found.model), most), "title")
        return join(name, _text(_RIM, 56, facts, "soft"))

    def _lane(self, lane: _Lane, x: float, y: float, width: float) -> tuple[Markup, float]:
        """Draw one lane and return where it ends."""
        parts, most = list[Markup](), int(width / _CHARACTER)
        for kind, words in self._heading(lane):
            y += _LINE + 3 * (kind == "lane")
            room = int(most * 0.66) if kind == "lane" else most
            parts.append(_text(x, y, shorten(clean(words), room), kind))
        y += 14
        top = y + 12
        ends = [] if lane.axis is None else [_end(f"from {_origin(lane.axis)}", x, y, width)]
        y += (24 + _STEP) * len(ends)
        sites = {site.block: site for site in lane.axis.sites} if lane.axis else {}
        for call in lane.calls:
            markup, height = self._block(call, sites.get(call.block), x, y, width)
            parts.append(markup)
            y += height + _STEP
        if lane.axis is None:
            return tag("g", *parts), y - _STEP
        ends.append(_end(outputs(lane.axis), x, y, width))
        line = tag("line", x1=x + _STREAM, x2=x + _STREAM, y1=top, y2=y + 12, class_="stream")
        return tag("g", line, *ends, *parts), y + 24

    def _heading(self, lane: _Lane) -> Iterator[tuple[str, str]]:
        axis = lane.axis
        if axis is None:
            yield "lane", "other attention"
            yield "soft", "over places that are no token axis"
            return
        yield "lane", axis.name
        yield "soft", f"{axis.size} tokens, protected: {protected(axis)}"
        yield "soft", attention(axis)
        for name, tried in axis.techniques.items():
            number = tried.refusal and self.refusals.number(tried.refusal)
            yield "soft", f"{name}: {f'no, see {number}' if number else 'possible'}"

    def _block(
        self, call: CallRow, site: SiteRow | None, x: float, y: float, width: float
    ) -> tuple[Markup, float]:
        """Draw one attention call: its box, its site on the stream, and the exit behind it."""
        lines = [
            f"{call.block}  {call.place.path or call.place.node}",
            f"{_between(call)}{heads(call)}, {masked(call)}",
        ]
        inside = width - _BOX
        single = sum(map(len, lines)) + 4 < inside / _CHARACTER
        height = _LINE + 11 if single else 2 * _LINE + 10
        room, left = int((inside - 20) / _CHARACTER), x + _BOX + 10
        first = _text(left, y + 18, shorten(clean(lines[0]), room), "number")
        spot, anchor = (x + width - 10, "end") if single else (left, None)
        second = _text(
            *(spot, y + 18 + _LINE * (not single)),
            *(shorten(clean(lines[1]), room), "soft", anchor),
        )
        kind = "box cross" if call.cross else "box"
        box = tag("rect", x=x + _BOX, y=y, width=inside, height=height, rx=6, class_=kind)
        parts = [tag("title", " ".join(lines)), box, first, second]
        if site is not None:
            parts.append(self._site(site, x + _STREAM, y + height / 2))
        if call.block in self.exits:
            parts.append(_diamond(x + _STREAM, y + height + _STEP / 2))
        return tag("g", *parts), height

    def _site(self, site: SiteRow, x: float, y: float) -> Markup:
        if site.refusal is None:
            return tag("circle", cx=x, cy=y, r=7, class_="site")
        number = self.refusals.number(site.refusal)
        ring = tag("circle", cx=x, cy=y, r=9, class_="refused")
        return tag(
            "g",
            tag("title", site.refusal.reason),
            ring,
            _text(x, y + 4, str(number), "bad", "middle"),
        )

    def _reasons(self, y: float) -> tuple[list[Markup], float]:
        """Write what the numbers stand for, below all lanes."""
        parts, most = list[Markup](), int((_WIDTH - 2 * _RIM - 26) / _CHARACTER)
        for number, *texts in self.refusals.rows():
            parts.append(_text(_RIM, y, str(number), "bad"))
            for words, kind in zip(texts, ("", "soft", "soft"), strict=True):
                for line in wrap(clean(words), most):
                    parts.append(_text(_RIM + 26, y, line, kind))
                    y += _LINE
            y += 8
        return parts, y


def _lanes(found: "Explanation") -> list[_Lane]:
    named = {axis.name for axis in found.axes}
    lanes = [
        _Lane(axis, tuple(call for call in found.calls if call.queries == axis.name))
        for axis in found.axes
    ]
    rest = tuple(call for call in found.calls if call.queries not in named)
    return [*lanes, *([_Lane(None, rest)] if rest else [])]


def _between(call: CallRow) -> str:
    """Say what the lane does not: which tokens are asked, if they are others."""
    if not call.queries:
        return f"{over(call)}, "
    return f"to {named(call.keys, call.keys_size)}, " if call.cross else ""


def _origin(axis: AxisRow) -> str:
    return axis.made_by.path or axis.made_by.node or "the inputs"


def _end(words: str, x: float, y: float, width: float) -> Markup:
    """Draw where a stream comes from or goes to."""
    inside = width - _BOX
    line = shorten(clean(words), int((inside - 20) / _CHARACTER))
    return tag(
        "g",
        tag("title", words),
        tag("rect", x=x + _BOX, y=y, width=inside, height=24.0, rx=12, class_="end"),
        tag("line", x1=x + _STREAM, x2=x + _BOX, y1=y + 12, y2=y + 12, class_="stream"),
        _text(x + _BOX + 12, y + 16, line, "soft"),
    )


def _diamond(x: float, y: float) -> Markup:
    return tag("path", d=f"M{x:g} {y - 6:g}l6 6-6 6-6-6z", class_="exit")


def _legend(y: float) -> Markup:
    """Say what the marks mean."""
    refused = tag("circle", cx=_RIM + 190, cy=y, r=7, class_="refused")
    dashed = tag("rect", x=_RIM + 645, y=y - 7, width=24, height=14, rx=4, class_="box cross")
    return tag(
        "g",
        tag("circle", cx=_RIM + 7, cy=y, r=7, class_="site"),
        _text(_RIM + 22, y + 4, "tokens may leave here", "soft"),
        refused,
        _text(_RIM + 205, y + 4, "refused, by the number above", "soft"),
        _diamond(_RIM + 410, y),
        _text(_RIM + 424, y + 4, "exit: one value carries everything", "soft"),
        dashed,
        _text(_RIM + 678, y + 4, "cross-attention", "soft"),
    )


def _page(height: float, name: str, parts: Sequence[Markup]) -> Markup:
    return tag(
        "svg",
        _STYLE,
        tag("rect", width=_WIDTH, height=height, class_="page"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH:.0f} {height:.0f}",
        width=_WIDTH,
        height=height,
        role="img",
        aria_label=name,
    )
