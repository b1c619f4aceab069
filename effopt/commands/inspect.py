"""`effopt inspect`: what can be done to a model, where, and why not."""

import argparse

from effopt.commands.convert import add_capture, add_model
from effopt.console import Answer, Progress

SUMMARY = "tell what can be done to a model, where, and why not"
EXAMPLES = """\
  effopt inspect ./vit-small
  effopt inspect my.models:make --dynamic batch,length --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser)
    add_capture(parser)


def run(arguments: argparse.Namespace, progress: Progress) -> Answer:
    """Capture the model and explain it."""
    progress.stage("load model")
    import effopt
    from effopt.models import load_model

    model, inputs = load_model(arguments.model, trust=arguments.trust)
    progress.stage("explain")
    explanation = effopt.explain(model, inputs, dynamic=arguments.dynamic, seed=arguments.seed)
    return Answer(explanation.to_json(), explanation.text())
