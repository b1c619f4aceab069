"""What new data say of exits, in words."""

import textwrap
from typing import TYPE_CHECKING

from effopt.plain import clean
from effopt.report_exits import per_cent, share_text
from effopt.report_text import plain_table

if TYPE_CHECKING:
    from effopt.exit_verify import ExitCheck

_WIDTH = 80
_COLUMNS = ("exit", "rows", "share", "when calibrated")
_VERDICTS = {
    "confirmed": "by these rows alone, the loss is at most {limit} with {level} confidence",
    "not contradicted": "these rows alone show neither that the loss is at most {limit} nor that "
    "the promise is broken; more of them would tell",
    "contradicted": "the loss is above what the promise leaves open",
}


def exit_text(check: "ExitCheck") -> str:
    """Write where rows left, what they lost, and what became of the promise."""
    pairs = enumerate(zip(check.leaves, check.promise.shares, strict=True), 1)
    rows = [_row(check, place, count, share) for place, (count, share) in pairs]
    title = f"Exits on {check.samples} samples of {clean(check.data)}"
    found, unit = check.found, check.promise.unit
    limit, level = per_cent(found.epsilon), f"{1 - found.delta:.0%}"
    bounds = f"{per_cent(found.lower)} to {per_cent(found.upper)}, each with {level} confidence"
    lines = [
        f"average exit: {check.mean_exit:.2f} of {len(check.leaves)}",
        f"promise: {check.promise.words()}",
        f"mean loss: {per_cent(found.mean)} of {found.samples} {unit}s; bounds {bounds}",
        f"{check.verdict}: {_VERDICTS[check.verdict].format(limit=limit, level=level)}",
        *([_OTHER] if check.shifted else []),
        "note: this holds for new rows only, that have neither fitted nor calibrated these exits",
    ]
    filled = (textwrap.fill(line, _WIDTH, subsequent_indent="  ") for line in lines)
    return "\n".join([plain_table(title, _COLUMNS, rows, _WIDTH), *filled]) + "\n"


_OTHER = "note: * is more than chance: these rows are others than those that calibrated"


def _row(check: "ExitCheck", place: int, count: int, share: float) -> list[str]:
    return [
        "end" if place == len(check.leaves) else str(place),
        str(count),
        share_text(count / check.samples) + (" *" if place in check.shifted else ""),
        share_text(share),
    ]


def why_contradicted(check: "ExitCheck") -> str:
    """Say what contradicts the promise."""
    found, data = check.found, clean(check.data)
    return (
        f"the promise of the exits is contradicted: on {check.samples} samples of {data} the mean "
        f"loss is {per_cent(found.mean)}, with {1 - found.delta:.0%} confidence above "
        f"{per_cent(found.lower)}, and at most {per_cent(check.allowed)} would keep the promise"
    )
