"""Calibrated exits in the report page: a table, what is promised, and two pictures."""

from collections.abc import Sequence

from effopt.markup import Markup, join, tag
from effopt.report import StepRecord
from effopt.report_exits import COLUMNS, ExitReport, read_exits, share_text
from effopt.report_exits_svg import leaves_picture, loss_picture
from effopt.report_parts import section, table, wide


def exit_tables(steps: Sequence[StepRecord]) -> Markup:
    """Make a section for each step that calibrated exits; none for other steps."""
    return join(*map(_exits, read_exits(steps)))


def _exits(found: ExitReport) -> Markup:
    cells = (
        (
            row.name,
            tag("code", row.path) if row.path else "-",
            row.threshold_text,
            share_text(row.leaves),
            share_text(row.share),
        )
        for row in found.rows
    )
    columns = [name[:1].upper() + name[1:] for name in COLUMNS]
    said = [tag("p", tag("b", f"{name}: "), words) for name, words in found.words()]
    legend = tag(
        "p",
        tag("span", class_="key base line"),
        "its upper bound",
        tag("span", class_="key"),
        "mean loss on the calibration rows; dashed: what is allowed; dot: what was taken",
        class_="soft small",
    )
    return section(
        "Early exits",
        tag("p", tag("code", found.spec), class_="small"),
        table(columns, cells, left=2),
        tag("div", *said, class_="said"),
        wide(leaves_picture(found)),
        wide(loss_picture(found.promise)),
        legend,
    )
