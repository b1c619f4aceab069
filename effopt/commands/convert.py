"""`effopt convert`: a model becomes an engine folder."""

import argparse
from pathlib import Path

from effopt.console import Answer, Progress
from effopt.errors import UsageError

SUMMARY = "make an engine folder of a model"
EXAMPLES = """\
  effopt convert ./vit-small -o out/
  effopt convert ./vit-small -o out/ --target a100 --recipe 'merge-tokens{r=8}'
  effopt convert my.models:make -o out/ --dynamic batch,length
  effopt convert ./vit-small -o out/ --calibration images.npz
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser)
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write")
    parser.add_argument(
        "--target", metavar="T", default="cpu", help="machine to optimise for (default: cpu)"
    )
    parser.add_argument(
        "--recipe",
        metavar="R",
        default="balanced",
        help="a recipe's name, or a spec, see the examples (default: balanced)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help=".npz or .safetensors with one array [samples, ...] for each input of the model; "
        "`labels` beside them are the classes of the samples",
    )
    add_capture(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print the folder only")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare MODEL and --trust."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="Hugging Face folder, .pt2 archive, or package.module:factory",
    )
    add_trust(parser)


def add_capture(parser: argparse.ArgumentParser) -> None:
    """Declare --dynamic and --seed."""
    parser.add_argument(
        "--dynamic",
        metavar="DIMS",
        type=_names,
        default=("batch",),
        help="sizes left open, of batch and length; '' for none (default: batch)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of drawn inputs (default: 0)"
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Declare --trust."""
    parser.add_argument(
        "--trust", action="store_true", help="load a .pt2 archive, which can run code"
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def run(arguments: argparse.Namespace, progress: Progress) -> Answer:
    """Optimise and save; what can be wrong about the arguments is told before the work begins."""
    from effopt.target import target

    output = Path(arguments.output)
    target(arguments.target)
    _check_output(output)
    from effopt.recipe import steps_of

    steps_of(arguments.recipe)
    if arguments.calibration is not None:
        from effopt.arrays import open_arrays

        open_arrays(Path(arguments.calibration))
    progress.stage("load model")
    from effopt.models import load_model

    model, inputs = load_model(arguments.model, trust=arguments.trust)
    from effopt.optimizer import optimize

    optimized = optimize(
        model,
        inputs,
        target=arguments.target,
        recipe=arguments.recipe,
        calibration=arguments.calibration,
        dynamic=arguments.dynamic,
        seed=arguments.seed,
        progress=progress.stage,
    )
    progress.stage("save")
    folder = optimized.save(output)
    report = optimized.report
    pending = bool(report.pending)
    text = f"{folder}" if arguments.quiet else f"{report.text()}\n{_next(folder, pending)}"
    return Answer({"folder": str(folder), "report": report.to_json()}, text)


def _check_output(output: Path) -> None:
    """Refuse a folder that saving would refuse, before minutes of work."""
    from effopt.folder import is_engine

    taken = output.is_symlink() or (output.exists() and not output.is_dir())
    if taken or (output.is_dir() and not is_engine(output) and any(output.iterdir())):
        raise UsageError(f"{output} exists and is no engine folder", "choose another name for it")


def _next(folder: Path, pending: bool) -> str:
    step = f"effopt build {folder}   (on the machine that has the GPU)"
    step = step if pending else f"effopt bench {folder}"
    return f"written: {folder}\nreport:  {folder / 'report.html'}\nnext:    {step}"
