"""The oracle: a Program run as it is, in eager torch; every other backend is compared with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from effopt.backend import YES, Array, Artifact, Support, as_array
from effopt.errors import UsageError
from effopt.signature import Signature
from effopt.target import Target

if TYPE_CHECKING:
    from effopt.program import Program

_REASON = "eager torch has no engine file: it runs a program in memory only"


class Eager:
    """Runs a program without lowering it; it builds and loads nothing."""

    name = "eager"

    def available(self) -> Support:
        """Say yes: torch is what effopt itself needs."""
        return YES

    def supports(self, program: "Program", target: Target) -> Support:
        """Refuse to lower, with the reason."""
        return Support(False, _REASON)

    def build(self, program: "Program", target: Target, folder: Path) -> Artifact:
        """Raise UsageError: there is nothing to write."""
        raise _error()

    def load(self, folder: Path, signature: Signature, facts: Mapping[str, Any]) -> NoReturn:
        """Raise UsageError: there is nothing to read."""
        raise _error()

    def runner(self, program: "Program") -> "EagerRunner":
        """Return a runner over the program itself."""
        return EagerRunner(program)


class EagerRunner:
    """Flat arrays in, flat arrays out, through torch on the CPU."""

    def __init__(self, program: "Program") -> None:
        """Keep the program; it is read at each run, so later rewrites count."""
        self._program = program

    def run(self, inputs: list[Array]) -> list[Array]:
        """Run once."""
        import torch

        outputs = self._program.run(tuple(torch.from_numpy(array) for array in inputs))
        return [as_array(output) for output in outputs]


def _error() -> UsageError:
    return UsageError(_REASON, "use the backend 'ort' or 'onnx'")
