"""Labels of samples: the number of the class that each is of, beside the inputs. Free of torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effopt.arrays import Stored
from effopt.backend import as_array
from effopt.errors import UsageError

Array = NDArray[Any]

LABELS = "labels"
"""The array of a file that holds them, where the model has no input of that name."""

_WHOLE = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


def read_labels(given: object, samples: int) -> Array:
    """Return labels [samples], a numpy array or a torch tensor of integers, as int64.

    Raises UsageError for anything else.
    """
    dtype, shape = getattr(given, "dtype", None), getattr(given, "shape", None)
    if dtype is None or shape is None:
        reason = f"the labels are a {type(given).__name__}, not an array"
        raise UsageError(reason, "pass an array or a tensor [samples] of whole numbers")
    _check(getattr(dtype, "name", str(dtype).removeprefix("torch.")), tuple(shape), samples)
    return as_array(given).astype(np.int64)


def stored_labels(stored: Stored, samples: int) -> Array:
    """Return the labels [samples] that a file holds, as int64; UsageError as `read_labels`."""
    try:
        _check(stored.dtype, stored.shape, samples)
    except UsageError as error:
        raise UsageError(f"{stored.path}: {error.reason}", error.remedy) from error
    return np.frombuffer(stored.read(), np.dtype(stored.dtype)).astype(np.int64)


def labels_apart(
    arrays: Mapping[str, Stored], inputs: Sequence[str]
) -> tuple[dict[str, Stored], Stored | None]:
    """Part the arrays of a file into those of its inputs and its labels, where it has any."""
    held = None if LABELS in inputs else arrays.get(LABELS)
    return {name: array for name, array in arrays.items() if array is not held}, held


def check_classes(labels: Array, classes: int, output: str) -> None:
    """Raise UsageError for labels that are none of the classes 0 to `classes` - 1 of an output."""
    low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
    if low < 0 or high >= classes:
        odd = low if low < 0 else high
        raise UsageError(
            f"there is a label {odd}, and output {output!r} has the classes 0 to {classes - 1}",
            "number classes as the model does, and leave samples of no class out",
        )


def _check(dtype: str, shape: tuple[int, ...], samples: int) -> None:
    if dtype not in _WHOLE:
        reason = f"the labels are {dtype}, not whole numbers"
        raise UsageError(reason, "give the number of each sample's class, from 0, as int64")
    if len(shape) != 1:
        reason = f"the labels are {list(shape)}, not one number for each sample"
        raise UsageError(reason, "give the number of each sample's class: [samples]")
    if shape[0] != samples:
        reason = f"there are {shape[0]} labels for {samples} samples"
        raise UsageError(reason, "give one for each sample, in their order")
