"""The parts that the report page is made of: sections, tables, and what the reader opens."""

from collections.abc import Iterable, Sequence

from effopt.markup import Child, Markup, tag


def section(title: str, *parts: Child) -> Markup:
    """Make a section of the page."""
    return tag("section", tag("h2", title), *parts)


def wide(part: Markup) -> Markup:
    """Let a picture or a table scroll sideways in a narrow window."""
    return tag("div", part, class_="wide")


def table(columns: Sequence[str], rows: Iterable[Sequence[Child]], left: int = 1) -> Markup:
    """Make a table; the first `left` columns are words, the rest figures set to the right."""
    kinds = ["word" if n < left else "figure" for n in range(len(columns))]
    head = [
        tag("th", name, class_=kind, scope="col") for name, kind in zip(columns, kinds, strict=True)
    ]
    body = [
        tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)))
        for row in rows
    ]
    return wide(tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body)))


def folded(title: str, *parts: Markup) -> Markup:
    """Hide parts until the reader opens them."""
    return wide(tag("details", tag("summary", title), *parts))
