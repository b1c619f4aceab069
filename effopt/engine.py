"""Running an engine folder: arrays in, arrays out, no torch.

A call checks its arguments against the signature first, so that a wrong one is told by the
model's own name for it and not by an error of the runtime.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from effopt.backend import Array, Runner, as_array, backend
from effopt.errors import UsageError
from effopt.folder import Manifest, read
from effopt.reference import read_reference
from effopt.signature import TAU, Signature, TensorSpec

if TYPE_CHECKING:
    from effopt.exit_queue import ExitQueue

TOLERANCES = MappingProxyType(
    {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1.6e-1}
)
"""Largest difference to the stored outputs, relative to the largest stored value.

One file gives other last digits on other processors, as sums run in another order: measured, 1e-6
for ViT-S and ViT-B in float32 between two implementations (12 layers). A hundred times that leaves
room for models ten times as deep and wide; a wrong weight or mask shows at 1e-3 and above. Where a
model computes in a narrower type than its outputs have, the tolerance is that of the type: 8e-4 was
measured for a ViT of 4 layers in float16; bfloat16 has steps 8 times as wide. Types that are not
listed must agree exactly."""

NARROW = "narrowest"
"""The fact of a folder that names the type that its engine computes in, if below float32."""

INTEGERS = 3.0
"""The same for layers on integers, as a multiple of the fact `integer_noise` of the folder.

That is what rounding the inputs of such layers once more changes of the stored outputs: engines
round there in blocks of their own, and a value near the middle of two codes falls to either side.
0.1 to 0.8 of it was measured over the 12 layers of ViT, BERT and Llama, with and without outlier
channels, where it was 0.01 to 0.13 of the largest value.
"""

MOST = 0.4
"""No tolerance is above this, whatever a folder says."""


class Engine:
    """A loaded engine. Call it with arrays by position or by input name."""

    def __init__(self, folder: Path, manifest: Manifest, runner: Runner) -> None:
        """Keep what `load` has read and opened."""
        self.folder = folder
        self._manifest = manifest
        self._runner = runner

    @property
    def signature(self) -> Signature:
        """The inputs and outputs, by the model's own names."""
        return self._manifest.signature

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What the folder says about itself; read-only."""
        return MappingProxyType(self._manifest.to_json())

    @property
    def note(self) -> str:
        """Why something else runs in the place of the engine of this folder; "" where it runs."""
        return str(getattr(self._runner, "note", ""))

    @property
    def reference(self) -> dict[str, Array]:
        """The stored arrays "input.<name>", "original.<output>" and "optimized.<output>"."""
        return read_reference(self.folder)

    def __call__(self, *arrays: Any, **named: Any) -> Any:
        """Run on numpy arrays, torch tensors or nested lists; nest the outputs as the model does.

        A model that returns a bare tensor gives a tuple of one array. Raises UsageError for a
        wrong name, type, rank or size, or where a size such as the batch differs among inputs.
        """
        return self.signature.nest(self.run(bind(self.signature, arrays, named)))

    def run(self, inputs: list[Array]) -> list[Array]:
        """Run on flat arrays in the order of the signature, which are taken as they are."""
        return self._runner.run(inputs)

    def queue(
        self, *, size: int = 8, age: float = 0.01, clock: Callable[[], float] = time.monotonic
    ) -> "ExitQueue":
        """Make queues for an engine whose exits are split; see `effopt.exit_queue`.

        A segment runs once `size` rows are ahead of it, or one has waited for `age` seconds of the
        clock. Raises UsageError for another engine.
        """
        from effopt.exit_flow import Flow
        from effopt.exit_queue import ExitQueue

        flow = getattr(self._runner, "flow", None)
        if not isinstance(flow, Flow):
            reason = f"{self.folder} has no segments that rows could wait between"
            raise UsageError(reason, "optimize with exits of the form split, or call the engine")
        return ExitQueue(flow, self.signature, size=size, age=age, clock=clock)


def load(path: str | os.PathLike[str]) -> Engine:
    """Check an engine folder and open its engine.

    Raises UsageError for what is no engine folder, UnsafeFileError for one that was changed or
    could do harm, MissingError where the runtime is not installed.
    """
    folder = Path(os.path.abspath(path))
    manifest = read(folder)
    runner = backend(manifest.backend).load(folder, manifest.signature, manifest.facts)
    return Engine(folder, manifest, runner)


# --- arguments --------------------------------------------------------------------------------


def bind(
    signature: Signature, arrays: Sequence[object], named: Mapping[str, object]
) -> list[Array]:
    """Put arguments in the order of the signature, as arrays of its types; UsageError if wrong."""
    names = [spec.name for spec in signature.inputs]
    given = dict(zip(names, arrays, strict=False))
    wrong = [f"{len(arrays)} inputs were given"] if len(arrays) > len(names) else []
    wrong += [f"there is no input {name!r}" for name in named if name not in names]
    wrong += [f"input {name!r} is given twice" for name in named if name in given]
    given |= named
    given = {**{s.name: s.default for s in signature.inputs if s.default is not None}, **given}
    wrong += [f"input {name!r} is missing" for name in names if name not in given]
    if wrong:
        raise UsageError(wrong[0], f"the inputs are: {', '.join(map(describe, signature.inputs))}")
    bound = [_convert(spec, given[spec.name]) for spec in signature.inputs]
    _check_sizes(signature.inputs, bound)
    return bound


def has_exits(signature: Signature) -> bool:
    """Tell whether rows may leave an engine early."""
    return any(spec.name == TAU and spec.default is not None for spec in signature.inputs)


def without_exits(signature: Signature, named: Mapping[str, object]) -> list[Array]:
    """Put arguments in order as `bind` does; if there are exits, no row reaches a threshold.

    So an engine is checked: scores near their thresholds may fall to either side of them.
    """
    never = {
        spec.name: np.full(len(spec.default), np.inf, dtype=np.float32)
        for spec in signature.inputs
        if spec.name == TAU and spec.default is not None
    }
    return bind(signature, (), {**named, **never})


def describe(spec: TensorSpec) -> str:
    """Write an input as `pixel_values float32 [batch, 3, 224, 224]`."""
    return f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]"


def _convert(spec: TensorSpec, value: object) -> Array:
    """Make an array of the input's type; only casts that keep every value are made."""
    try:
        array = as_array(value)
    except (ValueError, TypeError) as error:
        raise UsageError(f"input {spec.name!r} is no array: {error}", describe(spec)) from error
    if array.dtype.name == spec.dtype:
        return array
    if array.dtype.kind not in "biuf" or spec.dtype not in _CASTS:
        raise _wrong_type(spec, array)
    wanted = np.dtype(spec.dtype)
    if hasattr(value, "dtype"):
        lossless = array.dtype.kind == wanted.kind and np.can_cast(array.dtype, wanted, "safe")
    else:
        lossless = _list_fits(array, wanted)
    if not lossless:
        raise _wrong_type(spec, array)
    return array.astype(wanted)


_CASTS = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")


def _list_fits(array: Array, wanted: np.dtype[Any]) -> bool:
    """Tell whether numbers that were written out keep their value: 1 is 1.0, 300 is no int8."""
    if array.dtype.kind == "b" or (array.dtype.kind == "f" and wanted.kind != "f"):
        return False
    if wanted.kind == "f":
        return True
    limits = np.iinfo(wanted)
    return not array.size or bool(array.min() >= limits.min and array.max() <= limits.max)


def _wrong_type(spec: TensorSpec, array: Array) -> UsageError:
    reason = f"input {spec.name!r} must be {spec.dtype}, got {array.dtype.name}"
    return UsageError(reason, f"convert it first, e.g. x.astype({spec.dtype!r})")


def _check_sizes(specs: Sequence[TensorSpec], arrays: Sequence[Array]) -> None:
    sizes: dict[str, tuple[int, str]] = {}
    for spec, array in zip(specs, arrays, strict=True):
        if array.ndim != len(spec.shape):
            reason = f"input {spec.name!r} has shape {list(array.shape)}"
            raise UsageError(reason, f"pass {describe(spec)}")
        for wanted, size in zip(spec.shape, array.shape, strict=True):
            known, first = (
                sizes.setdefault(wanted, (size, spec.name))
                if isinstance(wanted, str)
                else (wanted, "")
            )
            if size == known and size:
                continue
            reason = f"input {spec.name!r} has shape {list(array.shape)}"
            if first and first != spec.name:
                reason += f", but {wanted} is {known} in {first!r}"
            raise UsageError(reason, f"pass {describe(spec)}, no size 0")


# --- checking an engine by its reference ------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One output against what was stored when the engine was built.

    `difference` is the largest absolute difference to the optimized model's output, relative to
    its largest value; `cosine` is to the original model's output, over all elements.
    """

    output: str
    difference: float
    tolerance: float
    cosine: float

    @property
    def ok(self) -> bool:
        """Tell whether the engine still computes what it did; a NaN says no."""
        return self.difference <= self.tolerance


def check(engine: Engine) -> list[Figure]:
    """Run the stored inputs and compare; UsageError where the folder stores none."""
    stored = engine.reference
    inputs = {spec.name: stored.get(f"input.{spec.name}") for spec in engine.signature.needed}
    if not stored or any(array is None for array in inputs.values()):
        raise UsageError(f"{engine.folder} holds no reference inputs", "write the engine again")
    outputs = engine.run(without_exits(engine.signature, inputs))
    specs = engine.signature.outputs
    noise = engine.manifest["facts"].get("integer_noise")
    given = isinstance(noise, float) and noise > 0
    least = min(INTEGERS * noise, MOST) if given else 0.0
    least = max(least, TOLERANCES.get(str(engine.manifest["facts"].get(NARROW)), 0.0))
    pairs = zip(specs, outputs, strict=True)
    return [_figure(spec.name, got, stored, least) for spec, got in pairs]


def _figure(name: str, got: Array, stored: Mapping[str, Array], least: float) -> Figure:
    lacking = [key for key in (f"optimized.{name}", f"original.{name}") if key not in stored]
    if lacking:
        raise UsageError(f"the folder holds no reference {lacking[0]!r}", "write the engine again")
    want, original = stored[f"optimized.{name}"], stored[f"original.{name}"]
    exact = TOLERANCES.get(got.dtype.name, 0.0)
    tolerance = max(exact, least) if exact else exact
    if want.shape != got.shape or want.dtype != got.dtype:
        return Figure(name, float("inf"), tolerance, float("nan"))
    return Figure(name, relative_difference(got, want), tolerance, cosine(got, original))


def relative_difference(got: Array, want: Array) -> float:
    """Return max |got - want| / max |want|; 0 for equal arrays, even where all are 0.

    What is infinite in both, such as a hidden logit, is equal; in one alone it is infinitely far.
    """
    one, other = _but_infinite(got, want)
    if np.array_equal(one, other):
        return 0.0
    scale = float(np.abs(other).max()) or 1.0
    return float(np.abs(one - other).max() / scale) if np.isfinite(scale) else float("inf")


def _but_infinite(got: Array, want: Array) -> tuple[Array, Array]:
    """Return both in float64, with 0 where both are the same infinity."""
    same = np.isinf(want) & (got == want)
    one, other = (np.where(same, 0.0, side.astype(np.float64)) for side in (got, want))
    return one, other


def cosine(got: Array, want: Array) -> float:
    """Return the cosine of the angle between two arrays, NaN where they cannot be compared."""
    if got.shape != want.shape:
        return float("nan")
    one, other = (side.ravel() for side in _but_infinite(got, want))
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths else float("nan")
