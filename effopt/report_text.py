"""A report as plain text: tables that read well at 80 columns."""

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from effopt.plain import (
    bytes_text,
    change_text,
    clean,
    clean_lines,
    count_text,
    figure,
    shorten,
    time_text,
)
from effopt.report import Latency, Quality, StepRecord
from effopt.report_exits import COLUMNS, ExitReport, read_exits, share_text
from effopt.report_layers import CAPTION, Layers, error_text, read_layers, some, worst_error

if TYPE_CHECKING:
    from effopt.report import Report

Row = Sequence[str]

_LEAST = 8
"""The least width of a column of words."""

_WORST = 5
"""How many layers of the largest errors are named."""

_PATH = 40
"""The most characters of a layer's path."""


def render(report: "Report", width: int) -> str:
    """Write the report as text of at most `width` columns."""
    return _written(_parts(report), width)


def plain_table(title: str, columns: Row, rows: Iterable[Row], width: int = 80) -> str:
    """Write a table of words as text of at most `width` columns."""
    made = table("", columns, rows, left=len(columns))
    return _written([Text(f"{title}\n"), made], width)


def _written(parts: Iterable[RenderableType], width: int) -> str:
    sink = io.StringIO()
    console = Console(file=sink, width=width, color_system=None, force_terminal=False)
    for part in parts:
        console.print(part)
    lines = (line.rstrip() for line in sink.getvalue().split("\n"))
    return clean_lines("\n".join(lines).strip("\n")) + "\n"


def table(title: str, columns: Row, rows: Iterable[Row], left: int = 1, wrap: Row = ()) -> Table:
    """Make a table: the first `left` columns are words, the rest are figures set to the right.

    Words wrap where the width is short, and so do the figures of the columns named in `wrap`.
    """
    made = Table(
        title=Text(title, style="bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    for place, name in enumerate(columns):
        figures = place >= left
        made.add_column(
            name,
            justify="right" if figures else "left",
            no_wrap=figures and name not in wrap,
            overflow="fold",
            min_width=None if figures else min(_LEAST, len(name)),
        )
    for row in rows:
        made.add_row(*(Text(clean_lines(cell)) for cell in row))
    return made


def _parts(report: "Report") -> Iterable[RenderableType]:
    yield Text(f"{clean(report.model) or 'model'} for {clean(report.target)}", style="bold")
    if report.recipe:
        yield Text(f"recipe: {clean(report.recipe)}")
    yield from (Text(line) for line in _summary(report))
    if report.pending:
        yield Text(f"pending: {clean(report.pending)}")
    yield Text("")
    tables = [_latency(report.latency), _quality(report.quality), _steps(report.steps)]
    for layers in read_layers(report.steps):
        tables += [_weights(layers), _sizes(layers), _worst(layers)]
    for made in tables:
        if made.row_count:
            yield made
            yield Text("")
    for found in read_exits(report.steps):
        yield from (_exits(found), _exit_words(found), Text(""))
    yield from (Text(f"note: {clean(note)}") for note in report.notes)
    yield Text("")
    yield Text(_footer(report), style="dim")


def _summary(report: "Report") -> Iterable[str]:
    if report.macs_before:
        before, after = (count_text(m, "MACs") for m in (report.macs_before, report.macs_after))
        change = change_text(report.macs_before, report.macs_after)
        yield f"work:   {before} -> {after} a sample ({change})"
    for row in report.estimates:
        before, after = time_text(row.before_ms), time_text(row.after_ms)
        batch = f"batch {row.batch}" if row.batch else "a call"
        yield f"least:  {before} -> {after} ms, {batch} (roofline: an estimate, not measured)"
    if report.weight_bytes:
        size = sum(report.files.values())
        folder = f", folder {bytes_text(size)}" if size else ""
        yield f"memory: weights {bytes_text(report.weight_bytes)}{folder}"


def _latency(rows: Sequence[Latency]) -> Table:
    """Make the table of times; where calls differ by input, of their mean and their tail."""
    times = _differing if has_means(rows) else _steady
    cells = ((row.variant, str(row.batch), *times(row).values(), speedup_text(row)) for row in rows)
    head = ("variant", "batch", *(times(rows[0]) if rows else ()), "speed-up")
    made = table("Latency, ms a call", head, cells, wrap=head[-1:])
    made.caption = Text(latency_caption(rows))
    made.caption_justify = "left"
    return made


def _steady(row: Latency) -> dict[str, str]:
    return {
        "median": time_text(row.median_ms),
        "middle half": f"{time_text(row.low_ms)}..{time_text(row.high_ms)}",
        "p90": time_text(row.p90_ms),
        "p99": time_text(row.p99_ms),
    }


def _differing(row: Latency) -> dict[str, str]:
    """Leave out the middle half, for which there is no room; the page has it."""
    return {
        "mean": time_or_none(row.mean_ms),
        "median": time_text(row.median_ms),
        "p95": time_or_none(row.p95_ms),
        "p99": time_text(row.p99_ms),
    }


def has_means(rows: Sequence[Latency]) -> bool:
    """Tell whether calls differed by input, so that the mean says what one costs."""
    return any(row.mean_ms is not None for row in rows)


def time_or_none(milliseconds: float | None) -> str:
    """Write milliseconds; "-" where there are none."""
    return "-" if milliseconds is None else time_text(milliseconds)


def speedup_text(row: Latency, between: str = "..") -> str:
    """Write `1.52x (1.47..1.58)`; "baseline" for the variant that the others are held against."""
    if row.speedup is None:
        return "baseline"
    interval = f" ({figure(row.speedup_low)}{between}{figure(row.speedup_high)})"
    return f"{figure(row.speedup)}x" + (interval if row.speedup_low is not None else "")


def latency_caption(rows: Sequence[Latency]) -> str:
    """Say how the times were taken; "" where there are none."""
    if not rows:
        return ""
    repeats = sorted({row.repeats for row in rows})
    calls = str(repeats[0]) if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
    threads = ", ".join(str(count) for count in sorted({row.threads for row in rows}))
    bases = sorted({clean(row.baseline) for row in rows if row.baseline})
    what = "speed-up of means" if has_means(rows) else "speed-up"
    over = f"; {what} over {', '.join(bases)}, median of rounds, 95 % interval" if bases else ""
    return f"{calls} calls each, interleaved, {threads} thread(s){over}"


def _quality(rows: Sequence[Quality]) -> Table:
    cells = (
        (row.metric, row.data or "-", figure(row.value, 5), bounds_text(row), str(row.samples))
        for row in rows
    )
    return table("Quality", ("metric", "measured on", "value", "bounds", "samples"), cells, left=2)


def bounds_text(row: Quality, between: str = "..") -> str:
    """Write the bounds of a figure of quality: `0.971..0.998`, `>= 0.98`, or "-"."""
    low, high = figure(row.low, 5), figure(row.high, 5)
    if row.low is None and row.high is None:
        return "-"
    if row.high is None:
        return f">= {low}"
    return f"<= {high}" if row.low is None else f"{low}{between}{high}"


def _steps(rows: Sequence[StepRecord]) -> Table:
    cells = (
        (
            row.spec,
            "\n".join(clean(words) for words in step_words(row)),
            f"{row.nodes_before} -> {row.nodes_after}" if row.nodes_before else "-",
            f"{row.seconds:.1f}",
        )
        for row in rows
    )
    return table("Steps", ("pass", "what it did", "nodes", "s"), cells, left=2)


def step_words(row: StepRecord) -> list[str]:
    """Say what a step did: its notes, or why it was skipped, or that nothing was to be done."""
    if row.skipped:
        return [f"skipped: {row.skipped}", *row.notes]
    return list(row.notes) or ["changed the graph" if row.changed else "nothing to do"]


def _weights(layers: Layers) -> Table:
    cells = [
        (words, str(len(rows)), error_text(worst_error(rows))) for words, rows in layers.counts
    ]
    cells += [
        (f"float: {clean(reason)}\n{shorten(clean(some(paths)), 2 * _PATH)}", f"{len(paths)}", "-")
        for reason, paths in layers.left
    ]
    return table(f"Layers of {clean(layers.spec)}", ("weights", "layers", "largest error"), cells)


def _sizes(layers: Layers) -> Table:
    cells = (
        (row.what, bytes_text(row.before), bytes_text(row.after), row.share) for row in layers.sizes
    )
    return table("Sizes", ("weights of", "before", "after", "share"), cells)


def _worst(layers: Layers) -> Table:
    cells = (
        (
            shorten(clean(row.path), _PATH),
            f"{row.inputs} -> {row.outputs}",
            clean(row.measured_on) or "-",
            error_text(row.error),
        )
        for row in layers.worst(_WORST)
    )
    made = table("Largest errors", ("layer", "size", "measured on", "error"), cells, left=3)
    made.caption = Text(CAPTION)
    made.caption_justify = "left"
    return made


def _exits(found: ExitReport) -> Table:
    cells = (
        (
            row.name,
            shorten(clean(row.path), _PATH) or "-",
            row.threshold_text,
            share_text(row.leaves),
            share_text(row.share),
        )
        for row in found.rows
    )
    return table(f"Exits of {clean(found.spec)}", COLUMNS, cells, left=2)


def _exit_words(found: ExitReport) -> Table:
    """Write names and sentences side by side, so that a long sentence stays in its column."""
    made = Table.grid(padding=(0, 2))
    for name, words in found.words():
        made.add_row(Text(f"{name}:"), Text(clean(words)))
    return made


def _footer(report: "Report") -> str:
    total = sum(stage.seconds for stage in report.stages)
    parts = [f"effopt {report.version}"] if report.version else []
    parts += [f"{clean(key)} {clean(value)}" for key, value in report.environment.items()]
    parts += [f"peak memory {figure(report.peak_rss_mb)} MiB"] if report.peak_rss_mb else []
    return ", ".join(parts + ([f"{total:.1f} s in all"] if total else []))
