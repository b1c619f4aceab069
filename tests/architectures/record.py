"""Trials on record: what is pinned of them, as JSON, and as the table of docs/zoo.md."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.architectures import ARCHITECTURES
from tests.architectures.trial import PASSES, REDUCED, AxisTrial, Trial

EXPECTED = Path(__file__).parent / "expected.json"
Row = dict[str, Any]
"""What is pinned of one model: for each pass "reduced" or the reason; tokens and sites."""

_HEAD = """# The zoo

Written by `make zoo`; do not edit. Each model is small and has random weights. Its normal form
agrees with the model, then each token pass is tried on each of its token axes, and the oracle of
`tests/oracle` judges what comes out. *Reduced*: a pass yielded a program that the oracle found
right. *Refused*: no pass did, for the reason given. Nothing else is let through.

`tokens` and `sites` are those of the axis with most sites; other axes are named behind the
passes that reduced them.
"""


def row_of(trial: Trial) -> Row:
    """Return what is pinned of a trial."""
    first, *others = (_axis_row(axis) for axis in trial.axes)
    fixed = {"batch": "fixed"} if trial.batch == "fixed" else {}
    return {**first, **fixed, **({"others": others} if others else {})}


def _axis_row(trial: AxisTrial) -> Row:
    sized = {"axis": trial.axis, "tokens": trial.tokens, "sites": trial.sites}
    passes = {name: str(verdict) for name, verdict in trial.passes.items()}
    return {**(sized if trial.axis else {}), **passes}


def is_reduced(row: Row) -> bool:
    """Tell whether some pass reduced the model on some axis."""
    return any(_done(one) for one in (row, *row.get("others", ())))


def _done(row: Row) -> list[str]:
    return [name.removesuffix("-tokens") for name in PASSES if row[name] == REDUCED]


def record(trial: Trial) -> Row:
    """Return all that is known of a trial, as JSON types."""
    verdict = trial.decisive
    first = trial.axes[0]
    return {
        "model": trial.model,
        "family": trial.family,
        "outcome": verdict.kind,
        "sites": first.sites,
        "tokens": first.tokens,
        "reason": verdict.reason,
        "remedy": verdict.remedy,
        "passes": {name: str(found) for name, found in first.passes.items()},
        "axes": [_axis_row(axis) for axis in trial.axes if axis.axis],
        "batch": trial.batch,
        "ulps": trial.ulps,
        "seconds": trial.seconds,
    }


def expected() -> dict[str, Row]:
    """Read the pinned rows, none where nothing was pinned yet."""
    rows: dict[str, Row] = json.loads(EXPECTED.read_text("utf-8")) if EXPECTED.exists() else {}
    return rows


def pin(rows: Mapping[str, Row]) -> None:
    """Write the pinned rows in the order of the zoo, one line each."""
    known = [name for name in ARCHITECTURES if name in rows]
    lines = [f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in known]
    write(EXPECTED, "{\n" + ",\n".join(lines) + "\n}\n")


def write(path: Path, text: str) -> None:
    """Write a file at once: whoever reads it sees the old or the new text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def document(rows: Mapping[str, Row]) -> str:
    """Write docs/zoo.md."""
    return "\n".join((_HEAD, *_families(rows), "", *_models(rows), ""))


def _families(rows: Mapping[str, Row]) -> Iterable[str]:
    models = Counter(ARCHITECTURES[name].family for name in rows)
    reduced = Counter(ARCHITECTURES[name].family for name, row in rows.items() if is_reduced(row))
    yield "| family | models | reduced | refused |"
    yield "|---|---:|---:|---:|"
    for name, count in models.items():
        yield f"| {name} | {count} | {reduced[name]} | {count - reduced[name]} |"
    yield f"| all | {len(rows)} | {reduced.total()} | {len(rows) - reduced.total()} |"


def _models(rows: Mapping[str, Row]) -> Iterable[str]:
    yield "| model | family | outcome | passes | tokens | sites | why not |"
    yield "|---|---|---|---|---:|---:|---|"
    for name, row in rows.items():
        outcome = REDUCED if is_reduced(row) else "refused"
        sized = f"{row.get('tokens', '')} | {row.get('sites', '')}"
        family = ARCHITECTURES[name].family
        yield f"| {name} | {family} | {outcome} | {_passes(row)} | {sized} | {_why_not(row)} |"


def _passes(row: Row) -> str:
    others = [(other["axis"], _done(other)) for other in row.get("others", ())]
    named = [f"{axis}: {', '.join(done)}" for axis, done in others if done]
    return "; ".join((*([", ".join(_done(row))] if _done(row) else []), *named))


def _why_not(row: Row) -> str:
    """Give the reasons on the first axis: once where all passes share it."""
    reasons = {name.removesuffix("-tokens"): _cell(row[name]) for name in PASSES}
    reasons = {name: text for name, text in reasons.items() if text != REDUCED}
    if len(reasons) == len(PASSES) and len({*reasons.values()}) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{name}: {text}" for name, text in reasons.items())


def _cell(text: str) -> str:
    """Make text fit a cell of a table: one line, nothing that ends the cell or is markup."""
    short = text if len(text) <= 160 else f"{text[:157]}..."
    return "".join(f"\\{letter}" if letter in "|*_<[`" else letter for letter in short)
