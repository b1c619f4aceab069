"""Quantized layers in the report page: each layer, its group, and what stays in float."""

from collections.abc import Sequence

from effopt.markup import Child, Markup, join, tag
from effopt.plain import bytes_text
from effopt.report import StepRecord
from effopt.report_layers import (
    CAPTION,
    KINDS,
    LEAST,
    GroupRow,
    LayerRow,
    Layers,
    error_text,
    read_layers,
    worst_error,
)
from effopt.report_parts import folded, section, table


def layer_tables(steps: Sequence[StepRecord]) -> Markup:
    """Make a section for each step that put layers on integer weights; none for other steps."""
    return join(*map(_layers, read_layers(steps)))


def _layers(layers: Layers) -> Markup:
    """Show each layer, the groups of layers that share scales, and what stays in float."""
    counts = [
        (words, str(len(rows)), error_text(worst_error(rows))) for words, rows in layers.counts
    ]
    counts += [(f"float: {reason}", str(len(paths)), "-") for reason, paths in layers.left]
    top = max([LEAST, *(row.error for row in layers.rows if row.error is not None)])
    columns = ("Layer", "Size", "Weights", "Measured on", "", "Error")
    rows = [_layer_cells(row, top) for row in layers.rows]
    return section(
        "Quantized layers",
        tag("p", tag("code", layers.spec), class_="small"),
        table(("Weights", "Layers", "Largest error"), counts),
        _sizes(layers),
        folded(f"{len(rows)} layers", table(columns, rows, left=5)),
        _groups(layers.groups),
        _left(layers),
        tag("p", f"{CAPTION}.", class_="soft small"),
    )


def _sizes(layers: Layers) -> Markup:
    if not layers.sizes:
        return Markup()
    rows = (
        (row.what, bytes_text(row.before), bytes_text(row.after), row.share) for row in layers.sizes
    )
    return table(("Weights of", "Before", "After", "Share"), rows)


def _layer_cells(row: LayerRow, top: float) -> tuple[Child, ...]:
    share = 0.0 if row.error is None else row.error / top
    bar = tag("rect", x=0, y=2, width=100 * share, height=8, rx=2, class_="bar")
    return (
        tag("code", row.path),
        f"{row.inputs} → {row.outputs}",
        row.weights,
        row.measured_on or "-",
        tag("svg", bar, viewBox="0 0 100 12", width=100, height=12, aria_hidden="true"),
        error_text(row.error),
    )


def _groups(groups: Sequence[GroupRow]) -> Markup:
    if not groups:
        return Markup()
    columns = ("Layers", "Scales taken up by", "", "Chosen", "Loss left")
    rows = (
        (
            _codes(group.linears),
            _codes(group.producers) if group.producers else "-",
            KINDS.get(group.kind, group.kind),
            group.setting or "-",
            group.gain,
        )
        for group in groups
    )
    return folded(
        f"{len(groups)} groups that share the scales of their input channels",
        table(columns, rows, left=4),
        tag("p", "Loss left: of that with no scale, on calibration data.", class_="soft small"),
    )


def _left(layers: Layers) -> Markup:
    if not layers.left:
        return Markup()
    count = sum(len(paths) for _, paths in layers.left)
    rows = ((reason, _codes(paths)) for reason, paths in layers.left)
    return folded(f"{count} layers in float", table(("Reason", "Layers"), rows, left=2))


def _codes(paths: Sequence[str]) -> Markup:
    return join(*(tag("div", tag("code", path)) for path in paths))
