"""What the command line prints, and where: one answer on stdout, everything else on stderr."""

import io
import json
import sys
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from effopt.errors import EffoptError
from effopt.plain import clean, clean_lines, json_ready

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


@dataclass(frozen=True)
class Answer:
    """What a command found: as a JSON document, and as text for people."""

    document: dict[str, Any]
    text: str


def print_answer(answer: Answer, as_json: bool, stream: TextIO) -> None:
    """Write the answer: exactly one JSON document, or the text."""
    text = _json(answer.document) if as_json else clean_lines(answer.text.rstrip("\n"))
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a narrow encoding must not cost the answer
    stream.write(f"{text}\n")
    stream.flush()


def print_error(error: BaseException, code: int, as_json: bool, stream: TextIO) -> None:
    """Write an error as one JSON document on `stream`, or as two lines on stderr."""
    if as_json:
        stream.write(f"{_json({'error': _record(error, code)})}\n")
        stream.flush()
        return
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("effopt: interrupted\n")
        return
    if isinstance(error, EffoptError):
        sys.stderr.write(f"effopt: {clean_lines(str(error))}\n")
        return
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" ({frame.filename}:{frame.lineno})" for frame in place)
    first = str(error).strip().split("\n")[0]
    sys.stderr.write(f"effopt: unexpected {type(error).__name__}: {clean(first)}{clean(where)}\n")
    sys.stderr.write("  run with --debug for the traceback\n")


def _record(error: BaseException, code: int) -> dict[str, Any]:
    reason = error.reason if isinstance(error, EffoptError) else str(error)
    return {
        "type": type(error).__name__,
        "reason": reason,
        "remedy": getattr(error, "remedy", ""),
        "node": getattr(error, "node", ""),
        "exit_code": code,
    }


def _json(document: dict[str, Any]) -> str:
    # ensure_ascii spells out every control character, so a terminal is safe here as well
    return json.dumps(json_ready(document), indent=1, allow_nan=False)


class Progress:
    """Tells on stderr which stage has begun: a live line on a terminal, plain lines elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._start = time.perf_counter()
        self._bars: Bars | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was; the stages stay on it."""
        if self._bars is None:
            return
        self._finish()
        self._bars.stop()
        self._bars = None

    def stage(self, name: str) -> None:
        """Say that a stage begins, and with it that the one before has ended."""
        if self._quiet:
            return
        if self._bars is None and sys.stderr.isatty():
            self._bars = _bars()
            self._bars.start()
        if self._bars is None:
            seconds = time.perf_counter() - self._start
            print(f"[{seconds:.1f}s] {clean(name)}", file=sys.stderr, flush=True)
            return
        from rich.markup import escape

        self._finish()
        self._task = self._bars.add_task(escape(clean(name)), total=None)

    def _finish(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, total=1, completed=1)


def _bars() -> "Bars":
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    return Bars(
        SpinnerColumn(finished_text="[green]✓[/green]"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
