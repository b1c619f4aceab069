"""The command as a process: help at once, a reader that leaves, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def process(*words: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from effopt.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as error: assert error.code == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'onnx', 'onnxruntime', 'transformers'}\n"
        "sys.exit(f'loaded: {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)\n"
    )
    done = process("-c", code)
    assert done.returncode == 0, done.stderr
    assert "exit codes:" in done.stdout
    assert done.stderr == ""


def test_each_command_has_help_with_examples() -> None:
    done = process("-m", "effopt", "bench", "--help")
    assert done.returncode == 0
    assert "examples:\n  effopt bench" in done.stdout


def test_a_reader_that_leaves_is_no_error() -> None:
    read, wrote = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "effopt", "targets"]
    done = subprocess.run(command, stdout=wrote, stderr=subprocess.PIPE, text=True, check=False)
    os.close(wrote)
    assert done.stderr == ""
    assert done.returncode == 0


def test_a_narrow_encoding_does_not_cost_the_answer() -> None:
    done = process("-m", "effopt", "targets", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert "rtx4090" in done.stdout


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import sys, time\n"
        "def make(): print('sleeping', file=sys.stderr, flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "effopt", "convert", "slow:make", "-o", "out", "--json"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as started:
        assert started.stderr is not None
        while "sleeping" not in (line := started.stderr.readline()):
            assert line, "it ended before the factory ran"
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert err == ""
    assert json.loads(out)["error"]["exit_code"] == 130
    assert {path.name for path in tmp_path.iterdir()} <= {"slow.py", "__pycache__"}
