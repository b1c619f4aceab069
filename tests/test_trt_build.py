"""The process that builds plans, as its caller sees it: whatever ends it is a reason."""

import signal
import sys
import time
from pathlib import Path

import pytest

from effopt.backends.trt_build import Outcome, Request, ask
from effopt.errors import MissingError, PreconditionError, UsageError

DONE = (
    '{"version": "10.16.1", "layers": 3, "plugins": 1, "bytes": 4, "seconds": {"build": 1.5}, '
    '"note": "", '
)


def outcome(folder: Path, lines: str, patience: float = 60.0) -> Outcome:
    """Ask a process that does what the lines say; `answer` and `plan` are paths there."""
    plan = folder / "model.plan"
    head = f"import os, sys, time\nanswer, plan = sys.argv[2], {str(plan)!r}\n"
    script = folder / "child.py"
    script.write_text(head + lines)
    request = Request("tensorrt", folder / "model.onnx", plan)
    return ask(request, patience, (sys.executable, str(script)))


def test_figures_come_back(tmp_path: Path) -> None:
    found = outcome(tmp_path, f"open(answer, 'w').write('''{DONE}\"warnings\": [\"slow\"]}}''')")
    assert found.support.ok
    assert found == Outcome("10.16.1", 3, 1, {"build": 1.5}, 4, ("slow",), "")
    assert found.require("model.onnx") is found


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("os.kill(os.getpid(), 11)", "it died of SIGSEGV"),
        ("os.abort()", "it died of SIGABRT"),
        ("raise SystemExit('no memory left')", "it failed: no memory left"),
        ("1 / 0", "it failed: ZeroDivisionError: division by zero"),
        ("pass", "it gave no answer: no message"),
        ("open(answer, 'w').write('garbage')", "it gave no answer: no message"),
        ("print('last words'); open(answer, 'w').write('[1]')", "it gave no answer: last words"),
        (f"open(answer, 'w').write('''{DONE}\"layers\": null}}''')", "it gave no answer"),
        ("open(answer, 'wb').write(bytes(range(256)))", "it gave no answer"),
    ],
)
def test_what_ends_the_process_is_a_reason(tmp_path: Path, lines: str, reason: str) -> None:
    found = outcome(tmp_path, f"open(plan, 'w').write('half')\n{lines}")
    assert reason in found.support.reason
    assert found.kind == "process"
    assert not (tmp_path / "model.plan").exists(), "half a plan is none"
    with pytest.raises(PreconditionError, match="in a process of its own") as caught:
        found.require("model.onnx")
    assert caught.value.node == "model.onnx"
    assert "--recipe exact" in caught.value.remedy


def test_an_endless_build_ends_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    lines = f"if not os.fork(): open({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    found = outcome(tmp_path, lines, patience=3.0)
    assert found.reason.endswith("it did not end within 3 s")
    while _alive(int(pid.read_text())):  # the test's own time limit ends this
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    """Tell whether a process runs; one that only waits to be counted does not."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_ctrl_c_ends_the_process(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    parent = f"open({str(pid)!r}, 'w').write(str(os.getpid())); os.kill(os.getppid(), 2)"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            outcome(tmp_path, f"{parent}\ntime.sleep(600)")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not _alive(int(pid.read_text()))


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("option", UsageError),
        ("library", MissingError),
        ("arch", MissingError),
        ("model", PreconditionError),
        ("plan", PreconditionError),
    ],
)
def test_a_refusal_is_the_error_of_its_kind(kind: str, error: type[Exception]) -> None:
    found = Outcome(reason="it does not", node="n (Op)", remedy="do this", kind=kind)
    assert found.support.reason == "n (Op): it does not"
    with pytest.raises(error, match="it does not\n  remedy: do this"):
        found.require("model.onnx")
