"""Folders of GPU targets: what is pending, what runs in an engine's place, and how it is built."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import effopt
from effopt.backends.exit_runner import ExitRunner
from effopt.backends.trt_modules import available
from effopt.engine import TOLERANCES, Engine, check
from effopt.errors import (
    MissingError,
    PreconditionError,
    UnsafeFileError,
    UsageError,
    VerificationError,
)
from effopt.exits import with_thresholds
from effopt.finish import ENGINE, Wish, compile_check, finish, finish_like
from effopt.folder import MANIFEST, Manifest, seal, write
from effopt.folder import read as read_folder
from tests.exited import built, compare, net
from tests.test_split import net_inputs
from tests.trt_machine import VERSION, Machine

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
ON_CPU = "it runs on the CPU with onnxruntime: "


class Tiny(nn.Module):
    """A linear layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.up(x)
        return found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    (tmp_path / "lib").mkdir()
    return Machine(monkeypatch, tmp_path / "lib")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder for an A100 on a machine without one."""
    return convert(tmp_path_factory.mktemp("made") / "out")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Return a folder that a test may change."""
    manifest = read_folder(made)

    def fill(fresh: Path) -> Manifest:
        for name in manifest.files:
            (fresh / name).write_bytes((made / name).read_bytes())
        return manifest

    return write(tmp_path / "out", fill)


def convert(path: Path, seed: int = 0) -> Path:
    return effopt.optimize(Tiny(seed), X, target="a100", recipe="exact").save(path, measure=False)


def content(folder: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in folder.iterdir()}


# --- without a GPU ----------------------------------------------------------------------------


def test_a_folder_says_what_is_pending_and_what_runs_in_its_place(made: Path) -> None:
    engine = effopt.load(made)
    assert engine.manifest["backend"] == "trt"
    assert engine.manifest["pending"] == "engine: to be built on sm_80 with effopt build"
    assert engine.manifest["facts"]["sizes"] == {"batch": [1, 2, None]}
    assert engine.note.startswith(f"{ON_CPU}no engine was built yet")
    np.testing.assert_allclose(engine(X)[0], Tiny()(X).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_what_is_missing_is_told_in_one_line(machine: Machine, folder: Path) -> None:
    before = content(folder)
    with pytest.raises(MissingError) as caught:
        finish(folder, Wish())
    assert (caught.value.reason, caught.value.exit_code) == ("TensorRT is not installed", 6)
    assert caught.value.remedy == "pip install 'effopt[tensorrt]'"
    assert available("trt").reason == "TensorRT is not installed: pip install 'effopt[tensorrt]'"
    machine.library()
    with pytest.raises(MissingError, match="TensorRT is installed; no NVIDIA driver"):
        finish(folder, Wish())
    machine.card("sm_90")
    with pytest.raises(MissingError) as caught:
        finish(folder, Wish())
    assert caught.value.reason == ("this GPU is sm_90 (NVIDIA A100), the folder was made for sm_80")
    assert content(folder) == before


def test_there_is_nothing_to_build_for_a_cpu(tmp_path: Path) -> None:
    path = effopt.optimize(Tiny(), X, recipe="exact").save(tmp_path / "out", measure=False)
    with pytest.raises(UsageError, match="made for 'cpu': there is nothing left to build"):
        finish(path, Wish())


# --- with a GPU -------------------------------------------------------------------------------


def test_an_engine_is_built_checked_and_put_in_place(machine: Machine, folder: Path) -> None:
    machine.library()
    machine.card()
    stages: list[str] = []
    found = finish(folder, Wish({"batch": (1, 2, 4)}, {"refit": True}), tell=stages.append)
    assert stages == ["check files", "build model.onnx", "check numbers"]
    assert found.figures[0].ok
    engine = effopt.load(folder)
    assert engine.note == engine.manifest["pending"] == ""
    record = engine.manifest["facts"][ENGINE]
    assert record.pop("seconds") > 0
    assert record == {
        "library": "trt", "version": VERSION, "arch": "sm_80", "device": "NVIDIA A100",
        "plans": {"model.onnx": "model.plan"}, "sizes": {"batch": [1, 2, 4]},
        "options": {"refit": True}, "layers": 2, "plugins": 2, "note": "",
    }  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    assert report["pending"] == ""
    assert report["files"]["model.plan"] == 4
    assert report["notes"][-1].startswith(f"engine: TensorRT {VERSION} on NVIDIA A100 (sm_80)")
    assert "Pending" not in (folder / "report.html").read_text()
    assert sorted(item.name for item in folder.parent.iterdir()) == ["lib", "out"]


def test_a_second_build_takes_the_place_of_the_first(machine: Machine, folder: Path) -> None:
    machine.library()
    machine.card()
    finish(folder, Wish())
    machine.library("11.4.0.106", plan=b"plan of 11")
    assert effopt.load(folder).note.startswith(
        f"{ON_CPU}its engine was built by TensorRT {VERSION}, here is 11.4.0.106"
    )
    assert finish_like(folder, read_folder(folder).to_json()) == folder
    assert (folder / "model.plan").read_bytes() == b"plan of 11"
    assert effopt.load(folder).note == ""


def test_saving_builds_where_the_gpu_is(machine: Machine, tmp_path: Path) -> None:
    machine.library()
    machine.card("sm_90")
    assert effopt.load(convert(tmp_path / "out")).manifest["pending"]
    machine.card("sm_80")
    engine = effopt.load(convert(tmp_path / "out"))
    assert engine.manifest["pending"] == engine.note == ""
    assert engine.manifest["facts"][ENGINE]["sizes"] == {"batch": [1, 8, 64]}


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda m: setattr(m, "gpu", None), "TensorRT is installed; no NVIDIA driver on this"),
        (lambda m: m.installed.clear(), "TensorRT is not installed"),
        (lambda m: m.card("sm_90"), "its engine was built for sm_80, this GPU is sm_90"),
    ],
)
def test_an_engine_that_does_not_run_here(
    machine: Machine, folder: Path, change: Any, note: str
) -> None:
    machine.library()
    machine.card()
    finish(folder, Wish())
    change(machine)
    assert effopt.load(folder).note.startswith(ON_CPU + note)


def test_engines_for_other_gpus(machine: Machine, folder: Path) -> None:
    machine.library()
    machine.card()
    finish(folder, Wish(options={"hardware_compatible": True}))
    machine.card("sm_90")
    assert effopt.load(folder).note == ""
    machine.card("sm_75")
    assert "this GPU is sm_75" in effopt.load(folder).note


def test_no_engine_is_said_to_load_in_another_version(machine: Machine, folder: Path) -> None:
    """One built with --version-compatible was, and lacked the runtime that loads it there."""
    machine.library()
    machine.card()
    with pytest.raises(UsageError, match="there is no option 'version_compatible'"):
        finish(folder, Wish(options={"version_compatible": True}))
    finish(folder, Wish(options={"hardware_compatible": True}))
    machine.library("10.17.0")
    assert f"was built by TensorRT {VERSION}, here is 10.17.0" in effopt.load(folder).note


def test_exits_of_the_form_split_get_a_plan_each(machine: Machine, tmp_path: Path) -> None:
    machine.library()
    machine.card()
    program = net()
    runner = built(program, tmp_path, "a100")
    assert isinstance(runner, ExitRunner)
    assert sorted(path.name for path in tmp_path.glob("*.plan")) == [
        f"segment{place}.plan" for place in (1, 2, 3)
    ]
    worst, seen = compare(program, runner.run, net_inputs(3), most=3)
    assert worst < 1e-5
    assert seen == {1, 2, 3}
    assert with_thresholds(program).inputs[-1].name == "tau"


# --- what goes wrong leaves the folder as it was ----------------------------------------------


@pytest.mark.parametrize(
    ("library", "error", "reason"),
    [
        ({"errors": [("n", "TopK", "no")]}, PreconditionError, r"n \(TopK\): no \[UNSUPPORTED"),
        ({"plan": None, "reason": "first: too large"}, PreconditionError, "first: first: too la"),
        ({"Builder": None}, PreconditionError, "model.onnx: TensorRT worked in a process of its"),
    ],
)
def test_a_refused_build(
    machine: Machine, folder: Path, library: dict[str, Any], error: type[Exception], reason: str
) -> None:
    machine.library(**library)
    machine.card()
    before = content(folder)
    with pytest.raises(error, match=reason):
        finish(folder, Wish())
    assert content(folder) == before
    assert sorted(item.name for item in folder.parent.iterdir()) == ["lib", "out"]


def test_an_engine_with_wrong_numbers_is_not_put_in_place(machine: Machine, folder: Path) -> None:
    machine.library()
    machine.card()
    machine.wrong = True
    before = content(folder)
    with pytest.raises(VerificationError, match="of the built engine differs from eager torch"):
        finish(folder, Wish())
    assert content(folder) == before
    assert sorted(item.name for item in folder.parent.iterdir()) == ["lib", "out"]


def test_sizes_and_options_that_cannot_be(machine: Machine, folder: Path) -> None:
    machine.library()
    machine.card()
    with pytest.raises(UsageError, match="the length of this engine is fixed"):
        finish(folder, Wish({"length": (1, 2, 3)}))
    for options, reason in (
        ({"level": 6}, "option 'level' takes numbers from 0 to 5, not 6"),
        ({"level": True}, "option 'level' takes numbers from 0 to 5, not True"),
        ({"workspace": 1 << 43}, "option 'workspace' takes numbers from 0 to"),
        ({"refit": "yes"}, "option 'refit' takes a bool, not 'yes'"),
    ):
        with pytest.raises(UsageError, match=reason):
            finish(folder, Wish(options=options))


def test_a_backend_that_builds_nothing_is_told(folder: Path) -> None:
    with pytest.raises(UsageError, match="the backend 'onnx' builds no engines"):
        finish(folder, Wish(), "onnx")


def test_timings_that_cannot_be_kept_are_found_before_the_build(
    machine: Machine, folder: Path, tmp_path: Path
) -> None:
    machine.library(errors=[("the build was begun", "", "")])
    machine.card()
    long, device = str(tmp_path / ("x" * 300)), os.devnull
    reasons = {str(tmp_path / "no" / "cache"): "there is no folder", long: "name too long"}
    for path, reason in {**reasons, str(tmp_path): "is no file", device: "is no file"}.items():
        with pytest.raises(UsageError, match=reason):
            finish(folder, Wish(options={"timing_cache": path}))


def test_a_folder_chooses_no_file_that_is_written(
    machine: Machine, folder: Path, tmp_path: Path
) -> None:
    """A recorded path of timings was written when another engine was built like this one."""
    machine.library()
    machine.card()
    cache = tmp_path / "cache"
    finish(folder, Wish(options={"timing_cache": str(cache), "level": 0}))
    assert cache.read_bytes() == b"+"
    assert read_folder(folder).facts[ENGINE]["options"] == {"level": 0}
    manifest = read_folder(folder)
    manifest.facts[ENGINE]["options"]["timing_cache"] = str(tmp_path / "victim")
    (folder / MANIFEST).unlink()
    seal(folder, manifest)
    with pytest.raises(UnsafeFileError, match="option 'timing_cache' is none that is kept"):
        effopt.load(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch": "../80"}, "its library or its architecture is unknown"),
        ({"library": "os"}, "its library or its architecture is unknown"),
        ({"plans": {"model.onnx": "../model.plan"}}, "there is no plan '../model.plan'"),
        ({"plans": {"model.onnx": "other.plan"}}, "there is no plan 'other.plan'"),
        ({"plans": {}}, "its plans are not those of the ONNX files"),
        ({"options": {"shell": True}}, "there is no option 'shell'"),
        ({"options": {"refit": []}}, "an option holds a list"),
        ({"options": {"level": 9}}, "option 'level' takes numbers from 0 to 5, not 9"),
        ({"options": {"timing_cache": "/etc/motd"}}, "option 'timing_cache' is none that is kept"),
        ({"sizes": {"batch": [1]}}, "the record of the built engine is damaged"),
        ({"layers": None}, "the record of the built engine is damaged"),
    ],
)
def test_a_damaged_record_is_refused(
    machine: Machine, folder: Path, changes: dict[str, Any], reason: str
) -> None:
    machine.library()
    machine.card()
    finish(folder, Wish())
    manifest = read_folder(folder)
    manifest.facts[ENGINE] |= changes
    (folder / MANIFEST).unlink()
    seal(folder, manifest)
    with pytest.raises(UnsafeFileError) as caught:
        effopt.load(folder)
    assert reason in caught.value.reason


# --- new weights, and checks without a GPU ----------------------------------------------------


def test_an_engine_takes_the_weights_of_another_folder(
    machine: Machine, folder: Path, tmp_path: Path
) -> None:
    newer = convert(tmp_path / "newer", seed=1)
    machine.library()
    machine.card()
    with pytest.raises(UsageError, match="it has no built engine"):
        finish(newer, Wish(old=folder))
    finish(folder, Wish())
    with pytest.raises(UsageError, match="not built by TensorRT with --refit"):
        finish(newer, Wish(old=folder))
    finish(folder, Wish({"batch": (1, 2, 4)}, {"refit": True}))
    finish(newer, Wish(old=folder))
    assert (newer / "model.plan").read_bytes() == b"plan with new weights"
    record = effopt.load(newer).manifest["facts"][ENGINE]
    assert record["plugins"] == 2, "they are those of the engine before"
    assert (record["sizes"], record["options"]) == ({"batch": [1, 2, 4]}, {"refit": True})
    assert isinstance(effopt.load(newer), Engine)


def test_a_compile_check_keeps_nothing(machine: Machine, folder: Path) -> None:
    before = content(folder)
    with pytest.raises(MissingError, match="TensorRT is not installed") as caught:
        compile_check(folder, Wish())
    assert "which builds without a GPU" in caught.value.remedy
    machine.library()
    machine.card()
    figures, line = compile_check(folder, Wish({"batch": (1, 2, 4)}))
    assert (figures["library"], figures["arch"], figures["bytes"]) == ("trt", "sm_80", 4)
    assert line.startswith(f"TensorRT {VERSION} builds it for sm_80: 2 layers; a compile check")
    assert content(folder) == before


def test_every_gpu_is_served_by_tensorrt() -> None:
    assert {row.backend for row in effopt.targets().values() if row.gpu} == {"trt"}


# --- types narrower than float32 --------------------------------------------------------------


class Deep(nn.Module):
    """Three layers of one width, of which the second is no head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


def narrowed(path: Path, scheme: str, machine: str = "a100") -> Path:
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    recipe = f"quantize{{scheme={scheme},least=16}}"
    return effopt.optimize(Deep(), x, target=machine, recipe=recipe).save(path, measure=False)


def test_float16_is_held_to_its_own_tolerance(tmp_path: Path) -> None:
    """Outputs in float32 of a model that computes in float16 were held to float32's."""
    engine = effopt.load(narrowed(tmp_path / "out", "fp16"))
    assert engine.manifest["facts"]["narrowest"] == "float16"
    (figure,) = check(engine)
    assert figure.tolerance == TOLERANCES["float16"]
    cpu = effopt.load(narrowed(tmp_path / "cpu", "fp16", "cpu"))
    assert check(cpu)[0].tolerance == TOLERANCES["float32"], "it computes in float32"


def test_bfloat16_has_nothing_on_a_cpu_to_stand_in_for_it(tmp_path: Path) -> None:
    """Saving ended with an error of onnxruntime, which has no such operators on a CPU."""
    folder = narrowed(tmp_path / "out", "bf16")
    report = json.loads((folder / "report.json").read_text())
    note = "onnxruntime computes no bfloat16 on a CPU"
    assert f"not run here: {note}" in report["notes"]
    with pytest.raises(MissingError, match=f"no engine was built yet, and {note}"):
        effopt.load(folder)
