"""`effopt build`, and what `bench` and `verify` say of a folder before and after it."""

import sys
from pathlib import Path
from typing import Any

import pytest

import effopt
from effopt.backends.trt_modules import installed
from effopt.folder import read
from tests.cli.shell import Shell
from tests.test_trt_backend import Tiny, X
from tests.trt_machine import VERSION, Machine

MODEL = "from tests.test_trt_backend import X, Tiny\ndef make(): return Tiny(), X\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "out"
    return effopt.optimize(Tiny(), X, target="a100", recipe="exact").save(path, measure=False)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    for item in made.iterdir():
        (out / item.name).write_bytes(item.read_bytes())
    return out


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    (tmp_path / "lib").mkdir()
    return Machine(monkeypatch, tmp_path / "lib")


def test_what_is_missing_is_one_line_and_exit_code_6(
    shell: Shell, machine: Machine, folder: Path
) -> None:
    assert shell("build", folder)[0] == 6
    assert shell.err.splitlines()[-2:] == [
        "effopt: TensorRT is not installed",
        "  remedy: pip install 'effopt[tensorrt]'",
    ]
    machine.library()
    code, document = shell.json("build", folder)
    assert (code, document["error"]["type"]) == (6, "MissingError")
    assert document["error"]["reason"].startswith("TensorRT is installed; no NVIDIA driver")
    machine.card("sm_90")
    code, document = shell.json("build", folder)
    assert (code, document["error"]["reason"]) == (
        6, "this GPU is sm_90 (NVIDIA A100), the folder was made for sm_80"
    )  # fmt: skip
    assert shell("build", folder, "--rtx")[0] == 6
    assert "TensorRT-RTX is not installed" in shell.err


def test_build(shell: Shell, machine: Machine, folder: Path) -> None:
    machine.library()
    machine.card()
    words = ("--batch", "1,2,4", "--refit", "--workspace", "64", "--timing-cache")
    code, document = shell.json("build", folder, *words, folder.parent / "cache")
    assert code == 0, document
    assert document["built"]
    assert document["engine"]["sizes"] == {"batch": [1, 2, 4]}
    assert document["engine"]["options"] == {"refit": True, "workspace": 64}
    assert document["outputs"][0]["difference"] < 1e-6
    assert (folder.parent / "cache").read_bytes() == b"+"
    assert "[" in shell.err
    assert "build model.onnx" in shell.err
    code, text = shell("build", folder, "--batch", "2")
    assert code == 0
    assert text.startswith(f"engine: TensorRT {VERSION} on NVIDIA A100 (sm_80), 2 layers, built in")
    assert read(folder).facts["engine"]["sizes"] == {"batch": [2, 2, 2]}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--batch", "1,2"], 2, "'1,2' is no size, and no three such as 1,8,64"),
        (["--batch", "0"], 2, "'0' is no size"),
        (["--batch", "8,2,64"], 2, "batch 8,2,64 is no least, best and largest size"),
        (["--length", "1,2,3"], 2, "the length of this engine is fixed (sizes left open: batch)"),
        (["--level", "x"], 2, "'x' is no number from 0 to 5"),
        (["--level", "6"], 2, "'6' is no number from 0 to 5"),
        (["--workspace", "-1"], 2, "'-1' is no number from 0 on"),
        (["--version-compatible"], 2, "--version-compatible"),
        (["--refit-from", "other", "--refit"], 2, "takes the engine as it was built"),
        (["--refit-from", "other"], 2, "other is no engine folder"),
    ],
)
def test_wrong_usage(
    shell: Shell, machine: Machine, folder: Path, words: list[str], code: int, message: str
) -> None:
    machine.library()
    machine.card()
    assert shell("build", folder, *words)[0] == code
    assert message in shell.err


def test_a_folder_for_the_cpu_has_nothing_to_build(shell: Shell, engine: Path) -> None:
    assert shell("build", engine)[0] == 2
    assert "there is nothing left to build" in shell.err


def test_a_pending_engine_is_told_by_verify_and_bench(shell: Shell, folder: Path) -> None:
    note = "it runs on the CPU with onnxruntime: no engine was built yet"
    code, document = shell.json("verify", folder)
    assert code == 0
    assert document["notes"][0].startswith(note)
    assert note in shell("verify", folder)[1]
    code, document = shell.json("bench", folder, "--batch", "2", "--seconds", "0.1")
    assert code == 0
    assert document["notes"][-1].startswith(note)
    assert "not of its target a100 (sm_80)" in document["notes"][0]
    assert document["pending"] == "engine: to be built on sm_80 with effopt build"


def test_a_built_engine_is_compared_with_the_model_through_the_same_library(
    shell: Shell, machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline was built for the CPU, whatever the engine ran on."""
    machine.library()
    machine.card()
    assert shell("build", folder, "--batch", "1,2,4", "--weight-streaming")[0] == 0
    code, document = shell.json("verify", folder)
    assert (code, document["notes"]) == (0, [])
    monkeypatch.chdir(folder.parent)
    monkeypatch.syspath_prepend(folder.parent)
    Path("cli_tiny.py").write_text(MODEL)
    monkeypatch.delitem(sys.modules, "cli_tiny", raising=False)
    seen = _plans(monkeypatch)
    words = ("--against", "cli_tiny:make", "--batch", "2", "--seconds", "0.2")
    code, document = shell.json("bench", folder, *words)
    assert code == 0, document
    assert document["notes"] == []
    assert [row["variant"] for row in document["latency"]] == [
        "exact export of cli_tiny:make", "out"
    ]  # fmt: skip
    assert [(found["sizes"], found["options"]) for found in seen] == [
        ({"batch": [1, 2, 4]}, {"weight_streaming": True})
    ] * 2


def _plans(patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Note the record of every plan that is opened for timing."""
    from effopt import engine

    seen, plain = list[dict[str, Any]](), engine.load

    def load(path: Path) -> engine.Engine:
        found = plain(path)
        seen.append(found.manifest["facts"]["engine"])
        return found

    patch.setattr(engine, "load", load)
    return seen


@pytest.mark.skipif(installed("trt-rtx") is None, reason="TensorRT-RTX is not installed")
def test_only_check_needs_no_gpu_and_keeps_nothing(shell: Shell, folder: Path) -> None:
    before = {item.name: item.read_bytes() for item in folder.iterdir()}
    code, document = shell.json("build", folder, "--only-check")
    assert code == 0, document
    assert not document["built"]
    figures = document["check"]
    assert (figures["library"], figures["arch"]) == ("trt-rtx", "sm_80")
    assert figures["bytes"] > 1000
    assert "thrown away" in document["line"]
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == before
    assert shell("build", folder, "--only-check", "--rtx", "--timing-cache", "c")[0] == 2
    assert "takes no option 'timing_cache': it times nothing" in shell.err


def test_convert_says_what_comes_next(shell: Shell, tmp_path: Path, optimizer: Any) -> None:
    from effopt.report import Report
    from tests.cli.shell import CONVERT, FakeOptimized

    class Pending(FakeOptimized):
        report = Report(model="Linear", target="a100", pending="engine: to be built")

    optimizer(Pending())
    code, text = shell(*CONVERT)
    assert code == 0
    step = f"effopt build {tmp_path / 'out'}   (on the machine that has the GPU)"
    assert text.splitlines()[-1] == f"next:    {step}"
