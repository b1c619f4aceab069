"""onnxruntime on the CPU: its ONNX file, loaded once to see that it runs, and runs fast."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effopt.backend import YES, Artifact, Runner, Support
from effopt.backends.onnx import Onnx, models, opened
from effopt.backends.session import runtime
from effopt.errors import MissingError
from effopt.signature import Signature
from effopt.target import Target

if TYPE_CHECKING:
    from effopt.program import Program


class Ort:
    """Builds an ONNX file and runs it in onnxruntime."""

    name = "ort"

    def available(self) -> Support:
        """Tell whether onnxruntime is installed."""
        return runtime()

    def supports(self, program: "Program", target: Target) -> Support:
        """Refuse bfloat16, which onnxruntime has no CPU operators for."""
        import torch

        for node in program.nodes():
            if getattr(node.meta.get("val"), "dtype", None) is torch.bfloat16:
                reason = f"{node.name} is bfloat16, which onnxruntime cannot run on a CPU"
                return Support(False, f"{reason}: convert the model with .float()")
        return YES

    def build(self, program: "Program", target: Target, folder: Path) -> Artifact:
        """Write the file and load it once; MissingError where onnxruntime is not installed.

        VerificationError names a quantized linear that onnxruntime does not run on integers.
        """
        here = runtime()
        if not here.ok:
            raise MissingError(*here.reason.split(": ", 1))
        from effopt.backends.fused_check import check_fused
        from effopt.backends.quantized import linears
        from effopt.exits import with_thresholds
        from effopt.memory import give_back
        from effopt.program import where

        made = Onnx().build(program, target, folder)
        signature = with_thresholds(program).with_ports(made.ports)
        opened(folder, signature, made.facts, check_only=True)
        if found := linears(program):
            files = [folder / name for name in models(made)]
            check_fused(files, {node.name: where(node) for node in found})
        give_back()  # the sessions held the weights
        import onnxruntime  # the package may be onnxruntime-gpu: only the module knows

        tools = {**made.facts["tools"], "onnxruntime": str(onnxruntime.__version__)}
        return replace(made, facts={**made.facts, "tools": tools})

    def load(self, folder: Path, signature: Signature, facts: Mapping[str, Any]) -> Runner:
        """Open the file; UnsafeFileError where it is no plain model."""
        return opened(folder, signature, facts)
