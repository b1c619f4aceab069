"""Calibration files: how they are cut, which are refused, and how the command line takes them."""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import effopt.save
from effopt.__main__ import main
from effopt.calibration import calibration_file, read_calibration
from effopt.capture import capture
from effopt.errors import UnsafeFileError, UsageError
from effopt.program import Program
from tests.calibration_data import (
    Pair,
    arrays,
    batch,
    header,
    npy,
    record,
    samples_of,
    saved,
    zipped,
)


@pytest.fixture(scope="module")
def pair() -> Program:
    return capture(Pair(), batch())


FILES = ("data.npz", "packed.npz", "data.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_cut_into_batches(pair: Program, tmp_path: Path, name: str) -> None:
    given = arrays()
    data = calibration_file(saved(tmp_path / name, given), pair)
    assert data.describe() == f"calibration: 19 samples, from {name}"
    batches = list(data)
    assert [x.shape[0] for x, _, _ in batches] == [8, 8, 3]
    assert torch.equal(samples_of(data), given["x"])
    assert torch.equal(torch.cat([ids for _, ids, _ in data]), given["ids"])
    assert all(torch.equal(scale, given["scale"]) for _, _, scale in data)
    assert pair.run(batches[2])[0].shape == (3, 3)


def test_a_file_of_a_model_with_a_fixed_batch_and_a_mode(tmp_path: Path) -> None:
    program = capture(Pair(), {**batch(), "mode": "exp"}, dynamic=())
    data = calibration_file(saved(tmp_path / "data.npz", arrays(6)), program)
    assert [x.shape[0] for x, _, _ in data] == [2, 2, 2]
    with pytest.raises(UsageError, match="has 7 samples, and the model takes batches of 2"):
        calibration_file(saved(tmp_path / "odd.npz", arrays(7)), program)


def test_bfloat16_is_read_from_safetensors(tmp_path: Path) -> None:
    program = capture(nn.Linear(4, 3).bfloat16(), torch.ones(2, 4).bfloat16())
    given = torch.randn(3, 4).bfloat16()
    ((found,),) = calibration_file(saved(tmp_path / "x.safetensors", {"input": given}), program)
    assert torch.equal(found, given)


@pytest.mark.parametrize("name", FILES)
def test_a_file_may_hold_labels(pair: Program, tmp_path: Path, name: str) -> None:
    labels = torch.arange(19) % 3
    path = saved(tmp_path / name, {**arrays(), "labels": labels.to(torch.uint8)})
    data = calibration_file(path, pair)
    assert data.labels is not None
    assert data.labels.dtype == torch.int64
    assert torch.equal(data.labels, labels)
    assert torch.equal(samples_of(data), arrays()["x"])
    assert data.describe() == f"calibration: 19 samples with labels, from {name}"
    with pytest.raises(UsageError, match="holds some already"):
        read_calibration(path, pair, labels=labels)


def test_labels_beside_a_file_without_any(pair: Program, tmp_path: Path) -> None:
    path = saved(tmp_path / "data.npz", arrays())
    found = read_calibration(path, pair, labels=torch.arange(19)).labels
    assert found is not None
    assert torch.equal(found, torch.arange(19))


def test_an_input_that_is_called_labels_is_an_input(tmp_path: Path) -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return x + labels

    program = capture(Named(), {"x": torch.ones(2, 4), "labels": torch.ones(2, 4)})
    given = {"x": torch.ones(9, 4), "labels": torch.randn(9, 4)}
    data = calibration_file(saved(tmp_path / "data.npz", given), program)
    assert data.labels is None
    assert torch.equal(torch.cat([labels for _, labels in data]), given["labels"])


def without(name: str) -> dict[str, Tensor]:
    return {key: item for key, item in arrays().items() if key != name}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing": (without("ids"), "lacks 'ids'\n  remedy: the inputs are x, ids, scale"),
    "extra": ({**arrays(), "label": torch.ones(19)}, "has 'label', which is no input"),
    "type": (
        {**arrays(), "x": arrays()["x"].double()},
        "'x' in PATH is float64, the model takes float32\n  remedy: save it as float32",
    ),
    "rank": ({**arrays(), "x": torch.ones(19)}, "input 'x' is [19], the model takes [samples, 4]"),
    "size": ({**arrays(), "scale": torch.ones(2)}, "input 'scale' is [2], the model takes [3]"),
    "counts": (
        {**arrays(), "ids": torch.ones(18, 5).long()},
        "differ in their samples: 'x' has 19, 'ids' has 18",
    ),
    "labels of another count": (
        {**arrays(), "labels": torch.ones(18).long()},
        "PATH: there are 18 labels for 19 samples\n  remedy: give one for each sample",
    ),
    "labels of another type": (
        {**arrays(), "labels": torch.ones(19)},
        "PATH: the labels are float32, not whole numbers",
    ),
    "labels of another rank": (
        {**arrays(), "labels": torch.ones(19, 2).long()},
        "PATH: the labels are [19, 2], not one number for each sample",
    ),
    "empty": (arrays(0), "(from NAME) has 0 samples, at least 1 are needed"),
    "NaN": (
        {**arrays(), "x": torch.full((19, 4), torch.nan)},
        "calibration batch 0: input 'x' holds NaN",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("name", ["data.npz", "data.safetensors"])
def test_a_wrong_file_is_refused(pair: Program, tmp_path: Path, what: str, name: str) -> None:
    given, message = REFUSED[what]
    path = saved(tmp_path / name, given)
    with pytest.raises(UsageError) as caught:
        calibration_file(path, pair)
    wanted = message.replace("PATH", str(path)).replace("NAME", name)
    assert wanted in str(caught.value)


class Evil:
    """Leaves a mark when it is unpickled."""

    mark = Path()

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (Evil.mark,))


def test_pickled_objects_are_refused_and_not_loaded(pair: Program, tmp_path: Path) -> None:
    Evil.mark = tmp_path / "mark"
    objects = np.array([Evil()], dtype=object)
    np.savez(tmp_path / "evil.npz", **{**arrays(), "x": objects}, allow_pickle=True)
    with pytest.raises(UnsafeFileError, match=r"'x' in .* holds pickled Python objects"):
        calibration_file(tmp_path / "evil.npz", pair)
    assert not Evil.mark.exists()


HOSTILE: dict[str, tuple[str, bytes, str]] = {
    "no zip": (".npz", b"PK no zip", "is damaged: File is not a zip"),
    "claims": (".npz", zipped(npy("(1099511627776, 4)")), "'x' of float32 .* is not all there"),
    "no header": (".npz", zipped(b"x" * 40), "something else than a plain array"),
    "records": (".npz", zipped(npy("(2,)", "[('a', '<f4')]")), "something else than a plain"),
    "no array": (".npz", zipped(npy("(0, 4)"), "../x"), "is no array"),
    "bomb": (
        ".npz",
        zipped(npy("(4194304,)") + bytes(1 << 24), compression=zipfile.ZIP_DEFLATED),
        "unpacks to .* more than 100 times its size",
    ),
    "packed oddly": (".npz", zipped(npy("(0, 4)"), compression=zipfile.ZIP_BZIP2), "unknown way"),
    "short": (".safetensors", b"x", "its header has .* bytes"),
    "long header": (".safetensors", header(1 << 40) + bytes(64), "its header has 1099511627776 b"),
    "no JSON": (
        ".safetensors",
        struct.pack("<Q", 4) + b"oops" + bytes(64),
        "is damaged: Expecting",
    ),
    "deep": (".safetensors", struct.pack("<Q", 90000) + b"[" * 90000, "nests too deeply"),
    "a list": (".safetensors", struct.pack("<Q", 2) + b"[]", "no JSON object"),
    "outside": (
        ".safetensors",
        header(-1, **record(offsets=(1 << 40, (1 << 40) + 32))) + bytes(32),
        "is not all there",
    ),
    "negative": (
        ".safetensors",
        header(-1, **record(shape_=(-2, -4))) + bytes(32),
        "not all there",
    ),
    "mismatch": (".safetensors", header(-1, **record(shape_=(3, 4))) + bytes(32), "not all there"),
    "words": (
        ".safetensors",
        header(-1, **record(offsets="ab")) + bytes(32),
        "the record of 'x' is",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_damaged_or_hostile_file_is_refused(pair: Program, tmp_path: Path, what: str) -> None:
    suffix, data, message = HOSTILE[what]
    path = tmp_path / f"data{suffix}"
    path.write_bytes(data)
    with pytest.raises(UnsafeFileError, match=message):
        calibration_file(path, pair)


USAGE: dict[str, tuple[str, bytes | None, str]] = {
    "absent": (".npz", None, "there is no file"),
    "kind": (".pkl", b"x", "neither .npz nor .safetensors"),
    "columns": (".npz", zipped(npy("(2, 4)", order="True") + bytes(32)), "in column order"),
    "type": (".npz", zipped(npy("(2,)", "'<U4'") + bytes(32)), "is of type '<U4'"),
    "big-endian": (".npz", zipped(npy("(2,)", "'>f4'") + bytes(8)), "is of type '>f4'"),
    "float8": (".safetensors", header(-1, **record("F8_E4M3")) + bytes(32), "of type 'F8_E4M3'"),
}


@pytest.mark.parametrize("what", USAGE)
def test_a_file_of_another_kind_is_refused(pair: Program, tmp_path: Path, what: str) -> None:
    suffix, data, message = USAGE[what]
    path = tmp_path / f"data{suffix}"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UsageError, match=message):
        calibration_file(path, pair)


def test_a_file_that_shrinks_meanwhile_is_told(pair: Program, tmp_path: Path) -> None:
    path = saved(tmp_path / "data.safetensors", arrays())
    data = calibration_file(path, pair)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UnsafeFileError, match="ends within an array"):
        list(data)


# --- the command line -------------------------------------------------------------------------


SHOP = """
import torch
def make():
    return torch.nn.Linear(3, 2), torch.ones(2, 3)
"""


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> list[str]:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    (folder / "calibration_shop.py").write_text(SHOP)
    return ["convert", "calibration_shop:make", "-o", "out", "--recipe", "exact", "--json", *words]


def test_convert_takes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(effopt.save, "BUDGET", 0.1)
    saved(tmp_path / "data.npz", {"input": torch.ones(9, 3)})
    words = command(monkeypatch, tmp_path, "--calibration", "data.npz", "--target", "onnx")
    assert main(words) == 0
    notes = json.loads(capsys.readouterr().out)["report"]["notes"]
    assert "calibration: 9 samples, from data.npz" in notes


@pytest.mark.parametrize(
    ("name", "given", "code", "message"),
    [
        ("absent.npz", None, 2, "there is no file absent.npz"),
        ("data.pkl", b"x", 2, "data.pkl is neither .npz nor .safetensors"),
        ("data.npz", b"x", 7, "data.npz is damaged"),
        ("evil.npz", zipped(npy("(1,)", "'|O'") + bytes(9)), 7, "holds pickled Python objects"),
        ("data.npz", {"input": torch.ones(9, 4)}, 2, "[9, 4], the model takes [samples, 3]"),
        ("data.npz", {"inputs": torch.ones(9, 3)}, 2, "data.npz lacks 'input'"),
    ],
)
def test_convert_refuses_a_wrong_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    given: Any,
    code: int,
    message: str,
) -> None:
    if isinstance(given, bytes):
        (tmp_path / name).write_bytes(given)
    elif given:
        saved(tmp_path / name, given)
    found = main(command(monkeypatch, tmp_path, "--calibration", name))
    error = json.loads(capsys.readouterr().out)["error"]
    assert (found, error["exit_code"]) == (code, code)
    assert message in error["reason"]
    assert error["remedy"]
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "no.such:model", "-o", "out", "--calibration", "absent.npz"]) == 2
    assert "there is no file absent.npz" in capsys.readouterr().err
