"""An explanation as tables for a terminal."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from effopt.report_text import plain_table

if TYPE_CHECKING:
    from effopt.explanation import AxisRow, Explanation


def render(found: "Explanation", width: int) -> str:
    """Write an explanation in at most `width` columns."""
    head = f"{found.model}: {found.operators} operators, {found.attention} attention calls"
    parts = [head]
    if not found.axes:
        parts.append("no self-attention was found, so nothing counts tokens")
    for axis in found.axes:
        parts.append(_axis(axis))
        parts.append(
            plain_table("", ("block", "where", "tokens may leave"), list(_sites(axis)), width)
        )
    if found.unknown:
        rows = [(row.node, row.path or row.source, row.reason) for row in found.unknown]
        parts.append(plain_table("Not understood", ("operator", "where", "why"), rows, width))
    return "\n\n".join(part for part in parts if part)


def _axis(axis: "AxisRow") -> str:
    ends = f"{axis.prefix} at the front" + (f", {axis.suffix} at the end" if axis.suffix else "")
    lines = [
        f"{axis.name}: {axis.size} tokens, protected: {ends}",
        f"  padding mask: {'yes' if axis.padding else 'no'}",
        f"  merge-tokens: {axis.merging or 'yes'}",
        f"  prune-tokens: {axis.pruning or 'yes'}",
    ]
    return "\n".join(lines)


def _sites(axis: "AxisRow") -> Iterator[tuple[str, str, str]]:
    for site in axis.sites:
        state = "yes" if site.usable else f"no: {site.reason} ({site.node}). {site.remedy}"
        yield str(site.block), site.path, state
