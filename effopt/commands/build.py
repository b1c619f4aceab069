"""`effopt build`: the engine of a GPU folder, on the machine that has the GPU."""

import argparse
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effopt.console import Answer, Progress
from effopt.errors import UsageError

if TYPE_CHECKING:
    from effopt.finish import Wish

SUMMARY = "build the engine of a GPU folder, on the machine that has the GPU"
EXAMPLES = """\
  effopt build out/
  effopt build out/ --batch 1,8,64 --length 16,128,512
  effopt build new/ --refit-from out/
  effopt build out/ --only-check
"""

_SWITCHES = {
    "hardware_compatible": "let it run on every GPU from sm_80 on, more slowly",
    "weight_streaming": "let weights stay in the memory of the host while it runs",
    "refit": "let later weights be put into the engine without a build",
}
_NUMBERS = {
    "workspace": ("MIB", None, "memory that one layer may use while it runs (default: all)"),
    "level": ("0-5", 5, "how long to search for fast kernels (default: the library's own)"),
}
"""By name: what to write for it, the largest or None, and what it is."""
RTX = "trt-rtx"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", metavar="DIR", help="engine folder that effopt has written")
    for name, default in (("batch", "1,8,64"), ("length", "from the least to the largest")):
        parser.add_argument(
            f"--{name}",
            metavar="N,N,N",
            type=_sizes,
            help=f"least, best and largest {name}, or one for all (default: {default})",
        )
    for name, text in _SWITCHES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    for name, (metavar, most, text) in _NUMBERS.items():
        kind = partial(_number, most=most)
        parser.add_argument(f"--{name}", metavar=metavar, type=kind, help=text)
    parser.add_argument(
        "--timing-cache", metavar="FILE", help="timings of kernels, read and extended"
    )
    parser.add_argument(
        "--refit-from",
        metavar="DIR",
        type=Path,
        help="put the weights of this folder into the engine of another, built with --refit",
    )
    parser.add_argument(
        "--only-check",
        action="store_true",
        help="build as far as this machine can, without a GPU if need be, and keep nothing",
    )
    parser.add_argument("--rtx", action="store_true", help="build with TensorRT-RTX")


def _sizes(text: str) -> tuple[int, int, int]:
    words = text.split(",")
    sizes = [int(word) if word.strip().isdigit() else 0 for word in words]
    if len(sizes) == 1:
        sizes *= 3
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, and no three such as 1,8,64")
    return sizes[0], sizes[1], sizes[2]


def _number(text: str, most: int | None) -> int:
    if not text.isdecimal() or (most is not None and int(text) > most):
        limits = "on" if most is None else f"to {most}"
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 {limits}")
    return int(text)


def run(arguments: argparse.Namespace, progress: Progress) -> Answer:
    """Build, check and put the engine in place; or build as far as it goes, and keep nothing."""
    from effopt.finish import compile_check, finish

    wish, name = _wish(arguments), RTX if arguments.rtx else ""
    path = Path(arguments.folder)
    if arguments.only_check:
        figures, line = compile_check(path, wish, name, progress.stage)
        document: dict[str, Any] = {"folder": arguments.folder, "built": False, "check": figures}
        return Answer({**document, "line": line}, line)
    found = finish(path, wish, name, progress.stage)
    outputs = [asdict(figure) for figure in found.figures]
    document = {"folder": arguments.folder, "built": True, **found.facts, "outputs": outputs}
    worst = max((figure.difference for figure in found.figures), default=0.0)
    text = (
        f"{found.line}\noutputs are within {worst:.1e} of those that were stored\n"
        f"next:    effopt bench {arguments.folder}"
    )
    return Answer({**document, "line": found.line}, text)


def _wish(arguments: argparse.Namespace) -> "Wish":
    """Gather what was asked for; a level, for one, may be 0."""
    from effopt.finish import Wish

    given = vars(arguments)
    options = {name: True for name in _SWITCHES if given[name]}
    numbers = {name: given[name] for name in _NUMBERS if given[name] is not None}
    cache = given["timing_cache"]
    paths = {"timing_cache": os.path.abspath(cache)} if cache else {}
    sizes = {name: given[name] for name in ("batch", "length") if given[name]}
    wish = Wish(sizes, {**options, **numbers, **paths}, arguments.refit_from)
    if wish.old is not None and (wish.sizes or wish.options or arguments.only_check):
        reason = "--refit-from takes the engine as it was built, and no other option"
        raise UsageError(reason, "leave the others out, or build without --refit-from")
    return wish
