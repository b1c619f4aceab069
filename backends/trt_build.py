"""Asking for a plan: TensorRT works in a process of its own, and whatever ends it is a reason.

The process is `effopt.backends.trt_child`. A refusal of the parser or the builder, a crash, an
endless build and an answer that is none come back as an `Outcome`, never as a traceback.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effopt.backend import YES, Support
from effopt.backends.trt_options import Options
from effopt.errors import EffoptError, MissingError, PreconditionError, UsageError

Sizes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The least, the best and the largest shape of an input."""

CHILD = (sys.executable, "-m", "effopt.backends.trt_child")
PATIENCE = 4 * 3600.0
"""Seconds that a build may take: tactics of large models are timed for hours."""
PARSING = 600.0
"""Seconds that parsing alone may take."""

_TAIL = 2000
_REMEDY = "convert the model with another recipe; if `--recipe exact` fails too, report the model"


@dataclass(frozen=True)
class Request:
    """What to build: `module` is the library's, `plan` the file to write, or None to parse only.

    `archs` names architectures where the library aims ("sm_80"), else it is empty. `profiles` maps
    each input with dynamic sizes, by its name in the file. `old` is a plan to be refitted with the
    weights of the ONNX file, in the place of a build. `plugins` counts the nodes of the file by
    their plugins, and `ptx` maps the stem of each plugin's source to its PTX.
    """

    module: str
    onnx: Path
    plan: Path | None = None
    archs: tuple[str, ...] = ()
    profiles: Mapping[str, Sizes] = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    old: Path | None = None
    plugins: Mapping[str, int] = field(default_factory=dict)
    ptx: Mapping[str, Path] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the plain record that the process reads."""
        return {
            "do": "refit" if self.old else "build",
            "module": self.module,
            "onnx": str(self.onnx),
            "plan": str(self.plan or ""),
            "old": str(self.old or ""),
            "archs": list(self.archs),
            "profiles": dict(self.profiles),
            "options": dict(self.options),
            "plugins": dict(self.plugins),
            "ptx": {stem: str(path) for stem, path in self.ptx.items()},
        }


@dataclass(frozen=True)
class Outcome:
    """What came of a request: figures, or a `reason` with the `node` that it is about.

    `layers` and `plugins` count layers after parsing, `seconds` are by stage ("parse", "build",
    "refit"), `bytes` is the size of the plan, `note` says why functions stand for plugins, or "".
    `kind` says what a refusal is about: "model",
    "option", "arch", "library", "plan" or "process".
    """

    version: str = ""
    layers: int = 0
    plugins: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    bytes: int = 0
    warnings: tuple[str, ...] = ()
    note: str = ""
    reason: str = ""
    node: str = ""
    remedy: str = ""
    kind: str = ""

    @property
    def support(self) -> Support:
        """Yes, or the refusal with its node."""
        place = f"{self.node}: " if self.node else ""
        return Support(False, f"{place}{self.reason}") if self.reason else YES

    def require(self, file: str) -> "Outcome":
        """Return the figures, or raise the error of a refusal; `file` is its place without node.

        UsageError for an option that the library lacks, MissingError for a library or an
        architecture that is not there, else PreconditionError.
        """
        if not self.reason:
            return self
        simple: dict[str, type[EffoptError]] = {"option": UsageError}
        simple |= dict.fromkeys(("library", "arch"), MissingError)
        if self.kind in simple:
            raise simple[self.kind](self.reason, self.remedy)
        raise PreconditionError(self.node or file, self.reason, self.remedy or _REMEDY)


def ask(request: Request, patience: float = PATIENCE, child: Sequence[str] = CHILD) -> Outcome:
    """Parse and build in a process of its own, and tell what came of it.

    The process and all that it has started end with the caller's wait, after `patience` seconds or
    at Ctrl-C. A plan is there whole, or not at all.
    """
    with tempfile.TemporaryDirectory(prefix="effopt-") as scratch:
        folder = Path(scratch)
        asked, answer, said = (folder / name for name in ("request", "result", "said"))
        asked.write_text(json.dumps(request.to_json()))
        with open(said, "wb") as file:
            command = [*child, str(asked), str(answer)]
            process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
            try:
                code: int | None = process.wait(patience)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        outcome = _read(answer, code, said.read_bytes()[-_TAIL:].decode(errors="replace"), patience)
    if outcome.reason and request.plan:
        request.plan.unlink(missing_ok=True)
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children, where it has not ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(answer: Path, code: int | None, said: str, patience: float) -> Outcome:
    if code is None:
        return _died(f"it did not end within {patience:.0f} s")
    if code < 0:
        return _died(f"it died of {_signal(-code)}")
    last = (said.strip().splitlines() or ["no message"])[-1]
    if code:
        return _died(f"it failed: {last}")
    try:
        return _outcome(json.loads(answer.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _died(f"it gave no answer: {last}")


def _died(what: str) -> Outcome:
    return Outcome(reason=f"TensorRT worked in a process of its own, and {what}", kind="process")


def _signal(number: int) -> str:
    known = {item.value: item.name for item in signal.Signals}
    return known.get(number, f"signal {number}")


def _outcome(record: dict[str, Any]) -> Outcome:
    warnings = tuple(map(str, record["warnings"]))
    if "refused" in record:
        refused = record["refused"]
        return Outcome(
            warnings=warnings,
            reason=str(refused["reason"]),
            node=str(refused["node"]),
            remedy=str(refused["remedy"]),
            kind=str(refused["kind"]),
        )
    return Outcome(
        str(record["version"]),
        int(record["layers"]),
        int(record["plugins"]),
        {str(name): float(value) for name, value in record["seconds"].items()},
        int(record["bytes"]),
        warnings,
        str(record["note"]),
    )
