"""PTX in folders: whose it is, and which engines get it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import effopt
from effopt.backend import YES, Support
from effopt.backends import onnx_plugins, trt_kernels, trt_plans
from effopt.backends.nvcc import Ptx
from effopt.backends.trt_build import Outcome, Request
from effopt.backends.trt_kernels import ptx_file, ptx_files, renew_kernels
from effopt.errors import UnsafeFileError
from effopt.finish import ENGINE, Wish, compile_check, finish
from effopt.folder import MANIFEST, seal
from effopt.folder import read as read_folder
from tests.test_trt_backend import convert
from tests.trt_machine import VERSION, Machine

OURS = "gather_tokens.sm_80.ptx"
STRANGE = (
    "gather_tokens.zz.ptx", "gather_tokens.sm_80.zz.ptx", "gather_tokens.sm_90.ptx",
    "other.sm_80.ptx",
)  # fmt: skip
NAMES = {"GatherTokens": 2}


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what says whether there is an nvcc; it writes "ours"."""
    state = {"here": YES}
    monkeypatch.setattr(trt_kernels, "available", lambda: state["here"])
    monkeypatch.setattr(trt_kernels, "compile_ptx", lambda stem, arch: Ptx("ours"))
    return state


def filled(folder: Path) -> Path:
    for name in (OURS, *STRANGE):
        (folder / name).write_text("of the folder")
    return folder


def left(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.ptx")}


def test_a_file_of_another_name_is_no_kernel(tmp_path: Path) -> None:
    """`gather_tokens.zz.ptx` was taken for the kernel: it is the last in the order of names."""
    filled(tmp_path)
    assert ptx_files(tmp_path, NAMES, "sm_80") == {"gather_tokens": tmp_path / OURS}
    (tmp_path / OURS).unlink()
    assert ptx_files(tmp_path, NAMES, "sm_80") == {}
    assert ptx_files(tmp_path, [], "sm_80") == {}


def test_kernels_are_compiled_in_place_of_all_that_a_folder_has(tmp_path: Path, nvcc: Any) -> None:
    renew_kernels(filled(tmp_path), NAMES, "sm_80")
    assert left(tmp_path) == {OURS: "ours"}


def test_without_nvcc_a_folder_keeps_its_own_kernels_alone(tmp_path: Path, nvcc: Any) -> None:
    nvcc["here"] = Support(False, "nvcc is not installed: install it")
    renew_kernels(filled(tmp_path), NAMES, "sm_80")
    assert left(tmp_path) == {OURS: "of the folder"}


# --- in engines -------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Return a machine with a GPU, on which every file has two nodes of a plugin."""
    (tmp_path / "lib").mkdir()
    made = Machine(monkeypatch, tmp_path / "lib")
    made.library()
    made.card()
    monkeypatch.setattr(onnx_plugins, "plugin_nodes", lambda paths: NAMES)
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Request, dict[str, str]]]:
    """Note what is asked of TensorRT, and the PTX that it could read then."""
    found = list[tuple[Request, dict[str, str]]]()

    def ask(request: Request) -> Outcome:
        assert request.plan is not None
        request.plan.write_bytes(b"plan")
        found.append((request, {stem: path.read_text() for stem, path in request.ptx.items()}))
        return Outcome(VERSION, 5, 0 if request.old else 2, {"build": 1.0}, 4)

    monkeypatch.setattr(trt_plans, "ask", ask)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("made") / "out")


def copied(made: Path, path: Path, **facts: Any) -> Path:
    """Copy a folder, with other facts and with PTX of all kinds."""
    manifest = read_folder(made)
    path.mkdir()
    for name in manifest.files:
        (path / name).write_bytes((made / name).read_bytes())
    seal(filled(path), replace(manifest, facts={**manifest.facts, "plugins": [*NAMES], **facts}))
    return path


def test_an_engine_gets_the_kernels_that_were_compiled_here(
    machine: Machine, asked: Any, nvcc: Any, made: Path, tmp_path: Path
) -> None:
    folder = copied(made, tmp_path / "out")
    finish(folder, Wish())
    ((request, texts),) = asked
    assert (request.plugins, texts) == (NAMES, {"gather_tokens": "ours"})
    assert left(folder) == {OURS: "ours"}


def test_a_folder_without_plugins_has_no_kernels(
    machine: Machine, asked: Any, made: Path, tmp_path: Path
) -> None:
    folder = copied(made, tmp_path / "out", plugins=[])
    finish(folder, Wish())
    assert asked[0][0].ptx == {}
    assert left(folder) == {}


def test_a_compile_check_reads_the_kernels_of_the_target(
    machine: Machine, asked: Any, made: Path, tmp_path: Path
) -> None:
    folder = copied(made, tmp_path / "out")
    compile_check(folder, Wish())
    assert asked[0][0].ptx == {"gather_tokens": folder / ptx_file("gather_tokens", "sm_80")}
    assert len(left(folder)) == 1 + len(STRANGE)


def test_new_weights_keep_what_is_said_of_plugins(
    machine: Machine, asked: Any, nvcc: Any, made: Path, tmp_path: Path
) -> None:
    """The record said that the engine had no plugins, and the parser did not know them."""
    old, new = (copied(made, tmp_path / name) for name in ("old", "new"))
    finish(old, Wish(options={"refit": True}))
    finish(new, Wish(old=old))
    request, texts = asked[-1]
    assert request.old is not None
    assert (request.plugins, texts) == (NAMES, {"gather_tokens": "ours"})
    record = effopt.load(new).manifest["facts"][ENGINE]
    assert (record["plugins"], record["note"]) == (2, "")


def test_new_weights_of_functions_that_stand_for_plugins(
    machine: Machine, asked: Any, nvcc: Any, made: Path, tmp_path: Path
) -> None:
    old, new = (copied(made, tmp_path / name) for name in ("old", "new"))
    finish(old, Wish(options={"refit": True}))
    manifest = read_folder(old)
    manifest.facts[ENGINE] |= {"plugins": 0, "note": "functions stand for its plugins: no PTX"}
    (old / MANIFEST).unlink()
    seal(old, manifest)
    finish(new, Wish(old=old))
    assert (asked[-1][0].plugins, asked[-1][0].ptx) == ({}, {})
    record = effopt.load(new).manifest["facts"][ENGINE]
    assert (record["plugins"], record["note"]) == (0, "functions stand for its plugins: no PTX")


def test_a_file_is_checked_before_its_plugins_are_counted(
    machine: Machine, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's file was parsed by a library that checks nothing, ahead of the check."""
    folder = copied(made, tmp_path / "out")
    manifest = read_folder(folder)
    for name in ("model.onnx", MANIFEST):
        (folder / name).unlink()
    (folder / "model.onnx").write_bytes(b"garbage")
    seal(folder, manifest)

    def count(paths: Any) -> Any:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(onnx_plugins, "plugin_nodes", count)
    with pytest.raises(UnsafeFileError, match="it is no ONNX file, or a damaged one"):
        finish(folder, Wish())
