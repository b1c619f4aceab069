"""What the library is told, and what its answers mean: on stand-ins for TensorRT 10.16 and 11.4."""

import sys
from pathlib import Path
from typing import Any

import pytest

from effopt.backends import trt_plugins
from effopt.backends.trt_build import Request
from effopt.backends.trt_child import serve
from tests.trt_fake import Fake

X = {"x": ((1, 3), (8, 3), (64, 3))}


@pytest.fixture(params=["10.16.1.11", "11.4.0.106"])
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake(request.param)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return fake


def ask(folder: Path, **more: Any) -> dict[str, Any]:
    wish: dict[str, Any] = {"plan": folder / "model.plan", "profiles": X, **more}
    return serve(Request("tensorrt", folder / "model.onnx", **wish).to_json())


def test_a_network_is_strongly_typed_and_float32_stays_float32(trt: Fake, tmp_path: Path) -> None:
    found = ask(tmp_path)
    typed = 2 if trt.__version__.startswith("10.") else 0  # 11.x knows nothing else
    assert trt.told == [("network", typed), ("clear", "TF32"), ("x", *X["x"])]
    assert (tmp_path / "model.plan").read_bytes() == b"plan"
    assert found.pop("seconds").keys() == {"parse", "build"}
    version = trt.__version__
    assert found == {
        "version": version, "layers": 2, "plugins": 2, "bytes": 4, "note": "",
        "warnings": ["a warning"],
    }  # fmt: skip


@pytest.fixture
def registered(trt: Fake, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Let the library take plugins: what is registered, and the code of each."""
    found: dict[str, str] = {}

    def register(trt: Fake, names: Any, source: Any) -> None:
        found.update({name: source(next(iter(trt_plugins.stems([name])))) for name in names})

    trt.QuickPluginCreationRequest = object
    monkeypatch.setattr(trt_plugins, "register", register)
    return found


def test_plugins_are_registered_with_the_code_of_the_folder(
    registered: dict[str, str], tmp_path: Path
) -> None:
    code = tmp_path / "gather_tokens.sm_80.ptx"
    code.write_text("ptx")
    wish = {"plugins": {"GatherTokens": 2}, "ptx": {"gather_tokens": code}}
    found = ask(tmp_path, **wish)
    assert (found["plugins"], found["note"]) == (2, "")
    assert registered == {"GatherTokens": "ptx"}


def test_a_plugin_whose_function_stands_in_is_an_error(
    registered: dict[str, str], tmp_path: Path
) -> None:
    code = tmp_path / "gather_tokens.sm_80.ptx"
    code.write_text("ptx")
    wish = {"plugins": {"GatherTokens": 3}, "ptx": {"gather_tokens": code}}
    refused = ask(tmp_path, **wish)["refused"]
    assert refused["reason"] == "the parser made plugins of 2 of 3 nodes that are plugins"
    assert "plugins=off" in refused["remedy"]


def test_without_code_or_plugins_functions_stand_in_and_that_is_told(
    trt: Fake, tmp_path: Path
) -> None:
    found = ask(tmp_path, plugins={"GatherTokens": 3})
    assert found["note"] == f"tensorrt {trt.__version__} has no ahead-of-time plugins"
    trt.QuickPluginCreationRequest = object
    found = ask(tmp_path, plugins={"GatherTokens": 3})
    assert found["note"] == "the folder has no PTX of gather_tokens"


def test_parsing_alone_writes_nothing(trt: Fake, tmp_path: Path) -> None:
    assert ask(tmp_path, plan=None)["bytes"] == 0
    assert list(tmp_path.iterdir()) == []


def test_every_option_is_told(trt: Fake, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.write_bytes(b"timings")
    wish: dict[str, Any] = dict.fromkeys(("weight_streaming", "refit"), True)
    wish |= {"hardware_compatible": True, "workspace": 3, "level": 0, "timing_cache": str(cache)}
    assert "refused" not in ask(tmp_path, options=wish)
    flags = {what[1] for what in trt.told if what[0] == "set"}
    assert flags == {"WEIGHT_STREAMING", "REFIT"}
    level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    for told in (
        ("hardware_compatibility_level", level),
        ("WORKSPACE", 3 << 20),
        ("builder_optimization_level", 0),
    ):
        assert told in trt.told
    assert cache.read_bytes() == b"timings+"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "model.plan"]


def test_an_option_that_the_library_lacks_is_refused(trt: Fake, tmp_path: Path) -> None:
    del trt.OnnxParserRefitter
    refused = ask(tmp_path, options={"refit": True})["refused"]
    version = trt.__version__
    assert refused["reason"] == (
        f"tensorrt {version} takes no option 'refit': it has no OnnxParserRefitter"
    )
    assert refused["kind"] == "option"
    assert trt.told == [], "it is refused ahead of any work"


def test_full_tensorrt_builds_for_the_gpu_that_is_there(trt: Fake, tmp_path: Path) -> None:
    refused = ask(tmp_path, archs=("sm_80",))["refused"]
    assert "builds for the GPU that is here alone" in refused["reason"]
    assert refused["kind"] == "arch"


def test_the_first_error_of_the_parser_is_told_with_its_node(trt: Fake, tmp_path: Path) -> None:
    trt.errors = [("merge_3", "MergeTokens", "Plugin not\n  found"), ("", "TopK", "no")]
    refused = ask(tmp_path)["refused"]
    assert refused["node"] == "merge_3 (MergeTokens)"
    assert refused["reason"] == "Plugin not found [UNSUPPORTED_NODE] (and 1 more)"
    trt.errors = [("", "TopK", "no")]
    assert ask(tmp_path)["refused"]["node"] == "TopK"


def test_the_last_error_of_the_builder_names_the_longest_layer(trt: Fake, tmp_path: Path) -> None:
    trt.plan, trt.reason = None, "first/second: K exceeds"
    refused = ask(tmp_path)["refused"]
    assert (refused["node"], refused["reason"]) == ("first/second", "first/second: K exceeds")
    trt.layers, trt.reason = ["r"], "buildSerializedNetwork: error in the wrapper"
    assert ask(tmp_path)["refused"]["node"] == "", "a letter of the message is no layer"
    trt.reason = ""
    assert ask(tmp_path)["refused"]["node"] == ""


def test_a_library_that_cannot_be_imported_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "no_such_library.py").write_text("raise OSError('libnvinfer.so.10: no such file')")
    sys.path.insert(0, str(tmp_path))
    try:
        refused = serve({"module": "no_such_library", "do": "build"})["refused"]
    finally:
        sys.path.remove(str(tmp_path))
    assert refused["reason"].endswith("cannot be imported: libnvinfer.so.10: no such file")
    assert refused["kind"] == "library"


def test_a_library_that_fails_without_a_word_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line of no message was asked for: IndexError."""
    (tmp_path / "silent_library.py").write_text("raise OSError")
    monkeypatch.syspath_prepend(tmp_path)
    refused = serve({"module": "silent_library", "do": "build"})["refused"]
    assert refused["reason"].endswith("cannot be imported: no reason given")


# --- new weights ------------------------------------------------------------------------------


def refit(folder: Path, old: bytes = b"old", **more: Any) -> dict[str, Any]:
    (folder / "old.plan").write_bytes(old)
    return ask(folder, profiles={}, old=folder / "old.plan", **more)


def test_a_plan_takes_the_weights_of_a_newer_file(trt: Fake, tmp_path: Path) -> None:
    found = refit(tmp_path)
    assert (tmp_path / "model.plan").read_bytes() == b"old with new weights"
    assert (found["layers"], found["bytes"]) == (2, 20)


def test_a_plan_that_takes_no_new_weights(trt: Fake, tmp_path: Path) -> None:
    assert refit(tmp_path, b"of another version")["refused"]["reason"] == "version mismatch"
    trt.plan = None
    assert "lacks weights of the plan: a.weight, b.w" in refit(tmp_path)["refused"]["reason"]
    trt.errors = [("w", "Gemm", "another shape")]
    assert refit(tmp_path)["refused"]["node"] == "w (Gemm)"
    assert not (tmp_path / "model.plan").exists()


def test_plugins_are_registered_while_a_plan_takes_new_weights(
    registered: dict[str, str], tmp_path: Path
) -> None:
    """The parser of new weights knew no plugins."""
    code = tmp_path / "gather_tokens.sm_80.ptx"
    code.write_text("ptx")
    plugins = {"GatherTokens": 2}
    assert "refused" not in refit(tmp_path, plugins=plugins, ptx={"gather_tokens": code})
    assert registered == {"GatherTokens": "ptx"}
    refused = refit(tmp_path, plugins=plugins)["refused"]
    assert refused["reason"] == (
        "the plan holds plugins, and the folder has no PTX of gather_tokens"
    )
    assert refused["kind"] == "plan"
