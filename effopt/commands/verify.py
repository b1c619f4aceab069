"""`effopt verify`: whether an engine folder is what was written, and still computes it."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from effopt.commands.convert import add_trust
from effopt.console import Answer, Progress
from effopt.errors import VerificationError
from effopt.plain import figure

if TYPE_CHECKING:
    from effopt.engine import Engine, Figure

SUMMARY = "check an engine folder: hashes, signature, numbers"
EXAMPLES = """\
  effopt verify out/
  effopt verify out/ --against ./vit-small
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", metavar="DIR", help="engine folder that effopt has written")
    parser.add_argument(
        "--against", metavar="MODEL", help="run this model, and compare it with the stored outputs"
    )
    add_trust(parser)


def run(arguments: argparse.Namespace, progress: Progress) -> Answer:
    """Check hashes and signature by loading, the numbers by running; raise where they differ."""
    from effopt.engine import check, load

    progress.stage("check files")
    engine = load(arguments.folder)
    progress.stage("check numbers")
    figures = check(engine)
    against = _against(arguments, engine, progress) if arguments.against else {}
    _judge(figures, against)
    count = len(engine.manifest["files"])
    document = {
        "folder": arguments.folder,
        "ok": True,
        "files": count,
        "outputs": [asdict(found) for found in figures],
        "against": against,
    }
    return Answer(document, f"{count} files are as written\n\n{_text(figures, against)}")


def _against(
    arguments: argparse.Namespace, engine: "Engine", progress: Progress
) -> dict[str, float]:
    """Run the model in eager torch on the stored inputs; compare with its stored outputs.

    Returns the largest difference of each output, relative to the largest stored value.
    """
    import torch

    from effopt.capture import DYNAMIC, capture
    from effopt.engine import relative_difference
    from effopt.models import load_model

    progress.stage("load model")
    model, inputs = load_model(arguments.against, trust=arguments.trust)
    progress.stage("run model")
    sizes = {size for spec in engine.signature.inputs for size in spec.shape}
    program = capture(model, inputs, dynamic=[name for name in DYNAMIC if name in sizes])
    stored, signature = engine.reference, program.signature
    if [spec.name for spec in signature.inputs] != [s.name for s in engine.signature.inputs]:
        raise VerificationError(
            f"{arguments.against} takes other inputs than {arguments.folder}",
            "name the model that the folder was made of",
        )
    flat = tuple(torch.tensor(stored[f"input.{spec.name}"]) for spec in signature.inputs)
    outputs = program.run(flat)
    names = [spec.name for spec in signature.outputs]
    return {
        name: relative_difference(output.numpy(), stored[f"original.{name}"])
        for name, output in zip(names, outputs, strict=True)
        if f"original.{name}" in stored
    }


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
