"""Every error that effopt raises on purpose, each with the exit code of the command line.

An error says what is wrong, where, why, and what to do instead (the remedy).
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar


class EffoptError(Exception):
    """Base of all errors of effopt: a reason and a remedy, printed on two lines."""

    exit_code: ClassVar[int] = 1

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.reason}\n  remedy: {self.remedy}" if self.remedy else self.reason


class UsageError(EffoptError):
    """A wrong argument: an unknown name, an option out of range, a folder that is no engine."""

    exit_code = 2


class CaptureError(EffoptError):
    """The model cannot be captured as one graph; the reason names the source line."""

    exit_code = 3


class PreconditionError(EffoptError):
    """A pass, rule or backend cannot take this program; nothing was changed.

    `node` is the place: a graph node, with its module path where it has one.
    """

    exit_code = 3

    def __init__(self, node: str, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.args = (node, reason, remedy)
        self.node = node

    def __str__(self) -> str:
        return f"{self.node}: {super().__str__()}"


@contextmanager
def at(place: str) -> Iterator[None]:
    """Name the place in an error of use, such as a weight that is no number."""
    try:
        yield
    except UsageError as error:
        raise PreconditionError(place, error.reason, error.remedy) from error


class VerificationError(EffoptError):
    """A rewritten graph or a built engine is not what it must be."""

    exit_code = 5


class MissingError(EffoptError):
    """An engine, a package or a device that the work needs is not here."""

    exit_code = 6


class UnsafeFileError(EffoptError):
    """A file that could run code, leaves its folder, or is not what its manifest says."""

    exit_code = 7


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Make the error for an unknown name: it offers the nearest known one, else all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return UsageError(f"unknown {kind} {name!r}", remedy)
