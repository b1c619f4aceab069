"""`effopt inspect`: what can be done to a model, where, and why not."""

import argparse
from pathlib import Path

from effopt.commands.convert import add_capture, add_trust
from effopt.console import Answer, Progress
from effopt.errors import UsageError

SUMMARY = "tell what can be done to a model, where, and why not"
EXAMPLES = """\
  effopt inspect ./vit-small
  effopt inspect my.models:make --dynamic batch,length --json
  effopt inspect ./vit-small --svg vit.svg
  effopt inspect --rules
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="Hugging Face folder, .pt2 archive, or package.module:factory",
    )
    add_trust(parser)
    add_capture(parser)
    parser.add_argument(
        "--svg", metavar="FILE", help="also draw the blocks, with the sites marked, into FILE"
    )
    parser.add_argument(
        "--rules", action="store_true", help="list the rules by operator family; takes no MODEL"
    )


def run(arguments: argparse.Namespace, progress: Progress) -> Answer:
    """Explain a model, or list the rules."""
    if arguments.rules:
        return _rules(arguments)
    if arguments.model is None:
        raise UsageError("no MODEL was given", "name a model, or ask for --rules")
    picture = _picture(arguments.svg)
    progress.stage("load model")
    import effopt
    from effopt.models import load_model

    model, inputs = load_model(arguments.model, trust=arguments.trust)
    explanation = effopt.explain(
        model,
        inputs,
        dynamic=arguments.dynamic,
        seed=arguments.seed,
        progress=progress.stage,
    )
    text = explanation.text()
    if picture is not None:
        picture.write_text(explanation.svg(), encoding="utf-8")
        text = f"{text}\nwritten: {picture}\n"
    return Answer(explanation.to_json(), text)


def _rules(arguments: argparse.Namespace) -> Answer:
    if arguments.model is not None or arguments.svg is not None:
        raise UsageError(
            "--rules takes no MODEL and no --svg", "the rules are those of every model"
        )
    from dataclasses import asdict

    from effopt.explain_text import rules_text
    from effopt.rules_table import rules

    rows = rules()
    return Answer({"rules": [asdict(row) for row in rows]}, rules_text(rows))


def _picture(name: str | None) -> Path | None:
    """Check where the picture goes before minutes of work."""
    if name is None:
        return None
    picture = Path(name)
    if picture.suffix != ".svg":
        raise UsageError(f"--svg names {name}", "give a file that ends with .svg")
    if picture.is_dir() or not picture.parent.is_dir():
        raise UsageError(f"{name} cannot be written", "name a file in a folder that exists")
    return picture
