"""What the facts of a step say of calibrated exits, read with care, and its words.

The facts are `{"promise": Promise.to_json(), "exits": [{"path", "block", "share"}, ...]}`. A report
may come from a stranger, so they may be any JSON: a promise that is damaged is left out, and what
is no figure of an exit is None. Free of torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effopt.errors import UnsafeFileError
from effopt.plain import figure
from effopt.promise import Promise
from effopt.report import StepRecord

COLUMNS = ("block", "where", "threshold", "rows that leave", "work so far")

_MOST = 1 << 53


@dataclass(frozen=True)
class ExitRow:
    """One exit, or the end: the block ahead of it, its path, and its threshold; None at the end.

    `leaves` is the share of the calibration rows that leave there, `share` the part of the model's
    multiply-accumulates that is done by then, heads left out; None where it is not known.
    """

    block: int | None
    path: str
    threshold: float | None
    leaves: float
    share: float | None

    @property
    def name(self) -> str:
        """The number of the block; "end" at the end of the model."""
        return "end" if self.threshold is None else "-" if self.block is None else str(self.block)

    @property
    def threshold_text(self) -> str:
        """Write the threshold: "never" where no score reaches it."""
        if self.threshold is None:
            return "-"
        return "never" if self.threshold == float("inf") else figure(self.threshold, 4)


@dataclass(frozen=True)
class ExitReport:
    """The exits that one step calibrated, the end of the model last, and what it promises."""

    spec: str
    rows: tuple[ExitRow, ...]
    promise: Promise

    def words(self) -> list[tuple[str, str]]:
        """Say what is promised, what was measured, and what it saves: names and sentences."""
        found = self.promise
        return [
            ("promise", found.words()),
            ("risk", _risk(found)),
            ("cost", f"a row costs {figure(found.cost)} of the whole model on average"),
            ("note", _caveat(found) if found.exits else why_none(found)),
        ]


def read_exits(steps: Sequence[StepRecord]) -> list[ExitReport]:
    """Read the steps that calibrated exits; others are left out."""
    return [found for step in steps if (found := _exits(step)) is not None]


def per_cent(part: float | None) -> str:
    """Write a part as `1.25 %`; "-" where there is none."""
    return "-" if part is None else f"{figure(100 * part)} %"


def share_text(part: float | None) -> str:
    """Write a share to a tenth of a per cent."""
    return "-" if part is None else f"{100 * part:.1f} %"


def why_none(found: Promise) -> str:
    """Say why no row may leave."""
    if len(found.bounds) < 2:
        return "no row leaves early: no threshold was tried"
    risk, bound, asked = (per_cent(x) for x in (found.risks[1], found.bounds[1], found.epsilon))
    if not found.risks[1]:
        return (
            f"no row leaves early: {found.samples} {found.unit}s are too few. Even with no loss on "
            f"them it may be up to {bound}, above {asked}: give more of them"
        )
    return (
        f"no row leaves early: at the highest threshold that was tried the loss is {risk}, bounded "
        f"by {bound}, above {asked}: give more {found.unit}s, or allow a larger epsilon"
    )


def _risk(found: Promise) -> str:
    """Say what was lost; an engine without exits cannot differ from itself, so has no bound."""
    words = f"{per_cent(found.risk)} on the calibration rows"
    if not found.exits and found.reference == "self":
        return words
    return f"{words}, bounded by {per_cent(found.bounds[found.index])}"


def _caveat(found: Promise) -> str:
    """Say what is not promised."""
    words = "this is of all rows together: of those that leave early a larger part loses"
    if found.delta is None:
        words += f"; {found.rule} bounds the mean over calibrations, so that this one may lose more"
    return words


def _exits(step: StepRecord) -> ExitReport | None:
    try:
        promise = Promise.from_json(step.facts.get("promise"))
    except UnsafeFileError:
        return None
    given, count = step.facts.get("exits"), len(promise.tau)
    places = list(given) if isinstance(given, list) and len(given) == count else [{}] * count
    made = zip(places, promise.tau, promise.shares, strict=False)
    rows = [_row(place, tau, leaves) for place, tau, leaves in made]
    return ExitReport(step.spec, (*rows, ExitRow(None, "", None, promise.shares[-1], 1.0)), promise)


def _row(place: Any, threshold: float, leaves: float) -> ExitRow:
    record = place if isinstance(place, dict) else {}
    block, path, share = (record.get(name) for name in ("block", "path", "share"))
    known = float(share) if isinstance(share, (int, float)) and 0 <= share <= 1 else None
    return ExitRow(
        block if type(block) is int and 0 <= block < _MOST else None,
        path if isinstance(path, str) else "",
        threshold,
        leaves,
        known,
    )
