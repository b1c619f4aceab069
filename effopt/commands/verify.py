"""`effopt verify`: whether an engine folder is what was written, and still computes it."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effopt.commands.convert import add_trust
from effopt.console import Answer, Progress
from effopt.errors import VerificationError
from effopt.plain import figure

if TYPE_CHECKING:
    from effopt.backend import Array
    from effopt.engine import Engine, Figure
    from effopt.exit_verify import ExitCheck, Feeds
    from effopt.program import Program

SUMMARY = "check an engine folder: hashes, signature, numbers, the promise of its exits"
EXAMPLES = """\
  effopt verify out/
  effopt verify out/ --against ./vit-small
  effopt verify out/ --data new.npz
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", metavar="DIR", help="engine folder that effopt has written")
    parser.add_argument(
        "--against", metavar="MODEL", help="run this model, and compare it with the stored outputs"
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        help=".npz or .safetensors of new rows, an array [samples, ...] an input: judge by them "
        "whether early exits keep their promise; a promise of errors needs `labels` beside them",
    )
    add_trust(parser)


def run(arguments: argparse.Namespace, progress: Progress) -> Answer:
    """Check hashes and signature by loading, the numbers by running; raise where they differ."""
    from effopt.engine import check, load

    progress.stage("check files")
    engine = load(arguments.folder)
    progress.stage("check numbers")
    figures = check(engine)
    original = _original(arguments, engine, progress) if arguments.against else None
    against = _against(original, engine) if original else {}
    _judge(figures, against)
    exits = _exits(arguments.data, engine, original, progress) if arguments.data else None
    count = len(engine.manifest["files"])
    document = {
        "folder": arguments.folder,
        "ok": True,
        "files": count,
        "outputs": [asdict(found) for found in figures],
        "against": against,
        "notes": [engine.note] if engine.note else [],
        **({"exits": exits.to_json()} if exits else {}),
    }
    note = f"{engine.note}\n" if engine.note else ""
    text = f"{count} files are as written\n{note}\n{_text(figures, against)}"
    return Answer(document, f"{text}\n{exits.text()}" if exits else text)


def _original(arguments: argparse.Namespace, engine: "Engine", progress: Progress) -> "Program":
    """Load the model that the folder was made of."""
    from effopt.capture import DYNAMIC, capture
    from effopt.models import load_model

    progress.stage("load model")
    model, inputs = load_model(arguments.against, trust=arguments.trust)
    progress.stage("run model")
    sizes = {size for spec in engine.signature.inputs for size in spec.shape}
    program = capture(model, inputs, dynamic=[name for name in DYNAMIC if name in sizes])
    names = [spec.name for spec in program.signature.inputs]
    if names != [spec.name for spec in engine.signature.needed]:
        raise VerificationError(
            f"{arguments.against} takes other inputs than {arguments.folder}",
            "name the model that the folder was made of",
        )
    return program


def _outputs(program: "Program", inputs: "Feeds") -> "dict[str, Array]":
    """Run the model in eager torch on inputs by name."""
    import torch

    from effopt.backend import as_array

    flat = tuple(torch.tensor(inputs[spec.name]) for spec in program.signature.inputs)
    outputs = (x.float() if x.dtype == torch.bfloat16 else x for x in program.run(flat))
    names = [spec.name for spec in program.signature.outputs]
    return {name: as_array(output) for name, output in zip(names, outputs, strict=True)}


def _against(program: "Program", engine: "Engine") -> dict[str, float]:
    """Run the model on the stored inputs; compare with its stored outputs.

    Returns the largest difference of each output, relative to the largest stored value.
    """
    from effopt.engine import relative_difference

    stored = engine.reference
    inputs = {spec.name: stored[f"input.{spec.name}"] for spec in engine.signature.needed}
    return {
        name: relative_difference(output, stored[f"original.{name}"])
        for name, output in _outputs(program, inputs).items()
        if f"original.{name}" in stored
    }


def _exits(
    data: Path, engine: "Engine", original: "Program | None", progress: Progress
) -> "ExitCheck":
    """Judge the promise of the exits by new data; VerificationError where it is contradicted."""
    from functools import partial

    from effopt.exit_verify import verify_exits

    progress.stage("check exits")
    found = verify_exits(engine, data, partial(_outputs, original) if original else None)
    if found.contradicted:
        remedy = "calibrate again, on data like these"
        raise VerificationError(found.why(), remedy)
    return found


def _judge(figures: "list[Figure]", against: dict[str, float]) -> None:
    """Raise VerificationError for the first output that is not what it was."""
    for found in figures:
        if not found.ok:
            raise VerificationError(
                f"{found.output} differs from what was stored by {found.difference:.3g} of its "
                f"largest value, above {found.tolerance:.3g}",
                "build the engine again on this machine",
            )
    limits = {found.output: found.tolerance for found in figures}
    for name, difference in against.items():
        if not difference <= limits[name]:
            raise VerificationError(
                f"{name} of the model differs from the stored original by {difference:.3g} of its "
                f"largest value, above {limits[name]:.3g}",
                "name the model that the folder was made of",
            )


def _text(figures: "list[Figure]", against: dict[str, float]) -> str:
    from effopt.report_text import plain_table

    columns = ["output", "engine", "allowed", "cosine"]
    columns += ["model"] if against else []
    rows: list[list[Any]] = [
        [
            found.output,
            f"{found.difference:.1e}",
            f"{found.tolerance:.1e}",
            figure(found.cosine, 5),
            *([f"{against[found.output]:.1e}"] if found.output in against else []),
        ]
        for found in figures
    ]
    return plain_table(
        "Largest difference to the stored outputs, relative to their largest value",
        columns,
        rows,
    )
