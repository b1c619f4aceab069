"""The grammar of the command line: its commands, their arguments and their help."""

import argparse
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

from effopt.commands import bench, build, convert, inspect, kernels, tables, verify
from effopt.console import Answer, Progress
from effopt.errors import UsageError, unknown


@dataclass(frozen=True)
class Command:
    """One command: its line in the help, its examples, its arguments and its work."""

    summary: str
    examples: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Progress], Answer]


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare nothing."""


def _table(name: str, run: Callable[[argparse.Namespace, Progress], Answer]) -> Command:
    examples = f"  effopt {name}\n  effopt {name} --json\n"
    return Command(f"list the {name}", examples, _no_arguments, run)


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "convert": Command(convert.SUMMARY, convert.EXAMPLES, convert.configure, convert.run),
        "build": Command(build.SUMMARY, build.EXAMPLES, build.configure, build.run),
        "inspect": Command(inspect.SUMMARY, inspect.EXAMPLES, inspect.configure, inspect.run),
        "bench": Command(bench.SUMMARY, bench.EXAMPLES, bench.configure, bench.run),
        "verify": Command(verify.SUMMARY, verify.EXAMPLES, verify.configure, verify.run),
        "passes": _table("passes", tables.passes),
        "recipes": _table("recipes", tables.recipes),
        "targets": _table("targets", tables.targets),
        "kernels": Command(kernels.SUMMARY, kernels.EXAMPLES, kernels.configure, kernels.run),
    }
)

_CODES = """\
exit codes:
  0 done                     1 unexpected error       2 wrong usage
  3 refused, with a reason   5 verification failed    6 engine or device missing
  7 unsafe file            130 interrupted
"""


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError, so that errors look alike and can be JSON."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise UsageError(message, f"see {self.prog} --help")


def read(words: Sequence[str]) -> argparse.Namespace:
    """Read the words of a command line; UsageError names the nearest command for a wrong one."""
    bare = [word for word in words if not word.startswith("-")]
    if bare and bare[0] not in COMMANDS:
        raise unknown("command", bare[0], COMMANDS)
    arguments = _parser().parse_args(words)
    if arguments.command is None and not arguments.version:
        raise UsageError("no command was given", "effopt --help lists them")
    return arguments


def run(arguments: argparse.Namespace) -> Answer:
    """Do what the command line asks for."""
    if arguments.version:
        version = importlib.metadata.version("effopt")
        return Answer({"effopt": version}, f"effopt {version}")
    quiet = getattr(arguments, "quiet", False)
    with Progress(quiet) as progress:
        return COMMANDS[arguments.command].run(arguments, progress)


def _parser() -> Parser:
    examples = "".join(
        command.examples.splitlines(keepends=True)[0] for command in COMMANDS.values()
    )
    parser = Parser(
        prog="effopt",
        description="Make a trained transformer faster, and say what it cost.",
        epilog=f"examples:\n{examples}\n{_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    _add_common(parser, False)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        made = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"examples:\n{command.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.configure(made)
        _add_common(made, argparse.SUPPRESS)
    return parser


def _add_common(parser: argparse.ArgumentParser, default: object) -> None:
    """Declare what may stand before and after the command."""
    parser.add_argument(
        "--json", action="store_true", default=default, help="print one JSON document"
    )
    parser.add_argument(
        "--debug", action="store_true", default=default, help="show tracebacks and warnings"
    )
