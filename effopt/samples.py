"""Samples of a `.npz` or `.safetensors` file as numpy arrays, batch by batch. Free of torch."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from effopt.arrays import Stored, open_arrays
from effopt.backend import Array
from effopt.class_labels import labels_apart, stored_labels
from effopt.errors import UsageError
from effopt.signature import TensorSpec

BATCH = 8
"""Samples of one batch."""
_SIZE = "batch"


@dataclass(frozen=True)
class Samples:
    """One array [count, ...] for each input; those that are not in `cut` are the same for all.

    Iterating yields batches of at most `size` samples by input name, in the order of the inputs;
    one is held at a time. Raises UsageError where one holds no finite numbers. `labels` [count],
    int64, are those of the file, or None.
    """

    path: Path
    arrays: Mapping[str, Stored]
    cut: frozenset[str]
    size: int
    count: int
    labels: Array | None = None

    def __iter__(self) -> Iterator[dict[str, Array]]:
        whole = {
            n: _array(a, a.read(), a.shape) for n, a in self.arrays.items() if n not in self.cut
        }
        with ExitStack() as stack:
            files = {n: stack.enter_context(self.arrays[n].opened()) for n in sorted(self.cut)}
            for start in range(0, self.count, self.size):
                rows = min(self.size, self.count - start)
                taken = {n: _rows(self.arrays[n], file, rows) for n, file in files.items()}
                found = {name: {**whole, **taken}[name] for name in self.arrays}
                for name, array in found.items():
                    self._check_finite(name, array, start)
                yield found

    def hashes(self) -> tuple[str, str]:
        """Return the SHA-256 of all samples: batch after batch, and as if they were one batch."""
        batches, one = hashlib.sha256(), hashlib.sha256()
        for batch in self:
            for array in batch.values():
                batches.update(array.tobytes())
        for name, stored in self.arrays.items():
            with stored.opened() as file:
                for start in range(0, stored.shape[0] if name in self.cut else 0, self.size):
                    one.update(stored.take(file, min(self.size, stored.shape[0] - start)))
            if name not in self.cut:
                one.update(stored.read())
        return batches.hexdigest(), one.hexdigest()

    def _check_finite(self, name: str, array: Array, start: int) -> None:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            reason = f"{name!r} in {self.path} holds NaN or infinity from sample {start} on"
            raise UsageError(reason, "leave such samples out")


def open_samples(path: Path, specs: Sequence[TensorSpec], batch: int = BATCH) -> Samples:
    """Open a file of samples for the inputs `specs`, by the rules of `effopt.calibration`.

    Raises UsageError for missing or extra names, another type or shape, counts that differ, labels
    that are no integers, and an input that counts samples by a later dimension; UnsafeFileError as
    `effopt.arrays`.
    """
    arrays, held = labels_apart(open_arrays(path), [spec.name for spec in specs])
    check_names([spec.name for spec in specs], arrays, path)
    size, cut = _cutting(specs, batch)
    for spec in specs:
        _check_array(spec, arrays[spec.name], spec.name in cut, path)
    counts = {spec.name: arrays[spec.name].shape[0] for spec in specs if spec.name in cut}
    told = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
    if len(set(counts.values())) != 1:
        reason = f"the arrays of {path} differ in their samples: {told or 'none has any'}"
        raise UsageError(reason, "store one row for each sample")
    count = next(iter(counts.values()))
    if not count or (size != batch and count % size):
        reason = f"{path} has {count} samples, and the engine takes batches of {size}"
        raise UsageError(reason, f"give a multiple of {size} samples" if count else "give some")
    labels = None if held is None else stored_labels(held, count)
    taken = {spec.name: arrays[spec.name] for spec in specs}
    return Samples(path, taken, cut, size, count, labels)


def check_names(wanted: Sequence[str], arrays: Mapping[str, Stored], path: Path) -> None:
    """Raise UsageError for an input that a file lacks, or an array that is no input."""
    missing = [name for name in wanted if name not in arrays]
    extra = [name for name in arrays if name not in wanted]
    if missing or extra:
        found = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, which is no input"
        raise UsageError(f"{path} {found}", f"the inputs are {', '.join(wanted)}")


def _cutting(specs: Sequence[TensorSpec], batch: int) -> tuple[int, frozenset[str]]:
    """Return the samples of a batch, and the inputs that count them by their first dimension."""
    ranked = [spec for spec in specs if spec.shape]
    if any(_SIZE in spec.shape[1:] for spec in ranked):
        reason = "an input counts samples by a later dimension than its first"
        raise UsageError(reason, "such an engine takes no file: run it in Python")
    first = next((spec.shape[0] for spec in ranked if spec.shape[0] == _SIZE), None)
    counted = first or (ranked[0].shape[0] if ranked else 1)
    size = counted if isinstance(counted, int) else batch
    return size, frozenset(spec.name for spec in ranked if spec.shape[0] == counted)


def _check_array(spec: TensorSpec, array: Stored, is_cut: bool, path: Path) -> None:
    wanted = ("samples", *spec.shape[1:]) if is_cut else spec.shape
    if array.dtype != spec.dtype:
        reason = f"{spec.name!r} in {path} is {array.dtype}, the engine takes {spec.dtype}"
        raise UsageError(reason, f"save it as {spec.dtype}")
    fits = len(wanted) == len(array.shape) and all(
        size == found or isinstance(size, str)
        for size, found in zip(wanted, array.shape, strict=True)
    )
    if not fits:
        sizes = ", ".join(map(str, wanted))
        reason = f"{spec.name!r} in {path} is {list(array.shape)}, the engine takes [{sizes}]"
        raise UsageError(reason, "give samples of the sizes that the engine was made for")


def _rows(array: Stored, file: IO[bytes], count: int) -> Array:
    return _array(array, array.take(file, count), (count, *array.shape[1:]))


def _array(array: Stored, data: bytes, shape: tuple[int, ...]) -> Array:
    return np.frombuffer(data, np.dtype(array.dtype)).reshape(shape)
