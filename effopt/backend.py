"""What a backend is: it turns a Program into files, and a folder of files into an Engine.

Free of torch, so that running an engine needs none; backends import what they need inside.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from effopt.errors import unknown
from effopt.signature import Signature
from effopt.target import Target

if TYPE_CHECKING:
    from effopt.program import Program

Array = NDArray[Any]


@dataclass(frozen=True)
class Support:
    """Yes, or no with the reason; reading it as a bare bool would drop the reason, so it raises."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> NoReturn:
        raise TypeError("use .ok, and show .reason where it is False")


YES = Support(True)


@dataclass(frozen=True)
class Artifact:
    """What a build wrote into its folder: file names, and facts for the manifest.

    `ports` maps each input and output name of the signature that had to be renamed in the file.
    `pending` says what is still to be done elsewhere ("engine: to be built on sm_80 ..."), or "";
    `unchecked` why until then nothing here can run what was written, or "".
    """

    files: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    ports: Mapping[str, str] = field(default_factory=dict)
    pending: str = ""
    unchecked: str = ""


class Runner(Protocol):
    """A loaded model file: flat arrays in, flat arrays out, in the order of the signature."""

    def run(self, inputs: list[Array]) -> list[Array]:
        """Run once."""
        ...


class Backend(Protocol):
    """One vendor's way from a Program to a runnable file."""

    name: str

    def available(self) -> Support:
        """Tell whether this machine can run what the backend builds."""
        ...

    def supports(self, program: "Program", target: Target) -> Support:
        """Tell whether the program can be lowered for the target."""
        ...

    def build(self, program: "Program", target: Target, folder: Path) -> Artifact:
        """Write the files of the program into an existing, empty folder."""
        ...

    def load(self, folder: Path, signature: Signature, facts: Mapping[str, Any]) -> Runner:
        """Open what `build` wrote; the folder has been checked already."""
        ...


def backend(name: str) -> Backend:
    """Return the backend of a name; it is imported now."""
    from effopt.backends import TABLE

    if name not in TABLE:
        raise unknown("backend", name, TABLE)
    module, _, attribute = TABLE[name].partition(":")
    made: Backend = getattr(importlib.import_module(module), attribute)()
    return made


def as_array(value: object) -> Array:
    """Turn an input (numpy array, torch tensor, nested list) into a contiguous array."""
    detach = getattr(value, "detach", None)
    plain = detach().cpu().numpy() if callable(detach) else value
    return np.ascontiguousarray(plain)
