"""`effopt kernels`: our operators, what stands for each on a GPU, and its C++ sources."""

import argparse
import sys
from pathlib import Path
from typing import Any

from effopt.console import Answer, Progress
from effopt.errors import UsageError

SUMMARY = "list the kernels, or write the plugins of TensorRT in C++"
EXAMPLES = """\
  effopt kernels
  effopt kernels --json
  effopt kernels -o plugins/ --target a100
"""
TARGET = "a100"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="new folder for the C++ sources of all plugins, to compile for trtexec and C++",
    )
    parser.add_argument(
        "--target", metavar="T", help=f"GPU that the sources are for (default: {TARGET})"
    )


def run(arguments: argparse.Namespace, progress: Progress) -> Answer:
    """List the kernels; with a folder, write the sources there."""
    wanted = arguments.target
    if arguments.output:
        return _written(Path(arguments.output), TARGET if wanted is None else wanted, progress)
    if wanted is not None:
        reason = "--target says what C++ sources are for, and no folder is given for them"
        raise UsageError(reason, "add -o DIR, or leave --target out: the list is of all targets")
    from effopt.kernel import kernels
    from effopt.plugin import FLOATS
    from effopt.report_text import plain_table

    records = [_record(op, found.plugin) for op, found in kernels().items()]
    rows = [(r["name"], r["plugin"] or "-", r["summary"]) for r in records]
    title = f"Kernels (plugins in {', '.join(FLOATS)})"
    text = plain_table(title, ("operator", "plugin", "what it does"), rows)
    return Answer({"kernels": records}, text)


def _record(op: Any, plugin: Any) -> dict[str, Any]:
    name = op._schema.name.split("::")[1]
    module = sys.modules[f"effopt.backends.kernels.{name}"]
    return {
        "name": name,
        "schema": str(op._schema),
        "summary": str(module.__doc__).split(": ", 1)[1].split("\n")[0].rstrip("."),
        "plugin": plugin.name if plugin else None,
        "source": f"{plugin.stem}.cu" if plugin else None,
    }


def _written(folder: Path, name: str, progress: Progress) -> Answer:
    from effopt.finish import finisher
    from effopt.target import target

    made_for = target(name)
    if not made_for.gpu:
        raise UsageError(f"{name} is no GPU", "give one, such as a100: `effopt targets` lists them")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already", "give a folder that is new or empty")
    folder.mkdir(parents=True, exist_ok=True)
    progress.stage("compile kernels")
    files = finisher(made_for.backend).write_plugins(folder, made_for)
    document = {"folder": str(folder), "arch": made_for.arch, "files": files}
    return Answer(document, f"{folder}: {len(files)} files for {made_for.arch}; see its README.md")
