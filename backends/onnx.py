"""The ONNX file: standard operators at one opset, unless it is for onnxruntime on the CPU."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effopt.backend import YES, Artifact, Runner, Support
from effopt.signature import Signature
from effopt.target import Target

if TYPE_CHECKING:
    from effopt.backends.exit_runner import ExitRunner
    from effopt.backends.session import Session
    from effopt.program import Program

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"

_TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir")


def write(
    program: "Program",
    folder: Path,
    provenance: Mapping[str, str] | None = None,
    target: Target | None = None,
) -> Artifact:
    """Write a program into an existing folder; return the files, their facts and ports.

    `model.onnx` (and `model.onnx.data` for large weights), or where its exits are of the form
    "split" a file for each segment, which the fact "split" tells of. `provenance` goes into the
    metadata of the files, beside the version and the passes. `target` says whose forms quantized
    linears get; without one they are in standard operators. Ports are the outputs that are named
    otherwise in the file, as those named like an input.
    Raises PreconditionError, naming the operator, for what standard operators cannot say.
    """
    from effopt.backends.onnx_exits import lower_exits
    from effopt.backends.onnx_file import save
    from effopt.backends.onnx_lower import lower
    from effopt.backends.split import FORM, write_split
    from effopt.exits import find_exits, with_thresholds

    known = {
        "effopt.version": importlib.metadata.version("effopt"),
        "effopt.passes": ",".join(program.history),
        **(provenance or {}),
    }
    kind = target.kind if target else "portable"
    extended, exits = kind == "cpu", program.get(find_exits)
    plugins = target is not None and target.gpu and target.plugins
    signature = with_thresholds(program)
    if exits is not None and exits.form == FORM:
        split = write_split(program, folder, kind, known, extended=extended, plugins=plugins)
        names = [part.file for part in split.segments]
        return _artifact(folder, names, {"split": split.to_json()}, {})
    made = (lower_exits if exits else lower)(program, kind, plugins=plugins)
    ports = save(made, signature, folder, known, extended=extended)
    return _artifact(folder, [MODEL], {}, ports)


def _artifact(
    folder: Path,
    names: Sequence[str],
    facts: Mapping[str, Any],
    ports: Mapping[str, str],
) -> Artifact:
    """Add the weights to the files, and the opset and the versions of the tools to the facts."""
    import onnx

    model = onnx.load(str(folder / names[0]), load_external_data=False)
    (opset,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    tools = {name: importlib.metadata.version(name) for name in _TOOLS}
    weights = [WEIGHTS] if (folder / WEIGHTS).exists() else []
    return Artifact((*names, *weights), {"opset": opset, "tools": tools, **facts}, ports)


def models(artifact: Artifact) -> list[str]:
    """Return the names of the ONNX files among those of a build."""
    return [name for name in artifact.files if name.endswith(".onnx")]


def opened(
    folder: Path,
    signature: Signature,
    facts: Mapping[str, Any],
    *,
    check_only: bool = False,
    kind: str = "cpu",
) -> "Session | ExitRunner":
    """Open what `write` wrote in onnxruntime; options and errors are as with `Session`."""
    from effopt.backends.exit_runner import ExitRunner
    from effopt.backends.session import Session

    if "split" in facts:
        one = partial(Session, check_only=check_only, alone=False, kind=kind)
        return ExitRunner(folder, signature, facts["split"], one)
    return Session(folder / MODEL, signature, check_only=check_only, kind=kind)


class Onnx:
    """Writes the portable file; for a GPU target also checks that TensorRT will take it."""

    name = "onnx"

    def available(self) -> Support:
        """Tell whether onnxruntime is here to run the file; writing it needs nothing more."""
        from effopt.backends.session import runtime

        return runtime()

    def supports(self, program: "Program", target: Target) -> Support:
        """Refuse a model in bfloat16; other limits are found on the file, by `build`."""
        import torch

        for node in program.nodes():
            if getattr(node.meta.get("val"), "dtype", None) is torch.bfloat16:
                reason = f"{node.name} is bfloat16, and arrays of the engine have no such type"
                return Support(
                    False, f"{reason}: convert model.float() with quantize{{scheme=bf16}}"
                )
        return YES

    def build(self, program: "Program", target: Target, folder: Path) -> Artifact:
        """Write the file; PreconditionError names the first node that the target will refuse."""
        made = write(program, folder, {"effopt.target": target.name}, target)
        names = models(made)
        if target.gpu:
            from effopt.backends.onnx_plugins import plugin_nodes
            from effopt.backends.readiness import require

            for name in names:
                require(folder / name, target)
        from_files = ", ".join(names)
        pending = f"engine: to be built on {target.arch} from {from_files}" if target.gpu else ""
        from effopt.backends.quantized import linears
        from effopt.backends.quantized_noise import rounding_noise

        known = {**made.facts, "integer_layers": len(linears(program))}
        if target.gpu:
            known["plugins"] = plugin_nodes([folder / name for name in names])
        if known["integer_layers"]:
            known["integer_noise"] = rounding_noise(program)
        return replace(made, facts=known, pending=pending)

    def load(self, folder: Path, signature: Signature, facts: Mapping[str, Any]) -> Runner:
        """Open the file in onnxruntime, on the CPU, whatever target it was written for."""
        return opened(folder, signature, facts)
