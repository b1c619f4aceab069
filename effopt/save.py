"""save: the engine folder of an optimised model, checked and measured before it is in place."""

import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from effopt import folder as folders
from effopt.apart import check_folder, time_folders
from effopt.backend import Artifact, Backend, Support, as_array, backend
from effopt.engine import Engine, check
from effopt.errors import PreconditionError, VerificationError
from effopt.exits import find_exits, with_thresholds, without_exits
from effopt.fingerprint import fingerprint
from effopt.optimizer import Clock, Optimized, named, refresh
from effopt.program import Program
from effopt.reference import write_reference
from effopt.report import Latency, Report
from effopt.signature import EXIT_INDEX
from effopt.stored import stored_samples
from effopt.target import Target

BASELINE = "exact export"
"""The same model through the same backend with the normal form alone: nothing lossy."""
OURS = "effopt"
BUDGET = 4.0
"""Seconds of timing for each batch size."""
HEAVY = 64 << 20
"""Bytes of weights from which the engine is checked in a process of its own."""

_PORTABLE = "onnx"
"""The backend that runs the files of an engine which is still pending."""

_COPIED = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|special_tokens_map|"
    r"tokenizer|tokenizer_config|vocab|added_tokens)\.json|(vocab|merges)\.txt|"
    r"(spiece|tokenizer|sentencepiece\.bpe)\.model"
)
"""Files of a Hugging Face folder that a user of the engine needs; none of them is code."""


def save(optimized: Optimized, path: Path, measure: bool) -> tuple[Path, Report]:
    """Write the folder of an optimised model; see `Optimized.save`."""
    result = optimized.report

    def fill(fresh: Path) -> folders.Manifest:
        nonlocal result
        manifest, result = _fill(optimized, fresh, measure)
        return manifest

    written = folders.write(path, fill)
    return written, result


def _fill(optimized: Optimized, fresh: Path, measure: bool) -> tuple[folders.Manifest, Report]:
    clock, target = Clock(optimized.clock.listen), optimized.target
    clock.stages += optimized.clock.stages  # of a copy: each save tells its own stages alone
    vendor = backend(target.backend)
    with clock.stage("build"):
        artifact = _build(vendor, optimized.program, optimized.original, target, fresh)
    _copy_config(optimized.source, fresh)
    manifest = _manifest(optimized, optimized.program, artifact, optimized.report)
    folders.seal(fresh, manifest)
    notes, latency = list(optimized.report.notes), tuple[Latency, ...]()
    here = _runnable(vendor, artifact)
    if here.ok:
        with clock.stage("check"):
            _check(vendor, fresh, manifest, optimized.program.weight_bytes() > HEAVY)
        if measure and not artifact.pending:
            latency = _measure(optimized, vendor, fresh, clock)
    elif (note := f"not run here: {here.reason}") not in notes:
        notes.append(note)
    report = refresh(
        optimized.report, clock, latency=latency, pending=artifact.pending, notes=tuple(notes)
    )
    sizes = {item.name: item.stat().st_size for item in sorted(fresh.iterdir())}
    report = replace(report, files={n: s for n, s in sizes.items() if n != folders.MANIFEST})
    (fresh / "report.json").write_text(json.dumps(report.to_json(), indent=1))
    (fresh / "report.html").write_text(report.html(), encoding="utf-8")
    return _manifest(optimized, optimized.program, artifact, report), report


def _runnable(vendor: Backend, artifact: Artifact) -> Support:
    """Tell whether what was built can be run here; a pending engine is run by its files."""
    if artifact.unchecked:
        return Support(False, artifact.unchecked)
    return backend(_PORTABLE).available() if artifact.pending else vendor.available()


def _build(
    vendor: Backend, program: Program, original: Program, target: Target, folder: Path
) -> Artifact:
    """Write the model and the inputs and outputs to check it by."""
    artifact = vendor.build(program, target, folder)
    specs, samples = program.signature.inputs, stored_samples(program, original)
    inputs = {s.name: as_array(t) for s, t in zip(specs, samples, strict=True)}
    before, after = (named(p, p.run(samples)) for p in (original, without_exits(program)))
    if EXIT_INDEX in after:
        before[EXIT_INDEX] = after[EXIT_INDEX]  # the model as it was given goes to its end, too
    write_reference(folder, inputs, before, after)
    return artifact


def _manifest(
    optimized: Optimized, program: Program, artifact: Artifact, report: Report
) -> folders.Manifest:
    record, target = report.to_json(), optimized.target
    facts = {key: fact for key, fact in artifact.facts.items() if key != "tools"}
    return folders.Manifest(
        effopt=report.version,
        target=target.name,
        backend=target.backend,
        signature=with_thresholds(program).with_ports(artifact.ports),
        recipe=report.recipe,
        steps=record["steps"],
        quality={"figures": record["quality"]},
        measured={key: record[key] for key in ("latency", "macs_before", "macs_after", "stages")},
        facts={**facts, **_promised(program), "recipe": optimized.asked},
        tools=dict(artifact.facts.get("tools", {})),
        pending=artifact.pending,
    )


def _promised(program: Program) -> dict[str, Any]:
    """Return what the exits of a program promise; PreconditionError where it changed since."""
    promise = program.promise
    if promise is None:
        return {}
    exits = program.get(find_exits)
    changed = exits is None or tuple(exits.thresholds(program).tolist()) != promise.tau
    if changed or promise.graph != fingerprint(program):
        what = "thresholds were" if changed else "the graph was"
        reason = f"{what} changed after the exits were calibrated, and their promise is void"
        remedy = "put every pass and exit-early in one recipe: calibration comes last by itself"
        raise PreconditionError("model", reason, remedy)
    return {"exits": {"promise": promise.to_json()}}


def _check(vendor: Backend, folder: Path, manifest: folders.Manifest, heavy: bool) -> None:
    """Run the engine on the stored inputs and hold it to the eager result."""
    if heavy:
        figures = check_folder(folder)
    else:
        runner = vendor.load(folder, manifest.signature, manifest.facts)
        figures = check(Engine(folder, manifest, runner))
    for figure in figures:
        if not figure.ok:
            raise VerificationError(
                f"output {figure.output!r} of the engine differs from eager torch by "
                f"{figure.difference:.2e} of its largest value, more than {figure.tolerance:.0e}",
                "this is a defect of the lowering: please report the model",
            )


def _measure(
    optimized: Optimized, vendor: Backend, fresh: Path, clock: Clock
) -> tuple[Latency, ...]:
    """Time the engine against the exact export of the same model, interleaved."""
    from effopt.pipeline import Pipeline
    from effopt.recipe import steps_of

    with tempfile.TemporaryDirectory(prefix="effopt-") as scratch:
        rows = {OURS: fresh}
        if any(record.changed for record in optimized.report.steps[len(steps_of("exact")) :]):
            plain, _ = Pipeline(steps_of("exact")).run(optimized.original)
            base = Path(scratch)
            with clock.stage("build the baseline"):
                artifact = _build(vendor, plain, optimized.original, optimized.target, base)
            folders.seal(base, _manifest(optimized, plain, artifact, optimized.report))
            rows = {BASELINE: base, OURS: fresh}
        with clock.stage("measure"):
            return time_folders(rows, BUDGET)


def _copy_config(source: Path | None, fresh: Path) -> None:
    """Copy a Hugging Face folder's config and tokenizer files as they are."""
    for item in sorted(source.iterdir()) if source else ():
        if _COPIED.fullmatch(item.name) and item.is_file() and not item.is_symlink():
            shutil.copyfile(item, fresh / item.name)
