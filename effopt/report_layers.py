"""What the facts of a step say of layers on integer weights, read with care, and its words.

The facts are `{"layers": [{"path", "shape": [N, K], "bits", "group", "symmetric", "error",
"measured_on"}, ...], "groups": [{"kind", "linears", "producers", "ratio" or "alpha", "loss",
"rtn_loss"}, ...], "float": {path: reason}, "bytes": {kind: [before, after]}}`. A report may come
from a stranger, so they may be any JSON: what is no row is left out, and what is no figure is None.
Free of torch.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effopt.collapse import alike, bare, starred
from effopt.plain import figure
from effopt.report import StepRecord

LEAST = 1e-9
"""Errors below this share are rounding of the measurement itself, and are written as 0."""

_MOST = 1 << 53
"""Counts from here on are no counts."""

_SHOWN = 3
"""How many kinds of paths are named."""

CAPTION = "Error: what rounding the weights changes of the outputs, as a share of their energy"

KINDS = {
    "folded": "folded",
    "tied": "folded, tied",
    "mul": "multiplication",
}
"""How the scales of a group are taken up: by constants ahead, by fewer of them, by a new node."""


SIZES = {"embeddings": "embeddings", "linear": "linear layers", "other": "other weights"}
"""What weights of a kind are called."""


@dataclass(frozen=True)
class LayerRow:
    """One layer: its path, outputs N and inputs K, and the codes of its weights.

    `group` is how many weights of a row share a scale. `error` is the change of the layer's outputs
    as a share of their energy, None where it is no number; `measured_on` says on what inputs.
    `kind` is what it is if no linear layer, `values` what its weights are if no integers.
    """

    path: str
    outputs: int
    inputs: int
    bits: int
    group: int
    symmetric: bool
    error: float | None
    measured_on: str
    kind: str = ""
    values: str = ""

    @property
    def weights(self) -> str:
        """Write the codes: `4 bits, blocks of 128`; before them what it is if no linear layer."""
        what = f"{self.kind}: " if self.kind else ""
        if self.values:
            return f"{what}{self.values}"
        by_row = not 0 < self.group < self.inputs
        scale = "one scale a row" if by_row else f"blocks of {self.group}"
        return f"{what}{self.bits} bits, {scale}{'' if self.symmetric else ', asymmetric'}"


@dataclass(frozen=True)
class GroupRow:
    """Layers that share scales of their input channels, and the operators that take these up.

    `setting` is what was chosen (`ratio 0.35`), `loss` what the layers lost with it and `rtn_loss`
    without, mean squared errors of their outputs; None where nothing was searched.
    """

    kind: str
    linears: tuple[str, ...]
    producers: tuple[str, ...]
    setting: str
    loss: float | None
    rtn_loss: float | None

    @property
    def gain(self) -> str:
        """Write the loss as a share of that without scales; "-" where it is not known."""
        if self.loss is None or not self.rtn_loss:
            return "-"
        return f"{figure(100 * self.loss / self.rtn_loss)} %"


@dataclass(frozen=True)
class SizeRow:
    """How many bytes the weights of a kind took before a step and after it."""

    what: str
    before: int
    after: int

    @property
    def share(self) -> str:
        """Write the size after as a share of that before."""
        return f"{figure(100 * self.after / self.before)} %" if self.before else "-"


@dataclass(frozen=True)
class Layers:
    """What one step said of layers; `left` are paths that stay in float, by their reason."""

    spec: str
    rows: tuple[LayerRow, ...]
    groups: tuple[GroupRow, ...]
    left: tuple[tuple[str, tuple[str, ...]], ...]
    sizes: tuple[SizeRow, ...] = ()

    @property
    def counts(self) -> list[tuple[str, list[LayerRow]]]:
        """Return the rows of each kind of weights, in order of the first."""
        return alike(self.rows, lambda row: row.weights)

    def worst(self, count: int) -> list[LayerRow]:
        """Return the rows of the largest errors; one that is no number is worse than any."""
        return sorted(self.rows, key=lambda row: -_rank(row.error))[:count]


def read_layers(steps: Sequence[StepRecord]) -> list[Layers]:
    """Read the steps that put layers on integer weights; others are left out."""
    found = [_layers(step) for step in steps]
    return [layers for layers in found if layers.rows]


def error_text(error: float | None) -> str:
    """Write an error as a figure; "-" where it is no number."""
    return figure(0.0 if error is not None and error < LEAST else error)


def worst_error(rows: Sequence[LayerRow]) -> float | None:
    """Return the largest error, None where one is no number."""
    return max((row.error for row in rows), key=_rank, default=None)


def some(paths: Sequence[str]) -> str:
    """Write the first paths, those that differ in numbers alone as one."""
    kinds = [starred(found) for _, found in alike(paths, bare)]
    more = len(kinds) - _SHOWN
    return ", ".join(kinds[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _rank(error: float | None) -> float:
    return sys.float_info.max if error is None else error


def _layers(step: StepRecord) -> Layers:
    facts = step.facts
    rows = [_layer(item) for item in _records(facts.get("layers"))]
    groups = [_group(item) for item in _records(facts.get("groups"))]
    given = facts.get("float")
    pairs = given.items() if isinstance(given, dict) else ()
    left = alike([pair for pair in pairs if isinstance(pair[1], str)], lambda pair: pair[1])
    return Layers(
        step.spec,
        tuple(row for row in rows if row),
        tuple(group for group in groups if group.linears),
        tuple((reason, tuple(str(path) for path, _ in found)) for reason, found in left),
        _sizes(facts.get("bytes")),
    )


def _sizes(given: object) -> tuple[SizeRow, ...]:
    """Return a row for each kind of weights that there are, and their sum."""
    rows = list[SizeRow]()
    for kind, words in SIZES.items():
        pair = given.get(kind) if isinstance(given, dict) else None
        counts = [_count(item) for item in pair] if isinstance(pair, list) else []
        if len(counts) == 2 and None not in counts and any(counts):
            rows.append(SizeRow(words, *(count or 0 for count in counts)))
    if len(rows) < 2:
        return tuple(rows)
    return *rows, SizeRow("all", sum(r.before for r in rows), sum(r.after for r in rows))


def _records(given: object) -> list[dict[str, Any]]:
    return [item for item in given if isinstance(item, dict)] if isinstance(given, list) else []


def _layer(item: dict[str, Any]) -> LayerRow | None:
    path, shape, on = item.get("path"), item.get("shape"), item.get("measured_on")
    kind, values = item.get("kind"), item.get("weights")
    sizes = shape if isinstance(shape, list) and len(shape) == 2 else []
    counts = [_count(given) for given in (*sizes, item.get("bits"), item.get("group"))]
    if not isinstance(path, str) or len(counts) < 4 or None in counts[:3]:
        return None
    outputs, inputs, bits, group = (count or 0 for count in counts)
    return LayerRow(
        path,
        outputs,
        inputs,
        bits,
        group,
        symmetric=item.get("symmetric") is not False,
        error=_number(item.get("error")),
        measured_on=on if isinstance(on, str) else "",
        kind=kind if isinstance(kind, str) else "",
        values=values if isinstance(values, str) else "",
    )


def _group(item: dict[str, Any]) -> GroupRow:
    kind, settings = item.get("kind"), ("ratio", "alpha")
    chosen = {name: _number(item.get(name)) for name in settings}
    return GroupRow(
        kind=kind if isinstance(kind, str) else "",
        linears=_words(item.get("linears")),
        producers=_words(item.get("producers")),
        setting=", ".join(f"{name} {figure(v)}" for name, v in chosen.items() if v is not None),
        loss=_number(item.get("loss")),
        rtn_loss=_number(item.get("rtn_loss")),
    )


def _words(given: object) -> tuple[str, ...]:
    return tuple(item for item in given if isinstance(item, str)) if isinstance(given, list) else ()


def _count(given: object) -> int | None:
    return given if type(given) is int and 0 <= given < _MOST else None


def _number(given: object) -> float | None:
    """Return a finite number from 0 on; None for anything else, such as an integer too large."""
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        return None
    return float(given) if 0 <= given <= sys.float_info.max else None
