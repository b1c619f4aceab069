"""optimize: capture, rewrite, measure; and what comes out of it."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from effopt.backend import Array, Support, backend
from effopt.bench import agreement_of, threads
from effopt.calibration import Calibration, read_calibration
from effopt.capture import capture
from effopt.cost import macs
from effopt.errors import MissingError, PreconditionError, UsageError
from effopt.measure import peak_rss_mb
from effopt.memory import give_back
from effopt.pipeline import Pass, Pipeline, Step, spec_of
from effopt.program import Program
from effopt.recipe import steps_of
from effopt.report import Report, Stage, StepRecord
from effopt.roofline import estimates
from effopt.target import Target
from effopt.target import target as find_target

Progress = Callable[[str], None]
EXAMPLES = "the example inputs"


class Clock:
    """Collects the seconds of each stage and tells a listener when one begins."""

    def __init__(self, listen: Progress | None) -> None:
        self.listen = listen
        self.stages: list[Stage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        if self.listen:
            self.listen(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages.append(Stage(name, time.perf_counter() - start))


class Optimized:
    """An optimised model: its program, its report, and `save` for the deployable engine.

    Calling it runs the rewritten graph in eager torch, on the model's own arguments; the speed
    is in the engine that `save` writes and `effopt.load` runs.
    """

    def __init__(
        self,
        original: Program,
        program: Program,
        target: Target,
        report: Report,
        source: Path | None,
        clock: Clock,
        asked: str = "",
    ) -> None:
        self.original = original
        self.program = program
        self.target = target
        self.report = report
        self.source = source
        self.clock = clock
        self.asked = asked or report.recipe

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the rewritten graph in eager torch; the result nests as the model's own."""
        return self.program(*args, **kwargs)

    def save(self, path: str | os.PathLike[str], *, measure: bool = True) -> Path:
        """Write the engine folder: build, check against eager, measure, report.

        `measure=False` leaves the timing out. Raises UsageError for a folder that is taken,
        PreconditionError where the target cannot take the graph, MissingError where the engine's
        package is not installed, VerificationError where the engine's numbers are wrong.
        """
        from effopt.save import save

        folder, self.report = save(self, Path(path), measure)
        return folder


def optimize(
    model: nn.Module | ExportedProgram,
    example_inputs: object = None,
    *,
    target: str = "cpu",
    recipe: str | Sequence[Pass] = "balanced",
    calibration: Iterable[object] | str | os.PathLike[str] | None = None,
    labels: Array | Tensor | None = None,
    dynamic: Sequence[str] = ("batch",),
    seed: int = 0,
    progress: Progress | None = None,
) -> Optimized:
    """Optimise a model for a target.

    `model` is a torch module (in evaluation or training mode, it is left as it is), an exported
    program or a Hugging Face model; `example_inputs` a tensor, a tuple of positional or a dict of
    keyword arguments, or (args, kwargs); a Hugging Face model may leave them out. `recipe` is a
    recipe's name, a spec string or a list of passes. `calibration` is data for the passes that
    calibrate: an iterable of batches, each nested as the example inputs, or the path of a .npz or
    .safetensors file with one array [samples, ...] for each input (`effopt.calibration`); all of
    it is checked before the passes run. `labels` [samples], integers in the order of the
    calibration data, are the classes of its samples, for passes that ask for them; a file may hold
    them as an array of that name. `dynamic` names the sizes that stay free.
    `progress` is called with each stage's name as it begins.

    Raises UsageError, CaptureError, PreconditionError where a pass that was asked for by name
    must refuse or the target cannot take the model, or MissingError where the runtime of the
    target "cpu" is not installed.

    >>> optimized = effopt.optimize(model, target="cpu", recipe="merge-tokens{r=8}")
    """
    wanted, steps, clock = find_target(target), steps_of(recipe), Clock(progress)
    _need_runtime(wanted)
    with clock.stage("capture"):
        original = capture(model, example_inputs, dynamic=dynamic, seed=seed)
        original.target = wanted
    if not (taken := backend(wanted.backend).supports(original, wanted)).ok:
        raise PreconditionError("model", *_refusal(taken))
    original.calibration = _data(original, calibration, labels, clock)
    program, records = Pipeline(steps).run(original, progress)
    clock.stages += [Stage(record.spec, record.seconds) for record in records]
    report = Report(
        model=type(model).__name__,
        target=wanted.name,
        recipe=",".join(spec_of(step.run) for step in steps),
        steps=records,
        notes=(
            *(*_fixed_batch(model, original, dynamic), *_calibrated(original)),
            *_notes(steps, records),
        ),
    )
    report = _measured(report, original, program, clock)
    asked = recipe if isinstance(recipe, str) else ""
    return Optimized(original, program, wanted, report, _folder_of(model), clock, asked)


def _need_runtime(wanted: Target) -> None:
    """Raise MissingError where the engine is for this machine, which cannot run it."""
    if wanted.name == "cpu" and not (here := backend(wanted.backend).available()).ok:
        raise MissingError(*_refusal(here))


def _data(
    program: Program, given: object, labels: Array | Tensor | None, clock: Clock
) -> Calibration | None:
    """Read the calibration data, where there are any."""
    if given is None and labels is not None:
        reason = "there are labels, and no calibration data that they are of"
        raise UsageError(reason, "pass calibration= too")
    if given is None:
        return None
    with clock.stage("calibration data"):
        return read_calibration(given, program, labels=labels)


def _measured(report: Report, original: Program, program: Program, clock: Clock) -> Report:
    """Add what both programs compute and cost."""
    with clock.stage("quality"):
        before = named(original, original.run(original.samples))
        after = named(program, program.run(original.samples))
        give_back()
    return refresh(
        report,
        clock,
        version=importlib.metadata.version("effopt"),
        environment=_environment(),
        macs_before=_known_macs(original),
        macs_after=_known_macs(program),
        weight_bytes=program.weight_bytes(),
        estimates=estimates(original, program, program.target) if program.target else (),
        quality=tuple(agreement_of(before, after, EXAMPLES)),
    )


def _refusal(support: Support) -> tuple[str, str]:
    """Part a backend's refusal in its reason and, after a colon, its remedy."""
    reason, _, remedy = support.reason.partition(": ")
    return reason, remedy or "choose another target: `effopt targets` lists them"


def _known_macs(program: Program) -> int:
    """Count the multiply-adds; 0 where a size depends on the data, so that nobody can."""
    try:
        return macs(program)
    except PreconditionError:
        return 0


def _fixed_batch(model: object, program: Program, dynamic: Sequence[str]) -> tuple[str, ...]:
    fixed = isinstance(model, ExportedProgram) and "batch" not in program.dynamic.values()
    return ("the exported program fixes its batch",) if fixed and "batch" in dynamic else ()


def _calibrated(program: Program) -> tuple[str, ...]:
    return (program.calibration.describe(),) if program.calibration is not None else ()


def named(program: Program, outputs: Sequence[Tensor]) -> dict[str, Any]:
    """Return outputs as numpy arrays by name; bfloat16, which numpy lacks, as float32."""
    specs = program.signature.outputs
    known = (out.float() if out.dtype == torch.bfloat16 else out for out in outputs)
    return {s.name: out.detach().numpy() for s, out in zip(specs, known, strict=True)}


def _notes(steps: Sequence[Step], records: Sequence[StepRecord]) -> tuple[str, ...]:
    lossy = any(r.changed and not s.run.exact for r, s in zip(records, steps, strict=True))
    notes = [f"left out: {record.spec}: {record.skipped}" for record in records if record.skipped]
    if lossy:
        notes.append(
            "quality was measured on the example inputs alone: measure it on your own data "
            "before you deploy"
        )
    return tuple(notes)


def _environment() -> dict[str, str | int]:
    tools = {name: importlib.metadata.version(name) for name in ("torch", "onnx")}
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads": threads(),
        **tools,
    }


def _folder_of(model: object) -> Path | None:
    """Return the folder that a Hugging Face model was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(name) if isinstance(name, str) and name and Path(name).is_dir() else None


def refresh(report: Report, clock: Clock, **changes: Any) -> Report:
    """Return a report with what is known since."""
    return replace(report, stages=tuple(clock.stages), peak_rss_mb=peak_rss_mb(), **changes)
