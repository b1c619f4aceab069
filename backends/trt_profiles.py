"""The sizes that an engine is built for: least, best and largest of each size left open.

TensorRT tunes for the best and takes any size in between; outside of it the engine refuses.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from effopt.backends.trt_build import Sizes
from effopt.errors import PreconditionError, UnsafeFileError, UsageError
from effopt.signature import Signature, TensorSpec

if TYPE_CHECKING:
    from effopt.program import Program

Range = tuple[int, int, int]
"""Least, best, largest."""

Known = Mapping[str, tuple[int, int, int | None]]
"""What the model takes of each size: least, that of the stored sample, largest or None."""

_BATCH = (1, 8, 64)
_ROOM = 4
"""How many times the stored sample a size without limit may reach."""
_OPEN = 2**31 - 1
"""The largest that captured ranges hold: no limit."""


def known_sizes(program: "Program") -> dict[str, tuple[int, int, int | None]]:
    """Return the range and the sample of each size that the inputs of a program leave open."""
    found: dict[str, tuple[int, int, int | None]] = {}
    for spec, sample in zip(program.signature.inputs, program.samples, strict=True):
        for name, size in zip(spec.shape, sample.shape, strict=True):
            if isinstance(name, str) and name not in found:
                low, high = program.ranges.get(name, (1, _OPEN))
                found[name] = (max(low, 1), size, None if high >= _OPEN else high)
    return found


def read_sizes(record: object) -> Known:
    """Read the fact `sizes` of a folder back; UnsafeFileError for what is no such table."""
    if not isinstance(record, Mapping):
        raise UnsafeFileError("the fact `sizes` of the folder is damaged")
    found = {}
    for name, entry in record.items():
        good = isinstance(entry, (list, tuple)) and len(entry) == 3
        if not good or not all(type(n) is int or n is None for n in entry) or None in entry[:2]:
            raise UnsafeFileError(f"the fact `sizes` of the folder is damaged at {str(name)!a}")
        found[str(name)] = (entry[0], entry[1], entry[2])
    return found


def ranges(known: Known, asked: Mapping[str, Range]) -> dict[str, Range]:
    """Choose the sizes to build for: those that were asked for, else defaults.

    The batch is 1, 8, 64; another size goes from the least that the model takes over that of the
    stored sample to the largest, or four times the sample where there is no largest.
    Raises UsageError for a size that is not open, and for one that the model does not take.
    """
    for name in asked:
        if name not in known:
            names = ", ".join(known) or "none"
            raise UsageError(
                f"the {name} of this engine is fixed (sizes left open: {names})",
                f"leave --{name} out, or convert the model again with --dynamic {name}",
            )
    return {name: _range(name, known[name], asked.get(name)) for name in known}


def _range(name: str, known: tuple[int, int, int | None], asked: Range | None) -> Range:
    low, sample, high = known
    if asked is None:
        if name == "batch":
            asked = _BATCH
        else:
            return low, sample, high if high is not None else max(_ROOM * sample, low)
        least = max(asked[0], low)
        most = asked[2] if high is None else min(asked[2], high)
        return least, min(max(asked[1], least), most), most
    if not asked[0] <= asked[1] <= asked[2]:
        reason = f"{name} {','.join(map(str, asked))} is no least, best and largest size"
        raise UsageError(reason, "give three sizes that do not fall, such as 1,8,64")
    if asked[0] < low or (high is not None and asked[2] > high):
        limits = f"from {low} on" if high is None else f"from {low} to {high}"
        raise UsageError(
            f"{name} {asked[0]} to {asked[2]} is outside of what the model takes ({limits})",
            "choose sizes within it",
        )
    return asked


def profiles(signature: Signature, chosen: Mapping[str, Range], file: str) -> dict[str, Sizes]:
    """Return the three shapes of each input with open sizes, by its name in the file.

    Raises PreconditionError for a size that follows from others, as behind an exit.
    """
    return {spec.port: _shapes(spec, chosen, file) for spec in _open(signature.inputs)}


def _open(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    return [spec for spec in specs if any(isinstance(size, str) for size in spec.shape)]


def _shapes(spec: TensorSpec, chosen: Mapping[str, Range], file: str) -> Sizes:
    unknown = [size for size in spec.shape if isinstance(size, str) and size not in chosen]
    if unknown:
        raise PreconditionError(
            f"{file}: {spec.name}",
            f"its size {unknown[0]} follows from others, so that its range is not known",
            "convert the model with a fixed length, or exits of another form",
        )
    least, best, most = (
        tuple(size if isinstance(size, int) else chosen[size][place] for size in spec.shape)
        for place in range(3)
    )
    return least, best, most
