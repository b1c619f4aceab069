"""`effopt bench`: how fast an engine folder is here, alone or against another."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effopt.commands.convert import add_trust
from effopt.console import Answer, Progress

if TYPE_CHECKING:
    from effopt.engine import Engine
    from effopt.report import Latency, Quality, Report

SUMMARY = "time an engine folder, alone or against another"
EXAMPLES = """\
  effopt bench out/ --against ./vit-small
  effopt bench out/ --against other/ --batch 1,8 --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", metavar="DIR", help="engine folder that effopt has written")
    parser.add_argument(
        "--against",
        metavar="MODEL|DIR",
        help="baseline: another engine folder, or a model, whose plain export is timed",
    )
    parser.add_argument(
        "--batch", metavar="N,N", type=_batches, help="batch sizes (default: 1,8 where open)"
    )
    parser.add_argument(
        "--seconds", metavar="S", type=_seconds, default=20.0, help="for each batch (default: 20)"
    )
    add_trust(parser)


def _batches(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(word) for word in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of batch sizes such as 1,8")
    return tuple(dict.fromkeys(sizes))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above zero")
    return seconds


def run(arguments: argparse.Namespace, progress: Progress) -> Answer:
    """Time the engines interleaved, on the stored inputs, and compare their outputs."""
    from effopt.bench import batches
    from effopt.engine import load

    progress.stage("load engine")
    engine = load(arguments.folder)
    sizes = arguments.batch or batches(engine)
    with tempfile.TemporaryDirectory(prefix="effopt-") as scratch:
        engines = _baseline(arguments, engine, Path(scratch), progress)
        engines[_name(arguments.folder, engines)] = engine
        report = _measured(engines, sizes, arguments.seconds, progress)
    return Answer(_document(arguments.folder, report), report.text())


def _name(path: str, taken: dict[str, "Engine"]) -> str:
    """Call an engine by its folder's name, by its whole path where two have the same name."""
    name = Path(os.path.abspath(path)).name
    return path if name in taken else name


def _baseline(
    arguments: argparse.Namespace, engine: "Engine", scratch: Path, progress: Progress
) -> dict[str, "Engine"]:
    """Load the other folder, or make the plain export of a model, which no lossy pass touches.

    It gets the backend, the target and the options of the engine, where that runs on its device.
    """
    from effopt.engine import load
    from effopt.folder import is_engine

    against = arguments.against
    if not against:
        return {}
    if is_engine(Path(against)):
        return {_name(against, {}): load(against)}
    from effopt.models import load_model
    from effopt.optimizer import optimize

    progress.stage("load model")
    model, inputs = load_model(against, trust=arguments.trust)
    machine = str(engine.manifest["target"]) if _on_device(engine) else "cpu"
    exact = optimize(model, inputs, target=machine, recipe="exact", progress=progress.stage)
    progress.stage("export the baseline")
    folder = exact.save(scratch / "exact", measure=False)
    if _on_device(engine):
        from effopt.finish import finish_like

        folder = finish_like(folder, engine.manifest, progress.stage)
    return {f"exact export of {_name(against, {})}": load(folder)}


def _on_device(engine: "Engine") -> bool:
    """Tell whether an engine was built for a device and runs on it."""
    from effopt.finish import ENGINE

    return ENGINE in engine.manifest["facts"] and not engine.note


def _measured(
    engines: dict[str, "Engine"], sizes: tuple[int, ...], seconds: float, progress: Progress
) -> "Report":
    from effopt.bench import agreement, threads, time_engines, turns
    from effopt.report import Report

    engine, base = list(engines.values())[-1], next(iter(engines.values()))
    latency: list[Latency] = []
    quality: list[Quality] = []
    for batch in sizes:
        progress.stage(f"time batch {batch}")
        inputs = turns(engine, batch)
        latency += time_engines(engines, inputs, batch, seconds)
        if base is not engine:
            quality += agreement(base, engine, inputs[0], f"stored inputs, batch {batch}")
    return Report(
        model=engine.folder.name,
        target=str(engine.manifest["target"]),
        recipe=str(engine.manifest["recipe"]),
        version=str(engine.manifest["effopt"]),
        environment={"threads": threads()},
        latency=tuple(latency),
        quality=tuple(quality),
        pending=str(engine.manifest["pending"]),
        notes=_notes(engine),
    )


def _notes(engine: "Engine") -> tuple[str, ...]:
    """Say so where the times are not those of the machine that the folder was made for."""
    from effopt.target import target

    made_for = target(str(engine.manifest["target"]))
    if made_for.arch == "cpu" or _on_device(engine):
        return ()
    where = f"its target {made_for.name} ({made_for.arch})" if made_for.gpu else "an engine"
    note = f"these are times of the ONNX file in onnxruntime, not of {where}"
    return (note, engine.note) if engine.note else (note,)


def _document(folder: str, report: "Report") -> dict[str, Any]:
    record = report.to_json()
    kept = ("target", "recipe", "environment", "latency", "quality", "pending", "notes")
    return {"folder": folder, **{name: record[name] for name in kept}}
