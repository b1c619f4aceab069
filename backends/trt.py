"""TensorRT and TensorRT-RTX: the ONNX files of a GPU target, and the plans built from them.

Files are written and checked anywhere; plans are built where the library and the GPU are, else the
folder says what is pending and `effopt build` does it there. Run without a GPU: everything but
building for the GPU at hand and running a plan.
"""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effopt.backend import Array, Artifact, Runner, Support
from effopt.backends.onnx import MODEL, Onnx, models, opened
from effopt.backends.onnx_check import check_file
from effopt.backends.trt_modules import LIBRARIES, available, card, missing, module_name, require
from effopt.backends.trt_plans import Model, build, compile_check, parse
from effopt.backends.trt_profiles import known_sizes
from effopt.engine import NARROW
from effopt.errors import MissingError
from effopt.finish import ENGINE, Tell, Wish
from effopt.folder import Manifest
from effopt.signature import Signature
from effopt.target import Target, target

if TYPE_CHECKING:
    from effopt.program import Program


class StandIn:
    """The ONNX files in onnxruntime, in the place of an engine that cannot run: `note` says why.

    `flow` is that of exits of the form "split", or None.
    """

    def __init__(self, runner: Runner, note: str) -> None:
        self.note = note
        self.flow = getattr(runner, "flow", None)
        self._runner = runner

    def run(self, inputs: list[Array]) -> list[Array]:
        """Run once, on the CPU."""
        return self._runner.run(inputs)


class Trt:
    """Full TensorRT, 10.x or 11.x, for the GPU that is there."""

    name = "trt"

    def available(self) -> Support:
        """Tell whether the library and a GPU are here; without them the ONNX files run instead."""
        return available(self.name)

    def supports(self, program: "Program", target: Target) -> Support:
        """Say what the ONNX backend does; what TensorRT refuses is found on the file, by `build`.

        Only the file says it: exporting a graph that passes are still to change proves nothing.
        """
        return Onnx().supports(program, target)

    def build(self, program: "Program", target: Target, folder: Path) -> Artifact:
        """Write the ONNX files, check and parse them, and build plans where that can be done here.

        They are checked against the rules of `readiness`, and parsed where TensorRT-RTX is there.
        Raises PreconditionError that names the node which is refused.
        """
        made = Onnx().build(program, target, folder)
        unparsed = next(filter(None, [parse(folder / file) for file in models(made)]), "")
        from effopt.backends.narrow import narrowest
        from effopt.backends.trt_kernels import write_kernels
        from effopt.exits import with_thresholds

        kind = narrowest(program)
        facts = {**made.facts, "sizes": known_sizes(program), **({NARROW: kind} if kind else {})}
        ptx, lacking = write_kernels(folder, made.facts["plugins"], target.arch)
        files = (*made.files, *ptx)
        if missing(self.name) or card().arch != target.arch:
            engine_too = f"engine: to be built on {target.arch} with effopt build"
            pending = "; ".join(filter(None, (engine_too, lacking, unparsed)))
            unchecked = _no_stand_in(facts)
            return replace(made, files=files, facts=facts, pending=pending, unchecked=unchecked)
        signature = with_thresholds(program).with_ports(made.ports)
        engine = build(self.name, Model(folder, signature, facts), Wish(), lambda stage: None)
        files = (*files, *engine.plans.values())
        known = {**facts, ENGINE: engine.to_json()}
        return replace(made, files=files, facts=known, pending=lacking)

    def load(self, folder: Path, signature: Signature, facts: Mapping[str, Any]) -> Runner:
        """Open the plans; where they are not there or cannot run here, a StandIn that says why.

        MissingError where nothing on a CPU can stand in for them.
        """
        why = self._why_not(Model(folder, signature, facts))
        if why and (reason := _no_stand_in(facts)):
            raise MissingError(f"{why}, and {reason}", "build it where the GPU is: effopt build")
        if why:
            runner = opened(folder, signature, facts, kind="gpu")
            lacks = f"; {runner.note}" if runner.note else ""
            return StandIn(runner, f"it runs on the {runner.place} with onnxruntime: {why}{lacks}")
        from effopt.backends.exit_runner import ExitRunner
        from effopt.backends.trt_runner import TrtRunner

        module = module_name(self.name)

        def plan(path: Path, part: Signature) -> Runner:
            return TrtRunner(path.with_suffix(".plan"), part, module)

        if "split" in facts:
            return ExitRunner(folder, signature, facts["split"], plan)
        return plan(folder / MODEL, signature)

    def ready(self, target: Target) -> None:
        """Raise MissingError, in one line, where library, driver or architecture is missing."""
        require(self.name, target.arch)

    def finish(
        self, folder: Path, manifest: Manifest, wish: Wish, tell: Tell
    ) -> tuple[dict[str, Any], str]:
        """Build the plans of a folder in place of those that it has; see `effopt.finish`."""
        for plan in folder.glob("*.plan"):
            plan.unlink()
        model = Model(folder, manifest.signature, manifest.facts)
        _renew_kernels(model, target(manifest.target).arch)
        engine = build(self.name, model, wish, tell)
        where = f"{LIBRARIES[self.name].title} {engine.version} on {engine.device} ({engine.arch})"
        line = f"engine: {where}, {engine.layers} layers, built in {engine.seconds:.0f} s"
        line = f"{line}; {engine.note}" if engine.note else line
        return {ENGINE: engine.to_json()}, line

    def compile_check(
        self, folder: Path, manifest: Manifest, wish: Wish, tell: Tell
    ) -> tuple[dict[str, Any], str]:
        """Build as far as this machine can, and keep nothing; see `trt_plans.compile_check`."""
        model = Model(folder, manifest.signature, manifest.facts)
        return compile_check(self.name, target(manifest.target).arch, model, wish, tell)

    def write_plugins(self, folder: Path, target: Target) -> list[str]:
        """Write all plugins as C++ sources into an empty folder; return the names of the files.

        MissingError where nvcc is not installed.
        """
        from effopt.backends.onnx_plugins import plugins
        from effopt.backends.plugin_cpp import write_source

        return write_source(folder, plugins(), target.arch)

    def _why_not(self, model: Model) -> str:
        """Return why the plans of a folder do not run here, or ""."""
        engine = model.engine()
        if engine is None:
            return "no engine was built yet"
        if lacking := missing(self.name):
            return lacking[0]
        version = importlib.import_module(module_name(self.name)).__version__
        return engine.unfit(str(version), card())


class TrtRtx(Trt):
    """TensorRT-RTX, whose plans name the architectures that they are for."""

    name = "trt-rtx"


def _renew_kernels(model: Model, arch: str) -> None:
    """Compile the PTX of a folder anew; nothing parses one of its files that was not checked."""
    if not model.facts.get("plugins"):  # no file of PTX is read
        for path in model.folder.glob("*.ptx"):
            path.unlink()
        return
    from effopt.backends.onnx_plugins import plugin_nodes
    from effopt.backends.trt_kernels import renew_kernels

    files = [model.folder / file for file, _ in model.parts]
    for file in files:
        check_file(file)
    renew_kernels(model.folder, plugin_nodes(files), arch)


def _no_stand_in(facts: Mapping[str, Any]) -> str:
    """Return why onnxruntime cannot run the files of a folder on a CPU, or ""."""
    narrow = facts.get(NARROW) == "bfloat16"
    return "onnxruntime computes no bfloat16 on a CPU" if narrow else ""
