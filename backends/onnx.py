"""The ONNX file: standard operators at one opset, unless it is for onnxruntime on the CPU."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effopt.backend import YES, Artifact, Runner, Support
from effopt.signature import Signature
from effopt.target import Target

if TYPE_CHECKING:
    from effopt.program import Program

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"

_TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir")


def write(
    program: "Program",
    folder: Path,
    provenance: Mapping[str, str] | None = None,
    target: Target | None = None,
) -> dict[str, str]:
    """Write `model.onnx` (and `model.onnx.data` for large weights) into an existing folder.

    `provenance` goes into the file's metadata, beside the version and the passes. `target` says
    whose forms quantized linears get; without one they are in standard operators. Returns the
    outputs that are named otherwise in the file, `{name: name in the file}`: those named like an
    input.
    Raises PreconditionError, naming the operator, for what standard operators cannot say.
    """
    from effopt.backends.onnx_file import save
    from effopt.backends.onnx_lower import lower

    known = {
        "effopt.version": importlib.metadata.version("effopt"),
        "effopt.passes": ",".join(program.history),
        **(provenance or {}),
    }
    kind = target.kind if target else "portable"
    return save(lower(program, kind), program.signature, folder, known, extended=kind == "cpu")


class Onnx:
    """Writes the portable file; for a GPU target also checks that TensorRT will take it."""

    name = "onnx"

    def available(self) -> Support:
        """Tell whether onnxruntime is here to run the file; writing it needs nothing more."""
        from effopt.backends.session import runtime

        return runtime()

    def supports(self, program: "Program", target: Target) -> Support:
        """Say yes: what has no ONNX form, or what the target refuses, only `build` finds out."""
        return YES

    def build(self, program: "Program", target: Target, folder: Path) -> Artifact:
        """Write the file; PreconditionError names the first node that the target will refuse."""
        ports = write(program, folder, {"effopt.target": target.name}, target)
        if target.gpu:
            from effopt.backends.readiness import require

            require(folder / MODEL, target)
        pending = f"engine: to be built on {target.arch} from {MODEL}" if target.gpu else ""
        from effopt.backends.quantized import linears
        from effopt.backends.quantized_noise import rounding_noise

        known = {**facts(folder), "integer_layers": len(linears(program))}
        if known["integer_layers"]:
            known["integer_noise"] = rounding_noise(program)
        return Artifact(written(folder), known, ports, pending)

    def load(self, folder: Path, signature: Signature, facts: Mapping[str, Any]) -> Runner:
        """Open the file in onnxruntime, on the CPU, whatever target it was written for."""
        from effopt.backends.session import Session

        return Session(folder / MODEL, signature)


def written(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that `write` made in a folder."""
    return tuple(name for name in (MODEL, WEIGHTS) if (folder / name).exists())


def facts(folder: Path) -> dict[str, Any]:
    """Return what the manifest should know: the file's opset and the versions of the tools."""
    import onnx

    model = onnx.load(str(folder / MODEL), load_external_data=False)
    (opset,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    tools = {name: importlib.metadata.version(name) for name in _TOOLS}
    return {"opset": opset, "tools": tools}
