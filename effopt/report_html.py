"""A report as one self-contained HTML page: no script, no network, everything escaped."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from effopt.markup import Markup, island, join, tag
from effopt.plain import bytes_text, change_text, count_text, figure, time_text
from effopt.report import Latency, Quality, StepRecord
from effopt.report_exits_html import exit_tables
from effopt.report_layers_html import layer_tables
from effopt.report_parts import section, table, wide
from effopt.report_style import STYLE
from effopt.report_svg import Site, latency_picture, stages_picture, tokens_picture
from effopt.report_text import (
    bounds_text,
    has_means,
    latency_caption,
    speedup_text,
    step_words,
    time_or_none,
)

if TYPE_CHECKING:
    from effopt.report import Report

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What the browser may load for the page: nothing but the style sheet inside it."""


def render(report: "Report") -> str:
    """Write the page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{report.model} for {report.target}: effopt report"),
        Markup(f"<style>{STYLE}</style>"),
    )
    sections = (
        _latency(report.latency),
        _quality(report.quality),
        _steps(report.steps),
        _tokens(report.steps),
        exit_tables(report.steps),
        layer_tables(report.steps),
        _stages(report),
        _files(report),
        _environment(report),
    )
    main = tag("main", _title(report), _tiles(report), _messages(report), *sections)
    body = tag("body", main, _footer(report), island(report.to_json()))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _title(report: "Report") -> Markup:
    return tag(
        "header",
        tag("p", "effopt report", class_="kicker"),
        tag("h1", report.model or "model", tag("span", " for ", class_="soft"), report.target),
        tag("p", "Recipe ", tag("code", report.recipe)) if report.recipe else None,
    )


def _tiles(report: "Report") -> Markup:
    tiles = [*_gain_tile(report.latency), *_work_tiles(report), *_quality_tile(report.quality)]
    return tag("div", *tiles, class_="tiles") if tiles else Markup()


def _tile(name: str, value: str, detail: str) -> Markup:
    return tag(
        "div",
        tag("p", name, class_="soft"),
        tag("p", value, class_="big"),
        tag("p", detail, class_="soft small"),
        class_="tile",
    )


def _gain_tile(rows: Sequence[Latency]) -> Iterable[Markup]:
    """Show the last speed-up of the first batch size: what was made comes last, as it is used."""
    for row in [row for row in rows if row.speedup is not None and row.batch == rows[0].batch][-1:]:
        interval = f"{figure(row.speedup_low)} to {figure(row.speedup_high)}"
        value = f"{figure(row.speedup)}×"  # noqa: RUF001
        yield _tile("Speed-up", value, f"{interval}, batch {row.batch}, over {row.baseline}")


def _work_tiles(report: "Report") -> Iterable[Markup]:
    if report.macs_before:
        change = change_text(report.macs_before, report.macs_after)
        before = count_text(report.macs_before, "MACs")
        after = count_text(report.macs_after, "MACs")
        yield _tile("Work a sample", after, f"{change}, before {before}")
    for row in report.estimates[-1:]:
        batch = f"batch {row.batch}" if row.batch else "a call"
        detail = f"{batch}, before {time_text(row.before_ms)} ms; a roofline, not measured"
        yield _tile("Least time", f"{time_text(row.after_ms)} ms", detail)
    if report.weight_bytes:
        size = sum(report.files.values())
        detail = f"engine folder {bytes_text(size)}" if size else "in the graph"
        yield _tile("Weights", bytes_text(report.weight_bytes), detail)


def _quality_tile(rows: Sequence[Quality]) -> Iterable[Markup]:
    for row in rows[:1]:
        detail = f"{_bounds(row)}, {row.samples} samples" if row.samples else _bounds(row)
        yield _tile(row.metric[:1].upper() + row.metric[1:], figure(row.value, 5), detail)


def _messages(report: "Report") -> Markup:
    pending = tag("p", tag("b", "Pending: "), report.pending, class_="pending")
    notes = [tag("p", note, class_="note") for note in report.notes]
    return join(pending if report.pending else None, *notes)


def _latency(rows: Sequence[Latency]) -> Markup:
    if not rows:
        return Markup()
    differ = has_means(rows)
    mean, tail = (("Mean ms",), ("p95",)) if differ else ((), ())
    times = (*mean, "Median ms", "Middle half", "p90", *tail, "p99")
    columns = ("Variant", "Batch", *times, "Calls", "Speed-up")
    cells = (
        (
            row.variant,
            str(row.batch),
            *([time_or_none(row.mean_ms)] if differ else []),
            time_text(row.median_ms),
            f"{time_text(row.low_ms)} to {time_text(row.high_ms)}",
            time_text(row.p90_ms),
            *([time_or_none(row.p95_ms)] if differ else []),
            time_text(row.p99_ms),
            str(row.repeats),
            speedup_text(row, " to "),
        )
        for row in rows
    )
    bars = "Bars: means; whiskers" if differ else "Whiskers"
    words = f"{latency_caption(rows)}. {bars}: middle half of the calls."
    caption = tag("p", words, class_="soft small")
    return section("Latency", wide(latency_picture(rows)), table(columns, cells), caption)


def _quality(rows: Sequence[Quality]) -> Markup:
    if not rows:
        return Markup()
    columns = ("Metric", "Measured on", "Value", "Bounds", "Samples")
    cells = (
        (row.metric, row.data or "-", figure(row.value, 5), _bounds(row), str(row.samples))
        for row in rows
    )
    return section("Quality", table(columns, cells, left=2))


def _bounds(row: Quality) -> str:
    return bounds_text(row, " to ")


def _steps(rows: Sequence[StepRecord]) -> Markup:
    if not rows:
        return Markup()
    cells = (
        (
            tag("code", row.spec),
            _mark(row),
            join(*(tag("div", words) for words in _words(row))),
            f"{row.nodes_before} → {row.nodes_after}" if row.nodes_before else "-",
            f"{row.seconds:.2f}",
        )
        for row in rows
    )
    return section("Steps", table(("Pass", "", "What it did", "Nodes", "Seconds"), cells, left=3))


def _words(row: StepRecord) -> list[str]:
    """Say what a step did; its mark says already that it was skipped."""
    return [row.skipped, *row.notes] if row.skipped else step_words(row)


def _mark(row: StepRecord) -> Markup:
    word = "skipped" if row.skipped else "changed" if row.changed else "no-op"
    return tag("span", word, class_=f"mark {word}")


def _sites(row: StepRecord) -> list[Site]:
    """Read the sites of a step's facts, which may be any JSON; what is no site is left out."""
    found = row.facts.get("sites")
    records = [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
    counts = [(item, item.get("before"), item.get("after")) for item in records]
    return [
        Site(str(item.get("path", "")), before, after)
        for item, before, after in counts
        if isinstance(before, int) and isinstance(after, int) and 0 <= after <= before > 0
    ]


def _tokens(rows: Sequence[StepRecord]) -> Markup:
    pictures = [
        join(
            tag("p", tag("code", row.spec), class_="small"),
            wide(tokens_picture(sites)),
        )
        for row in rows
        if (sites := _sites(row))
    ]
    legend = tag(
        "p",
        tag("span", class_="key base"),
        "tokens in ",
        tag("span", class_="key"),
        "tokens out, at each site",
        class_="soft small",
    )
    return section("Tokens by block", *pictures, legend) if pictures else Markup()


def _stages(report: "Report") -> Markup:
    if not report.stages:
        return Markup()
    total = sum(stage.seconds for stage in report.stages)
    caption = tag("p", f"{total:.1f} s in all.", class_="soft small")
    return section("Time by stage", wide(stages_picture(report.stages)), caption)


def _files(report: "Report") -> Markup:
    if not report.files:
        return Markup()
    rows = ((tag("code", name), bytes_text(size)) for name, size in report.files.items())
    return section("Files", table(("File", "Size"), rows))


def _environment(report: "Report") -> Markup:
    rows = [(key, str(value)) for key, value in report.environment.items()]
    rows += [("peak memory", f"{figure(report.peak_rss_mb)} MiB")] if report.peak_rss_mb else []
    return section("Environment", table(("What", "Which"), rows, left=2)) if rows else Markup()


def _footer(report: "Report") -> Markup:
    words = f"Written by effopt {report.version}." if report.version else "Written by effopt."
    return tag("footer", words, " The same figures as JSON are in this page's last element.")
