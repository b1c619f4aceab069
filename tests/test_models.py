"""Every spelling of a model, and every file that must not be opened."""

import json
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effopt.errors import CaptureError, MissingError, UnsafeFileError, UsageError
from effopt.models import load_model


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    folder = tmp_path_factory.mktemp("saved")
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Copy the saved model, so that a test may damage it."""
    made = tmp_path / "model"
    made.mkdir()
    for path in saved.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    return made


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty folder; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- Hugging Face folders


def test_a_folder_gives_its_model_in_float32(folder: Path) -> None:
    change_config(folder, dtype="float16")
    model, inputs = load_model(str(folder))
    assert type(model).__name__ == "ViTForImageClassification"
    assert inputs is None
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_weights_as_a_state_dict_are_read_as_tensors_only(folder: Path) -> None:
    model, _ = load_model(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    again, _ = load_model(str(folder))
    assert torch.equal(again.classifier.weight, model.classifier.weight)


def test_a_state_dict_with_code_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.bias": Bomb(tmp_path / "mark")}, folder / "pytorch_model.bin")
    with pytest.raises(UnsafeFileError, match="safetensors"):
        load_model(str(folder), trust=True)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_the_folder_never_runs(folder: Path, tmp_path: Path, trust: bool) -> None:
    mark = tmp_path / "mark"
    (folder / "modeling.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    change_config(folder, auto_map={"AutoModel": "modeling.Model"})
    with pytest.raises(UnsafeFileError, match="auto_map"):
        load_model(str(folder), trust=trust)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "names no architecture"),
        ({"architectures": ["Perceptron3000"]}, "has no model 'Perceptron3000'"),
        ({"architectures": ["pipeline"]}, "has no model 'pipeline'"),
        ({"hidden_size": -4}, "cannot be loaded"),
        ({"hidden_size": "big"}, "cannot be loaded"),
        ({"num_hidden_layers": 2}, "they would be random"),
    ],
)
def test_a_config_that_does_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(UsageError, match=message):
        load_model(str(folder))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\xff"])
def test_a_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UsageError, match="JSON"):
        load_model(str(folder))


def test_a_folder_without_weights_or_config(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="has no weights"):
        load_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has no config\.json"):
        load_model(str(folder))


def test_damaged_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(str(folder))


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "../x.safetensors"}}', "[]", "{"])
def test_an_index_stays_in_its_folder(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UnsafeFileError, match="index"):
        load_model(str(folder))


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingError, match=r"pip install effopt\[hf\]"):
        load_model(str(folder))


# --- archives


def test_an_archive_needs_trust_before_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/sample_inputs/model.pt", b"anything")
    with pytest.raises(UnsafeFileError, match="--trust"):
        load_model(str(path))


def test_a_trusted_archive(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.zeros(2, 3),)), path)
    model, inputs = load_model(str(path), trust=True)
    assert isinstance(model, torch.export.ExportedProgram)
    assert inputs is None


def test_a_trusted_file_that_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"no archive")
    with pytest.raises(UsageError, match="no exported program"):
        load_model(str(path), trust=True)


# --- factories

FACTORIES = """
import torch
from effopt.errors import MissingError
def bare(): return torch.nn.Linear(3, 2)
def pair(): return torch.nn.Linear(3, 2), torch.zeros(2, 3)
def number(): return 5
def broken():
    return 1 / 0
def leaving(): raise SystemExit(9)
def refusing(): raise MissingError("no data", "fetch it")
def lacking(): import no_such_package
constant = 3
"""


@pytest.mark.parametrize("name", ["bare", "pair"])
def test_a_factory(here: Path, name: str) -> None:
    (here / "shop.py").write_text(FACTORIES)
    model, inputs = load_model(f"shop:{name}")
    assert isinstance(model, nn.Linear)
    assert (inputs is None) == (name == "bare")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("shop:number", UsageError, "returned a int"),
        ("shop:bara", UsageError, "did you mean 'bare'"),
        ("shop:constant", UsageError, "cannot be called"),
        ("shoq:bare", UsageError, "did you mean 'shop'"),
        ("shop.inner:bare", UsageError, "no module 'shop.inner'"),
        ("shop:broken", CaptureError, r"ZeroDivisionError: division by zero at .*shop\.py:8"),
        ("shop:leaving", CaptureError, "SystemExit: 9"),
        ("shop:refusing", MissingError, "fetch it"),
        ("shop:lacking", MissingError, "pip install no_such_package"),
    ],
)
def test_a_factory_that_fails(here: Path, spec: str, error: type[Exception], message: str) -> None:
    (here / "shop.py").write_text(FACTORIES)
    with pytest.raises(error, match=message):
        load_model(spec)


def test_a_module_that_does_not_import(here: Path) -> None:
    (here / "shop.py").write_text("import no_such_package")
    with pytest.raises(MissingError, match="shop needs the package no_such_package"):
        load_model("shop:bare")
    (here / "stall.py").write_text("\n\nnot a python file")
    with pytest.raises(CaptureError, match="SyntaxError"):
        load_model("stall:bare")


# --- none of them


@pytest.mark.parametrize("spec", ["nowhere", "nowhere.pt2", "no where:x", "a:b:c", "", "C:/x"])
def test_what_is_no_model(here: Path, spec: str) -> None:
    with pytest.raises(UsageError, match="MODEL is a Hugging Face folder"):
        load_model(spec)


def test_a_file_of_another_kind(here: Path) -> None:
    (here / "model.onnx").touch()
    with pytest.raises(UsageError, match=r"model\.onnx is no model"):
        load_model("model.onnx")
