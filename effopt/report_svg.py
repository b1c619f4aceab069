"""The pictures of a report: plain SVG, coloured by the classes of the page's style sheet."""

from collections.abc import Sequence
from dataclasses import dataclass

from effopt.markup import Markup, join, tag
from effopt.plain import figure, shorten, time_text
from effopt.report import Latency, Stage

WIDTH = 860.0
LABEL = 190.0
_VALUE = 150.0
ROW = 30.0
BAR = 16.0
PLOT = WIDTH - LABEL - _VALUE
TALL = 190.0
_MOST_LABELS = 26


@dataclass(frozen=True)
class Site:
    """A place where tokens leave: how many come in and how many go on."""

    path: str
    before: int
    after: int


def picture(name: str, height: float, *parts: Markup) -> Markup:
    """Make a picture as wide as the page; `name` is what is read out in its place."""
    box = f"0 0 {WIDTH:.0f} {height:.0f}"
    return tag("svg", *parts, class_="picture", viewBox=box, role="img", aria_label=name)


def text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> Markup:
    """Write words at a place, coloured by their kind."""
    return tag("text", words, x=x, y=y, class_=kind, text_anchor=anchor)


def latency_picture(rows: Sequence[Latency]) -> Markup:
    """Draw one group of bars a batch size, each on its own scale from zero."""
    parts, top = list[Markup](), 0.0
    for batch in sorted({row.batch for row in rows}):
        group = [row for row in rows if row.batch == batch]
        parts.append(text(0.0, top + 16, f"batch {batch}", "group"))
        parts += [
            _latency_bar(row, _scale(group), top + 26 + ROW * n) for n, row in enumerate(group)
        ]
        top += 26 + ROW * len(group) + 18
    return picture("latency of each variant at each batch size", top - 12, *parts)


def typical(row: Latency) -> float:
    """Return the mean where calls differ by input, as its speed-up is of means, or the median."""
    return row.median_ms if row.mean_ms is None else row.mean_ms


def _scale(rows: Sequence[Latency]) -> float:
    """Return pixels a millisecond, so that the longest bar and its whisker fit."""
    return PLOT / max(max(typical(row), row.high_ms) for row in rows or ()) if rows else 1.0


def _latency_bar(row: Latency, scale: float, top: float) -> Markup:
    middle = top + BAR / 2
    end = LABEL + max(typical(row), row.high_ms) * scale
    words = f"{time_text(typical(row))} ms"
    gain = f"{figure(row.speedup)}×" if row.speedup is not None else ""  # noqa: RUF001
    half = f"{time_text(row.low_ms)} to {time_text(row.high_ms)}"
    full = f"{row.variant}: {words}, middle half {half} ms"
    low, high = (LABEL + edge * scale for edge in (row.low_ms, row.high_ms))
    return tag(
        "g",
        tag("title", full),
        text(LABEL - 12, middle + 4.5, shorten(row.variant, 24), "name", "end"),
        bar(LABEL, top, typical(row) * scale, "bar" if row.baseline else "bar base"),
        tag("line", x1=low, x2=high, y1=middle, y2=middle, class_="whisker"),
        *(
            tag("line", x1=x, x2=x, y1=middle - 4, y2=middle + 4, class_="whisker")
            for x in (low, high)
        ),
        tag(
            "text",
            words,
            tag("tspan", f"  {gain}", class_="gain") if gain else None,
            x=end + 10,
            y=middle + 4.5,
            class_="value",
        ),
    )


def bar(x: float, y: float, width: float, kind: str) -> Markup:
    """Draw a bar to the right, one pixel wide at least."""
    return tag("rect", x=x, y=y, width=max(width, 1.0), height=BAR, rx=3, class_=kind)


def stages_picture(stages: Sequence[Stage]) -> Markup:
    """Draw the seconds of each stage, in the order in which they ran."""
    longest = max(stage.seconds for stage in stages) or 1.0
    rows = [_stage_bar(s, PLOT / longest, ROW * n) for n, s in enumerate(stages)]
    return picture("seconds of each stage", ROW * len(stages), *rows)


def _stage_bar(stage: Stage, scale: float, top: float) -> Markup:
    width, middle = max(stage.seconds * scale, 1.0), top + BAR / 2
    return tag(
        "g",
        tag("title", f"{stage.name}: {stage.seconds:.2f} s"),
        text(LABEL - 12, middle + 4.5, shorten(stage.name, 24), "name", "end"),
        bar(LABEL, top, width, "bar"),
        text(LABEL + width + 10, middle + 4.5, f"{stage.seconds:.1f} s", "value"),
    )


def tokens_picture(sites: Sequence[Site]) -> Markup:
    """Draw the tokens that enter and that leave each site, on a scale from zero."""
    most = max(site.before for site in sites)
    left, right, top = 44.0, 8.0, 14.0
    step = (WIDTH - left - right) / len(sites)
    unit = TALL / most
    names = _labels([site.path for site in sites])
    every = -(-len(sites) // _MOST_LABELS)
    columns = [
        _column(site, name, left + step * n, step, unit, top, n % every == 0)
        for n, (site, name) in enumerate(zip(sites, names, strict=True))
    ]
    lines = [_level(share * most, top + TALL * (1 - share), left) for share in (0.0, 0.5, 1.0)]
    return picture("tokens at each site", top + TALL + 26, *lines, *columns)


def _level(count: float, y: float, left: float) -> Markup:
    return join(
        tag("line", x1=left, x2=WIDTH, y1=y, y2=y, class_="grid"),
        text(left - 8, y + 4, f"{count:g}", "tick", "end"),
    )


def _column(
    site: Site, name: str, x: float, step: float, unit: float, top: float, labelled: bool
) -> Markup:
    before, after = site.before, site.after
    gap, foot = step * 0.14, top + TALL
    shape = {"x": x + gap, "width": step - 2 * gap, "rx": 2}
    parts = [
        tag("title", f"{site.path}: {before} tokens in, {after} out"),
        tag("rect", y=foot - before * unit, height=before * unit, class_="bar base", **shape),
        tag("rect", y=foot - after * unit, height=after * unit, class_="bar", **shape),
    ]
    if labelled:
        parts.append(text(x + step / 2, foot + 18, name, "tick", "middle"))
    if labelled and after * unit > 24 and step > 26:
        parts.append(text(x + step / 2, foot - after * unit + 15, str(after), "inside", "middle"))
    return tag("g", *parts)


def _labels(paths: Sequence[str]) -> list[str]:
    """Cut the words that all paths share at both ends: `vit.layer.3.attention` becomes `3`."""
    words = [path.split(".") for path in paths]
    head = _shared(words)
    tail = _shared([list(reversed(word[head:])) for word in words])
    return [shorten(".".join(word[head : len(word) - tail]) or word[-1], 8) for word in words]


def _shared(words: Sequence[Sequence[str]]) -> int:
    if len(words) < 2:
        return max(len(words[0]) - 1, 0) if words else 0
    columns = zip(*words, strict=False)
    return next((n for n, column in enumerate(columns) if len(set(column)) > 1), 0)
