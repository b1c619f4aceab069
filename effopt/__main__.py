"""The command line: `effopt COMMAND ...`, also as `python -m effopt`."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TextIO

from effopt.cli import read, run
from effopt.console import Answer, print_answer, print_error
from effopt.errors import EffoptError

INTERRUPTED = 130
UNEXPECTED = 1


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; errors are printed, not raised."""
    given = sys.argv[1:] if words is None else list(words)
    as_json, debug = "--json" in given, "--debug" in given
    stream = sys.stdout
    try:
        _print(_answer(given, debug), as_json, stream)
    except KeyboardInterrupt as error:
        return _failed(error, INTERRUPTED, as_json, debug, stream)
    except EffoptError as error:
        return _failed(error, error.exit_code, as_json, debug, stream)
    except Exception as error:  # noqa: BLE001 - the one place where any error becomes an exit code
        return _failed(error, UNEXPECTED, as_json, debug, stream)
    return 0


def _answer(words: Sequence[str], debug: bool) -> Answer:
    """Read and run; whatever is printed meanwhile goes to stderr, as stdout is for the answer."""
    arguments = read(words)
    with redirect_stdout(sys.stderr), nullcontext() if debug else _quiet():
        return run(arguments)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings, and leave the process as it was: `main` may be called from a program."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _print(answer: Answer, as_json: bool, stream: TextIO) -> None:
    """Print the answer; a reader that has left (`| head`) has what it wants."""
    try:
        print_answer(answer, as_json, stream)
    except BrokenPipeError:
        _silence(stream)


def _failed(error: BaseException, code: int, as_json: bool, debug: bool, stream: TextIO) -> int:
    if debug:
        traceback.print_exception(error)
    try:
        print_error(error, code, as_json, stream)
    except BrokenPipeError:
        _silence(stream)
    return code


def _silence(stream: TextIO) -> None:
    """Point stdout away from the reader that has left, so that Python's own flush is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
