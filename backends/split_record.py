"""What a manifest says of segments that are files of their own; read with care, free of torch."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effopt.errors import UnsafeFileError
from effopt.signature import EXIT_INDEX, TAU, Signature

_FILE = re.compile(r"[A-Za-z0-9_-]{1,100}\.onnx")
_AGAIN = "write the engine again, or get the folder again from a source that you trust"


@dataclass(frozen=True)
class SegmentFile:
    """One segment: its file, what that takes and gives, and what the outputs are for.

    They are, in the order of the signature: a score if `scored`, then `answers`, `ready` (each
    with the dimension at which it counts rows, or None) and `handed`; see `effopt.segments`.
    """

    file: str
    signature: Signature
    scored: bool
    answers: tuple[str, ...]
    ready: Mapping[str, int | None]
    handed: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of the values that it takes."""
        return tuple(spec.name for spec in self.signature.inputs)

    def to_json(self) -> dict[str, Any]:
        """Return the plain record."""
        return {
            "file": self.file,
            "signature": self.signature.to_json(),
            "scored": self.scored,
            "answers": list(self.answers),
            "ready": dict(self.ready),
            "handed": list(self.handed),
        }


@dataclass(frozen=True)
class Split:
    """All segments in order; `rows` says at which dimension values count rows, if they have any."""

    segments: tuple[SegmentFile, ...]
    rows: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return the plain record that the manifest holds as the fact "split"."""
        return {"segments": [part.to_json() for part in self.segments], "rows": dict(self.rows)}


def read_split(record: object, whole: Signature, folder: Path) -> Split:
    """Read the record of an engine whose signature is `whole`, thresholds last.

    Raises UnsafeFileError for what does not hold together: a file that is not there, a value that
    nobody gives, a wrong type.
    """
    held = _mapping(record, "it")
    parts = tuple(map(_segment, _list(held.get("segments"), "segments")))
    rows = {name: _place(place, name) for name, place in _mapping(held.get("rows"), "rows").items()}
    _check_files(parts, folder)
    _check_ends(parts, whole)
    _check_values(parts, rows, whole)
    return Split(parts, rows)


def _damaged(what: str) -> UnsafeFileError:
    return UnsafeFileError(f"the record of split segments is damaged: {what}", _AGAIN)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise _damaged(what)


# --- types


def _segment(record: object) -> SegmentFile:
    held = _mapping(record, "a segment")
    file, scored, signature = (held.get(key) for key in ("file", "scored", "signature"))
    if not isinstance(file, str) or not _FILE.fullmatch(file):
        raise _damaged(f"{str(file)[:100]!a} is no name of a segment's file")
    if not isinstance(scored, bool):
        raise _damaged(f"{file} is neither scored nor not")
    places = _mapping(held.get("ready"), "ready").items()
    return SegmentFile(
        file,
        Signature.from_json(_mapping(signature, "a signature")),
        scored,
        _names(held.get("answers"), "answers"),
        {name: None if place is None else _place(place, name) for name, place in places},
        _names(held.get("handed"), "handed"),
    )


def _mapping(record: object, what: str) -> dict[str, Any]:
    if not isinstance(record, dict) or not all(isinstance(key, str) for key in record):
        raise _damaged(f"{what} is no mapping")
    return record


def _list(record: object, what: str) -> Sequence[Any]:
    if not isinstance(record, (list, tuple)):
        raise _damaged(f"{what} is no list")
    return record


def _names(record: object, what: str) -> tuple[str, ...]:
    found = tuple(_list(record, what))
    _require(all(isinstance(name, str) for name in found), f"{what} holds what is no name")
    _require(len({*found}) == len(found), f"{what} holds a name twice")
    return found


def _place(record: object, name: str) -> int:
    if type(record) is not int or not 0 <= record < 64:
        raise _damaged(f"{name[:100]!a} has rows at {str(record)[:20]!a}")
    return record


# --- whether it holds together


def _check_files(parts: Sequence[SegmentFile], folder: Path) -> None:
    files = [part.file for part in parts]
    _require(len({*files}) == len(files) > 1, "it names a file twice, or fewer than two")
    for file in files:
        _require((folder / file).is_file(), f"there is no file {file}")


def _check_ends(parts: Sequence[SegmentFile], whole: Signature) -> None:
    """Check scores, thresholds and outputs against the signature of the engine."""
    scored = [part.scored for part in parts]
    _require(scored == [*(True for _ in parts[1:]), False], "all but the last must be scored")
    tau = whole.inputs[-1] if whole.inputs else None
    good = tau is not None and (tau.name, tau.shape) == (TAU, (len(parts) - 1,))
    _require(good, "the last input of the engine is not one threshold for each exit")
    answers, ready = parts[0].answers, parts[0].ready
    same = all({*part.answers} == {*answers} for part in parts)
    _require(bool(answers) and same, "the segments do not answer the same outputs")
    _require(not any(part.ready for part in parts[1:]), "only the first gives ready outputs")
    wanted = sorted(spec.name for spec in whole.outputs)
    fits = sorted([*answers, *ready, EXIT_INDEX]) == wanted
    _require(fits, "its outputs are not those of the engine")


def _check_values(parts: Sequence[SegmentFile], rows: Mapping[str, int], whole: Signature) -> None:
    """Check that every value that is read is given, once and earlier, and where it has rows."""
    known = {spec.name for spec in whole.inputs[:-1]}
    starts = {*known}
    read = set[str]()
    for part in parts:
        for spec in part.signature.inputs:
            _require(
                spec.name in known, f"nobody gives {spec.name[:100]!a}, which {part.file} reads"
            )
            _check_dynamic(spec.shape, rows.get(spec.name), spec.name)
            read.add(spec.name)
        outputs = part.signature.outputs
        given = [spec.name for spec in outputs[part.scored :]]
        stated = [*part.answers, *part.ready, *part.handed]
        _require(given == stated, f"{part.file} gives other values than it says")
        for spec in outputs:
            _check_dynamic(spec.shape, part.ready.get(spec.name), spec.name)
        _require(known.isdisjoint(part.handed), f"{part.file} hands on a value that is there")
        known.update(part.handed)
    _require({*rows} <= read, f"{_first({*rows} - read)} has rows, and nobody reads it")
    first = {spec.name for spec in parts[0].signature.inputs} & starts & {*rows}
    _require(bool(first), "the first segment reads no rows")


def _check_dynamic(shape: Sequence[int | str], place: int | None, name: str) -> None:
    good = place is None or (place < len(shape) and isinstance(shape[place], str))
    _require(good, f"{name[:100]!a} has no rows at {place}")


def _first(names: Iterable[str]) -> str:
    return f"{next(iter(sorted(names)), '')[:100]!a}"
