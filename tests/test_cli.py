"""The command line: exit codes, one JSON document, and nothing printed where it does not belong."""

import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import effopt
from effopt import console
from effopt.__main__ import main
from effopt.errors import CaptureError, EffoptError, MissingError, PreconditionError
from effopt.folder import Manifest, write
from effopt.reference import write_reference
from effopt.report import Report
from effopt.signature import Signature, TensorSpec

EVIL = "</script>\x1b[2J[red]"


def write_engine(path: Path, scale: float = 2.0, batch: int | str = "batch", **more: Any) -> Path:
    """Write an engine folder that cli_doubles its input."""

    def fill(folder: Path) -> Manifest:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])
        y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 4])
        two = helper.make_tensor("two", TensorProto.FLOAT, [], [scale])
        node = helper.make_node("Mul", ["x", "two"], ["logits"])
        graph = helper.make_graph([node], "double", [x], [y], [two])
        opset = [helper.make_opsetid("", 20)]
        onnx.save(
            helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "model.onnx"
        )
        data = np.arange(8, dtype=np.float32).reshape(2, 4)
        write_reference(folder, {"x": data}, {"logits": 2 * data}, {"logits": 2 * data})
        ports = [TensorSpec(name, "float32", (batch, 4), name) for name in ("x", "logits")]
        signature = Signature((ports[0],), (ports[1],), {"dict": {"logits": 0}})
        return Manifest("0.1.0", more.pop("target", "cpu"), "ort", signature, **more)

    return write(path, fill)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "out")


class Shell:
    """Runs command lines in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.err = ""

    def __call__(self, *words: object) -> tuple[int, str]:
        """Return the exit code and stdout; stderr is in `err`."""
        code = main([str(word) for word in words])
        out, self.err = self.capsys.readouterr()
        return code, out

    def json(self, *words: object) -> tuple[int, Any]:
        """Run with --json and read the one document."""
        code, out = self(*words, "--json")
        return code, json.loads(out)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


class FakeOptimized:
    report = Report(model="Linear", target="cpu", recipe="exact")

    def save(self, path: Path) -> Path:
        print("a library that prints")
        return write_engine(path)


@pytest.fixture
def optimizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any], None]:
    """Put a stand-in for the optimizer and a factory `cli_shop:make` in place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cli_shop.py").write_text(
        "import torch\ndef make(): return torch.nn.Linear(3, 2)\n"
    )
    monkeypatch.delitem(sys.modules, "cli_shop", raising=False)

    def install(outcome: Any) -> None:
        def optimize(model: Any, inputs: Any, *, progress: Any, **options: Any) -> Any:
            progress(f"capture{EVIL}")
            print("a library that prints")
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = ModuleType("effopt.optimizer")
        module.optimize = optimize  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "effopt.optimizer", module)

    return install


CONVERT = ("convert", "cli_shop:make", "-o", "out")


# --- exit codes


def test_0_done(shell: Shell, optimizer: Callable[[Any], None]) -> None:
    optimizer(FakeOptimized())
    code, out = shell(*CONVERT)
    assert code == 0
    assert "Linear for cpu" in out
    assert "next:    effopt bench" in out
    assert "a library that prints" not in out
    assert Path("out/manifest.json").exists()


def test_quiet_prints_the_folder_only(shell: Shell, optimizer: Callable[[Any], None]) -> None:
    optimizer(FakeOptimized())
    code, out = shell(*CONVERT, "--quiet")
    assert (code, out) == (0, f"{Path('out').absolute()}\n")
    assert shell.err.splitlines() == ["a library that prints"] * 2


def test_1_unexpected_error(shell: Shell, optimizer: Callable[[Any], None]) -> None:
    optimizer(ZeroDivisionError(f"one\ntwo{EVIL}"))
    code, out = shell(*CONVERT)
    assert (code, out) == (1, "")
    assert "effopt: unexpected ZeroDivisionError: one (" in shell.err
    assert "--debug" in shell.err
    assert "Traceback" not in shell.err
    assert not Path("out").exists()
    code, _ = shell(*CONVERT, "--debug")
    assert code == 1
    assert "Traceback" in shell.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command was given"),
        (["convrt"], "did you mean 'convert'"),
        (["--json", "bogus"], "known: bench, convert"),
        (["convert"], "the following arguments are required"),
        (["convert", "x", "-o", "y", "--target", "a10"], "did you mean 'a100'"),
        (["convert", "nowhere", "-o", "y"], "MODEL is a Hugging Face folder"),
        (["convert", "x", "-o", "y", "--seed", "x"], "invalid int value"),
        (["bench", "nowhere"], "is no engine folder"),
        (["bench", "x", "--batch", "0"], "no list of batch sizes"),
        (["bench", "x", "--seconds", "-1"], "no number of seconds"),
        (["passes", "extra"], "unrecognized arguments: extra"),
    ],
)
def test_2_wrong_usage(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, document = shell.json(*words)
    assert code == document["error"]["exit_code"] == 2
    assert message in document["error"]["reason"] + document["error"]["remedy"]


def test_2_the_output_is_taken(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    code, _ = shell("convert", "no.such:model", "-o", tmp_path)
    assert code == 2
    assert "exists and is no engine folder" in shell.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CaptureError("no graph", "write torch.where"), 3),
        (PreconditionError("add_7", "mixes tokens", "leave it out"), 3),
        (MissingError("no onnxruntime", "pip install it"), 6),
    ],
)
def test_3_and_6(
    shell: Shell, optimizer: Callable[[Any], None], error: EffoptError, code: int
) -> None:
    optimizer(error)
    found, document = shell.json(*CONVERT)
    assert found == code
    assert document == {
        "error": {
            "type": type(error).__name__,
            "reason": error.reason,
            "remedy": error.remedy,
            "node": getattr(error, "node", ""),
            "exit_code": code,
        }
    }
    found, out = shell(*CONVERT)
    assert (found, out) == (code, "")
    assert f"effopt: {error}" in shell.err


def test_5_verification_failed(shell: Shell, tmp_path: Path) -> None:
    folder = write_engine(tmp_path / "out", scale=2.01)
    code, document = shell.json("verify", folder)
    assert code == 5
    assert "logits differs from what was stored by 0.005" in document["error"]["reason"]


def test_7_unsafe_file(shell: Shell, engine: Path, tmp_path: Path) -> None:
    path = engine / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert shell("verify", engine)[0] == 7
    (tmp_path / "model.pt2").touch()
    code, _ = shell("convert", tmp_path / "model.pt2", "-o", tmp_path / "new")
    assert code == 7
    assert "--trust" in shell.err


def test_130_interrupted(shell: Shell, optimizer: Callable[[Any], None]) -> None:
    optimizer(KeyboardInterrupt())
    code, out = shell(*CONVERT)
    assert (code, out) == (130, "")
    assert not Path("out").exists()
    code, document = shell.json(*CONVERT)
    assert (code, document["error"]["type"]) == (130, "KeyboardInterrupt")


# --- output


def test_progress_is_plain_lines_without_control_characters(
    shell: Shell, optimizer: Callable[[Any], None]
) -> None:
    optimizer(FakeOptimized())
    shell(*CONVERT)
    lines = [line for line in shell.err.splitlines() if line.startswith("[")]
    assert [line.split("s] ")[1] for line in lines] == [
        "load model",
        "capture</script>\\x1b[2J[red]",
        "save",
    ]


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with console.Progress(quiet=False) as progress:
        progress.stage("capture")
        progress.stage(EVIL)
    text = terminal.getvalue()
    assert "✓" in text
    assert "\\x1b[2J[red]" in text
    assert "\x1b[2J" not in text
    assert "\x1b[32m" not in text


def test_errors_cannot_drive_the_terminal(shell: Shell, optimizer: Callable[[Any], None]) -> None:
    optimizer(PreconditionError(EVIL, EVIL, EVIL))
    shell(*CONVERT)
    assert "\x1b" not in shell.err
    _, out = shell(*CONVERT, "--json")
    assert "\x1b" not in out


@pytest.mark.parametrize("name", ["passes", "targets", "recipes"])
def test_tables(shell: Shell, name: str) -> None:
    if name == "recipes" and not hasattr(effopt, "recipes"):
        pytest.skip("no recipes yet")
    code, document = shell.json(name)
    assert code == 0
    assert document[name]
    code, text = shell(name)
    assert code == 0
    for record in document[name]:
        assert record["name"] in text
    assert max(map(len, text.splitlines())) <= 80


def test_version(shell: Shell) -> None:
    code, document = shell.json("--version")
    assert code == 0
    assert shell("--version")[1] == f"effopt {document['effopt']}\n"


def test_inspect(
    shell: Shell, optimizer: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Explanation:
        def text(self) -> str:
            return f"axes{EVIL}\nsites"

        def to_json(self) -> dict[str, Any]:
            return {"sites": [EVIL]}

    given: list[dict[str, Any]] = []

    def explain(model: Any, inputs: Any, *, progress: Any, **options: Any) -> Explanation:
        progress(f"explain{EVIL}")
        given.append(options)
        return Explanation()

    optimizer(None)
    monkeypatch.setattr(effopt, "explain", explain, raising=False)
    assert shell("inspect", "cli_shop:make") == (0, "axes</script>\\x1b[2J[red]\nsites\n")
    assert shell.json("inspect", "cli_shop:make") == (0, {"sites": [EVIL]})
    shell("inspect", "cli_shop:make", "--dynamic", "batch,length", "--seed", "3")
    assert given[0] == {"dynamic": ("batch",), "seed": 0}
    assert given[-1] == {"dynamic": ("batch", "length"), "seed": 3}


def test_logging_and_warnings_are_left_as_they_were(shell: Shell) -> None:
    level, filters = logging.root.manager.disable, list(warnings.filters)
    assert shell("targets")[0] == 0
    assert shell("inspect", "nowhere:make")[0] == 2
    assert (logging.root.manager.disable, list(warnings.filters)) == (level, filters)


# --- bench and verify


def test_bench_alone(shell: Shell, engine: Path) -> None:
    code, document = shell.json("bench", engine, "--seconds", "0.1")
    assert code == 0
    assert [row["batch"] for row in document["latency"]] == [1, 8]
    assert all(row["speedup"] is None for row in document["latency"])
    assert document["notes"] == []


def test_bench_against_a_folder_of_the_same_name(
    shell: Shell, engine: Path, tmp_path: Path
) -> None:
    other = write_engine(tmp_path / "other" / "out", scale=-2.0, target="a100")
    words = ("bench", other, "--against", engine, "--batch", "3", "--seconds", "0.1")
    code, document = shell.json(*words)
    assert code == 0
    base, ours = document["latency"]
    assert (base["variant"], ours["variant"], ours["baseline"]) == ("out", str(other), "out")
    assert ours["speedup_low"] <= ours["speedup"] <= ours["speedup_high"]
    cosine, top1 = document["quality"]
    assert (cosine["metric"], cosine["value"], cosine["samples"]) == ("cosine of logits", -1.0, 3)
    assert top1["value"] == 0.0
    assert "not of its target a100 (sm_80)" in document["notes"][0]
    assert "Latency, ms a call" in shell(*words)[1]


def test_bench_of_a_fixed_batch(shell: Shell, tmp_path: Path) -> None:
    folder = write_engine(tmp_path / "out", batch=2)
    code, document = shell.json("bench", folder, "--seconds", "0.1")
    assert [row["batch"] for row in document["latency"]] == [2]
    code, document = shell.json("bench", folder, "--batch", "4")
    assert code == 2
    assert "batch of 2 only" in document["error"]["reason"]


def test_verify(shell: Shell, engine: Path) -> None:
    code, document = shell.json("verify", engine)
    assert code == 0
    assert (document["ok"], document["files"]) == (True, 2)
    assert [row["output"] for row in document["outputs"]] == ["logits"]
    code, text = shell("verify", engine)
    assert "2 files are as written" in text


DOUBLE = """
import torch
class Scale(torch.nn.Module):
    def __init__(self, by): super().__init__(); self.by = by
    def forward(self, x): return {"logits": x * self.by}
class Other(torch.nn.Module):
    def forward(self, y): return {"logits": y}
def right(): return Scale(2.0), {"x": torch.ones(2, 4)}
def wrong(): return Scale(2.1), {"x": torch.ones(2, 4)}
def other(): return Other(), {"y": torch.ones(2, 4)}
"""


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("right", 0, "1.0e-04   1.0000   0.0e+00"),
        ("right", 0, "2 files are as written"),
        ("wrong", 5, "logits of the model differs from the stored original by 0.05"),
        ("other", 5, "takes other inputs"),
    ],
)
def test_verify_against_a_model(
    shell: Shell,
    engine: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(engine.parent)
    monkeypatch.syspath_prepend(engine.parent)
    Path("cli_doubles.py").write_text(DOUBLE)
    monkeypatch.delitem(sys.modules, "cli_doubles", raising=False)
    found, out = shell("verify", engine, "--against", f"cli_doubles:{name}")
    assert found == code
    assert message in out + shell.err


# --- from a model to an engine


def test_from_a_folder_to_an_engine(shell: Shell, tmp_path: Path) -> None:
    pytest.importorskip("effopt.optimizer", reason="no optimizer yet")
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    model, out = tmp_path / "model", tmp_path / "out"
    ViTForImageClassification(config).save_pretrained(model)
    shell.capsys.readouterr()  # what transformers prints while it saves
    code, document = shell.json("convert", model, "-o", out, "--recipe", "merge-tokens{r=2}")
    assert code == 0, document
    assert Report.from_json(document["report"]).steps
    assert document["folder"] == str(out)
    code, document = shell.json("bench", out, "--against", model, "--batch", "2", "--seconds", "1")
    assert code == 0, document
    assert [row["speedup"] is None for row in document["latency"]] == [True, False]
    assert shell("verify", out, "--against", model)[0] == 0
    code, document = shell.json("inspect", model)
    assert code == 0
    assert document


# --- as a process


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
