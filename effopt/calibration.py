"""Calibration data: a stream of batches, checked against a program's inputs as they come."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from effopt.arrays import Stored, open_arrays
from effopt.class_labels import labels_apart, read_labels, stored_labels
from effopt.errors import UsageError
from effopt.inputs import FORMS, read_inputs
from effopt.program import Program
from effopt.samples import check_names
from effopt.signature import TensorSpec
from effopt.spool import Spool

GIVEN = "given in Python"
BATCH = 8
"""Samples of a file that make one batch."""
_SIZE = "batch"


@dataclass(frozen=True, eq=False)
class Calibration:
    """A stream of inputs to calibrate on, read again from its beginning by each loop over it.

    Iterating yields the flat input tensors of each batch, in the order of the signature, checked;
    one batch is held at a time. `name` says where the data come from; `samples` and `batches`
    were counted when it was made. `stream` yields batches nested as the example inputs. `labels`
    [samples] int64 are the classes of the samples, in their order, where they are known.
    """

    stream: Iterable[object]
    program: Program = field(repr=False)
    name: str = GIVEN
    samples: int = 0
    batches: int = 0
    labels: Tensor | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield each batch; UsageError says which one is wrong, in which input, and how."""
        index = -1
        for index, given in enumerate(self.stream):
            yield _checked(given, index, self.program)
        if self.batches and index + 1 != self.batches:
            raise UsageError(
                f"the calibration data gave {self.batches} batches at first and {index + 1} now",
                "pass a list, or an object that begins anew each time it is iterated",
            )

    def require(self, least: int) -> None:
        """Raise UsageError where there are fewer samples than `least`."""
        if self.samples < least:
            raise UsageError(
                f"the calibration data ({self.name}) has {self.samples} samples, at least "
                f"{least} are needed",
                f"give {least - self.samples} more",
            )

    def describe(self) -> str:
        """Say how many samples there are and where they come from, for a report."""
        known = "" if self.labels is None else " with labels"
        return f"calibration: {self.samples} samples{known}, {self.name}"


def read_calibration(
    given: object, program: Program, *, least: int = 1, labels: object = None
) -> Calibration:
    """Read calibration data once from end to end: all of it is checked, and counted.

    `given` is the path of a file (see `calibration_file`), or an iterable of batches, each nested
    as the example inputs: a list, a DataLoader, or an iterator, which is kept in an anonymous
    temporary file, as it can be read once only (in TMPDIR; it is gone when the process ends).
    A DataLoader that shuffles gives the same samples in another order each time, which is right,
    though results then differ by rounding and by which rows are sampled. `labels` are the classes
    of the samples, in the order of the stream: an array or a tensor [samples] of integers.
    Raises UsageError for what is no stream, for the first wrong batch, where there are fewer
    samples than `least`, and for labels that do not fit the samples or are in the file already.
    """
    if isinstance(given, (str, os.PathLike)):
        data = calibration_file(given, program, least=least)
    else:
        data = _counted(Calibration(_stream(given), program), least)
    if labels is None:
        return data
    if data.labels is not None:
        reason = f"labels are given, and the calibration data ({data.name}) holds some already"
        raise UsageError(reason, "leave one of the two out")
    return replace(data, labels=torch.from_numpy(read_labels(labels, data.samples)))


def _stream(given: object) -> Iterable[object]:
    """Return batches that can be read again."""
    if isinstance(given, (Tensor, Mapping)) or not isinstance(given, Iterable):
        raise UsageError(
            f"the calibration data is a {type(given).__name__}, not a stream of batches",
            "pass a list of batches, a DataLoader or a file: [batch] for one batch",
        )
    return Spool(given) if isinstance(given, Iterator) else given


def _counted(data: Calibration, least: int) -> Calibration:
    samples = batches = 0
    for batch in data:
        samples, batches = samples + samples_in(data.program, batch), batches + 1
    counted = replace(data, samples=samples, batches=batches)
    counted.require(max(least, 1))
    return counted


def samples_in(program: Program, batch: tuple[Tensor, ...]) -> int:
    """Count the samples of a batch: the free size "batch", else the first size of all."""
    pairs = list(zip(program.signature.inputs, batch, strict=True))
    free = (x.shape[spec.shape.index(_SIZE)] for spec, x in pairs if _SIZE in spec.shape)
    return next(free, next((x.shape[0] for _, x in pairs if x.ndim), 1))


# --- one batch


def _checked(given: object, index: int, program: Program) -> tuple[Tensor, ...]:
    """Return the flat tensors of a batch, or raise what is wrong with it."""
    try:
        flat = _flat(given, program)
        for spec, tensor, sample in zip(
            program.signature.inputs, flat, program.samples, strict=True
        ):
            _check_type(spec, tensor, sample)
            _check_shape(spec, tensor.shape)
            _check_numbers(spec, tensor)
        _check_free_sizes(program, flat)
    except UsageError as error:
        reason = f"calibration batch {index}: {error.reason}"
        raise UsageError(reason, error.remedy) from error
    return tuple(tensor.detach() for tensor in flat)


def _flat(given: object, program: Program) -> tuple[Tensor, ...]:
    kinds = [type(leaf) for leaf in pytree.tree_leaves(given)]
    if not any(issubclass(kind, Tensor) for kind in kinds):
        held = ", ".join(sorted({kind.__name__ for kind in kinds})) or "nothing"
        raise UsageError(f"it holds no tensor ({held})", FORMS)
    inputs = read_inputs(given)
    if inputs.batch == 0:
        raise UsageError("it has no samples", "leave empty batches out")
    return program.flatten(inputs.args, inputs.kwargs)


def _check_type(spec: TensorSpec, tensor: Tensor, sample: Tensor) -> None:
    if tensor.dtype != sample.dtype:
        found, wanted = (str(x.dtype).removeprefix("torch.") for x in (tensor, sample))
        remedy = f"convert it with .to(torch.{wanted})"
        raise UsageError(f"input {spec.name!r} is {found}, the model takes {wanted}", remedy)
    if tensor.device != sample.device:
        reason = f"input {spec.name!r} is on {tensor.device}, the model on {sample.device}"
        raise UsageError(reason, f"move it with .to({str(sample.device)!r})")


def _check_shape(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    """Compare a rank and the fixed sizes with the signature."""
    fits = len(shape) == len(spec.shape) and all(
        wanted == size or isinstance(wanted, str)
        for wanted, size in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, spec.shape))
        raise UsageError(
            f"input {spec.name!r} is {list(shape)}, the model takes [{wanted}]",
            "give whole batches of the sizes that the model was captured for",
        )


def _check_numbers(spec: TensorSpec, tensor: Tensor) -> None:
    if tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
        what = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
        raise UsageError(
            f"input {spec.name!r} holds {what}",
            "leave such samples out; in a mask, write torch.finfo(dtype).min for -infinity",
        )


def _check_free_sizes(program: Program, flat: tuple[Tensor, ...]) -> None:
    """Let a free size be one number in all inputs (its range was checked by `flatten`)."""
    known: dict[str, tuple[str, int]] = {}
    for spec, tensor in zip(program.signature.inputs, flat, strict=True):
        for name, size in zip(spec.shape, tensor.shape, strict=True):
            if not isinstance(name, str) or name not in program.ranges:
                continue
            first, wanted = known.setdefault(name, (spec.name, size))
            if size != wanted:
                raise UsageError(
                    f"{name} is {size} in input {spec.name!r} and {wanted} in {first!r}",
                    f"give all inputs of a batch the same {name}",
                )


# --- a file


def calibration_file(
    path: str | os.PathLike[str], program: Program, *, batch: int = BATCH, least: int = 1
) -> Calibration:
    """Read calibration data from a `.npz` or `.safetensors` file, and check all of it.

    The file has one array [samples, ...] for each input, by the name in `program.signature`; it
    is cut into batches of `batch` samples (of the model's own size where that is fixed). An input
    that does not count samples, such as one row of positions, is stored once, as it is. An array
    `labels` [samples] of integers beside them, unless that is an input, is the class of each
    sample. Memory: one batch, and the labels. Raises UsageError for missing or extra names, another
    type or shape, counts of samples that differ, labels that are no integers, and as
    `read_calibration`; UnsafeFileError as `effopt.arrays`.
    """
    file = Path(path)
    specs = program.signature.inputs
    arrays, held = labels_apart(open_arrays(file), [spec.name for spec in specs])
    check_names([spec.name for spec in specs], arrays, file)
    size, cut = _cutting(program, batch)
    for spec in specs:
        _check_array(spec, arrays[spec.name], spec.name in cut, file)
    counts = {spec.name: arrays[spec.name].shape[0] for spec in specs if spec.name in cut}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
        raise UsageError(
            f"the arrays of {file} differ in their samples: {told}", "store one row for each sample"
        )
    samples = next(iter(counts.values()), 1)
    if size != batch and samples % size:
        raise UsageError(
            f"{file} has {samples} samples, and the model takes batches of {size}",
            f"give a multiple of {size} samples, or leave the batch dynamic",
        )
    stream = _FileStream(program, {spec.name: arrays[spec.name] for spec in specs}, cut, size)
    data = _counted(Calibration(stream, program, f"from {file.name}"), least)
    if held is None:
        return data
    return replace(data, labels=torch.from_numpy(stored_labels(held, data.samples)))


def _cutting(program: Program, batch: int) -> tuple[int, frozenset[str]]:
    """Return the samples of a batch, and the inputs that count them by their first dimension."""
    ranked = [spec for spec in program.signature.inputs if spec.shape]
    if any(_SIZE in spec.shape[1:] for spec in ranked):
        reason = "an input counts samples by a later dimension than its first"
        raise UsageError(reason, "pass batches in Python in place of a file")
    if any(spec.shape[0] == _SIZE for spec in ranked):
        size = min(batch, program.ranges.get(_SIZE, (1, batch))[1])
        return size, frozenset(spec.name for spec in ranked if spec.shape[0] == _SIZE)
    fixed = ranked[0].shape[0] if ranked else 1
    size = fixed if isinstance(fixed, int) else batch
    return size, frozenset(spec.name for spec in ranked if spec.shape[0] == fixed)


def _check_array(spec: TensorSpec, array: Stored, is_cut: bool, file: Path) -> None:
    if array.dtype != spec.dtype:
        raise UsageError(
            f"{spec.name!r} in {file} is {array.dtype}, the model takes {spec.dtype}",
            f"save it as {spec.dtype}",
        )
    wanted = ("samples", *spec.shape[1:]) if is_cut else spec.shape
    try:
        _check_shape(replace(spec, shape=wanted), array.shape)
    except UsageError as error:
        raise UsageError(f"{file}: {error.reason}", error.remedy) from error


@dataclass(frozen=True)
class _FileStream:
    """The batches of a file as (args, kwargs), nested as at capture."""

    program: Program
    arrays: Mapping[str, Stored]
    cut: frozenset[str]
    size: int

    def __iter__(self) -> Iterator[object]:
        kept = {name: array for name, array in self.arrays.items() if name not in self.cut}
        whole = {name: _tensor(array, array.read(), array.shape) for name, array in kept.items()}
        with ExitStack() as stack:
            files = {n: stack.enter_context(self.arrays[n].opened()) for n in sorted(self.cut)}
            left = next((self.arrays[name].shape[0] for name in files), 1)
            while left > 0:
                rows = min(self.size, left) if files else 1
                cut = {name: self._rows(name, file, rows) for name, file in files.items()}
                yield self._nested({**whole, **cut})
                left -= rows

    def _rows(self, name: str, file: Any, rows: int) -> Tensor:
        array = self.arrays[name]
        return _tensor(array, array.take(file, rows), (rows, *array.shape[1:]))

    def _nested(self, tensors: Mapping[str, Tensor]) -> object:
        spec, fixed = self.program.in_spec, self.program.constants
        flat = iter([tensors[name] for name in self.arrays])
        leaves = [fixed[n][1] if n in fixed else next(flat) for n in range(spec.num_leaves)]
        return pytree.tree_unflatten(leaves, spec)


def _tensor(array: Stored, data: bytes, shape: tuple[int, ...]) -> Tensor:
    kind: torch.dtype = getattr(torch, array.dtype)
    if not data:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape)
