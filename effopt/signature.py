"""What goes into an engine and what comes out, by the model's own names.

Free of torch: the compiler writes a signature into the manifest, a running engine reads it back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from effopt.errors import UnsafeFileError

Size = int | str
"""A fixed size, or the name of a dynamic one ("batch", "length")."""


EXIT_INDEX = "exit_index"
"""The output that says at which exit each row has left, from 1."""

TAU = "tau"
"""The input of an engine that holds the thresholds of its exits."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: `port` is its name in the engine's file where that had to differ.

    `default` is what an input of one dimension holds where it is left out, or None.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    port: str
    default: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the plain record that the manifest holds; what is infinite is written in words."""
        record: dict[str, Any] = {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "port": self.port,
        }
        if self.default is not None:
            record["default"] = [x if isfinite(x) else str(x) for x in self.default]
        return record

    @staticmethod
    def from_json(record: dict[str, Any]) -> "TensorSpec":
        """Read the record back; a wrong type is an UnsafeFileError."""
        try:
            shape = tuple(s if isinstance(s, int) else str(s) for s in record["shape"])
            given = record.get("default")
            default = None if given is None else tuple(float(x) for x in given)
            name, dtype, port = (str(record[key]) for key in ("name", "dtype", "port"))
            return TensorSpec(name, dtype, shape, port, default)
        except (KeyError, TypeError, ValueError) as error:
            raise UnsafeFileError(f"the signature is damaged: {error}") from error


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs in order, and how the outputs nest.

    `structure` is a tree: an int is the place of an output in `outputs`; `{"dict": {key: tree}}`,
    `{"tuple": [tree, ...]}` and `None` nest. A model that returns a bare tensor has `0`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    structure: Any

    @property
    def needed(self) -> tuple[TensorSpec, ...]:
        """The inputs without a default."""
        return tuple(spec for spec in self.inputs if spec.default is None)

    def nest(self, leaves: Sequence[Any]) -> Any:
        """Arrange flat outputs as the model does: a dict or a tuple (of one for a bare tensor)."""
        nested = _nest(self.structure, leaves)
        return (nested,) if isinstance(self.structure, int) else nested

    def with_ports(self, ports: Mapping[str, str]) -> "Signature":
        """Say which outputs have another name in the engine's file."""
        outputs = (replace(spec, port=ports.get(spec.name, spec.name)) for spec in self.outputs)
        return replace(self, outputs=tuple(outputs))

    def extended(self, more: Sequence[TensorSpec]) -> "Signature":
        """Add outputs beside the others: further keys of a mapping, else the end of a tuple."""
        places = range(len(self.outputs), len(self.outputs) + len(more))
        tree = self.structure
        if isinstance(tree, dict) and "dict" in tree:
            names = (spec.name for spec in more)
            wider: Any = {"dict": {**tree["dict"], **dict(zip(names, places, strict=True))}}
        else:
            held = tree["tuple"] if isinstance(tree, dict) else [tree]
            wider = {"tuple": [*held, *places]}
        return Signature(self.inputs, (*self.outputs, *more), wider)

    def to_json(self) -> dict[str, Any]:
        """Return the plain record that the manifest holds."""
        return {
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "structure": self.structure,
        }

    @staticmethod
    def from_json(record: dict[str, Any]) -> "Signature":
        """Read the record back; what is missing or of a wrong type is an UnsafeFileError."""
        try:
            inputs, outputs = record["inputs"], record["outputs"]
            structure = record["structure"]
            return Signature(
                tuple(TensorSpec.from_json(item) for item in inputs),
                tuple(TensorSpec.from_json(item) for item in outputs),
                _checked(structure, len(outputs)),
            )
        except (KeyError, TypeError) as error:
            raise UnsafeFileError(f"the signature is damaged: {error}") from error


def _nest(tree: Any, leaves: Sequence[Any]) -> Any:
    if tree is None:
        return None
    if isinstance(tree, int):
        return leaves[tree]
    if "dict" in tree:
        return {key: _nest(item, leaves) for key, item in tree["dict"].items()}
    return tuple(_nest(item, leaves) for item in tree["tuple"])


def _checked(tree: Any, count: int) -> Any:
    if tree is None:
        return None
    if isinstance(tree, int) and 0 <= tree < count:
        return tree
    if isinstance(tree, dict) and isinstance(tree.get("dict"), dict):
        return {"dict": {str(key): _checked(item, count) for key, item in tree["dict"].items()}}
    if isinstance(tree, dict) and isinstance(tree.get("tuple"), list):
        return {"tuple": [_checked(item, count) for item in tree["tuple"]]}
    raise UnsafeFileError(f"the output structure is damaged at {tree!r}")
