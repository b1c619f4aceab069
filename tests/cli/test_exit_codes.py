"""Exit codes, and the one JSON document of an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effopt.errors import CaptureError, EffoptError, MissingError, PreconditionError
from tests.cli.shell import CONVERT, EVIL, FakeOptimized, Shell, write_engine


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
        (["--json", "bogus"], "known: bench, build, convert"),
        (["convert"], "the following arguments are required"),
        (["convert", "x", "-o", "y", "--target", "a1000"], "did you mean 'a100'"),
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
