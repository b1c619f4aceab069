"""The engine folder: whole or not at all, and nothing in it is taken on trust."""

import errno
import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effopt.errors import EffoptError, UnsafeFileError, UsageError
from effopt.folder import MANIFEST, Manifest, read, write
from effopt.reference import REFERENCE, read_reference, write_reference
from effopt.signature import Signature, TensorSpec

SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 4), "x"),),
    (TensorSpec("y", "float32", ("batch",), "y"),),
    {"dict": {"y": 0}},
)
RECORD = Manifest(
    "0.1.0", "cpu", "ort", SIGNATURE, "exact", [{"pass": "simplify"}], {"cosine": 1.0},
    {"ms": 2.5}, {"opset": 20}, {"torch": "2.13.0"}, "",
)  # fmt: skip


def fill(folder: Path) -> Manifest:
    (folder / "model.onnx").write_bytes(b"the model")
    (folder / "model.onnx.data").write_bytes(b"the weights")
    return RECORD


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return write(tmp_path / "out", fill)


def siblings(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.parent.iterdir())


# --- writing ----------------------------------------------------------------------------------


def test_what_is_written_is_read_back(made: Path) -> None:
    found = read(made)
    assert replace(found, files={}) == RECORD
    assert found.files["model.onnx"]["bytes"] == 9
    assert re.fullmatch("[0-9a-f]{64}", found.files["model.onnx.data"]["sha256"])
    assert siblings(made) == ["out"]
    record = json.loads((made / MANIFEST).read_text())
    assert record["format"] == 1
    assert record["signature"]["inputs"][0]["shape"] == ["batch", 4]


def test_permissions_are_those_of_a_plain_folder(made: Path) -> None:
    other = made.parent / "plain"
    other.mkdir()
    assert made.stat().st_mode == other.stat().st_mode


def test_an_engine_is_replaced_and_an_empty_folder_used(made: Path) -> None:
    def again(folder: Path) -> Manifest:
        (folder / "new.onnx").write_bytes(b"new")
        return RECORD

    write(made, again)
    assert sorted(os.listdir(made)) == [MANIFEST, "new.onnx"]
    empty = made.parent / "empty"
    empty.mkdir()
    assert read(write(empty, fill)).recipe == "exact"
    assert siblings(made) == ["empty", "out"]


def test_parents_are_made(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a" / "b" / "out", fill)).target == "cpu"


def test_what_is_no_engine_is_left_alone(tmp_path: Path) -> None:
    folder, file = tmp_path / "photos", tmp_path / "notes.txt"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"cat")
    file.write_text("notes")
    link, target = tmp_path / "link", tmp_path / "elsewhere"
    target.mkdir()
    link.symlink_to(target)
    for path, reason in (
        (folder, "exists and is no engine folder"),
        (file, "exists and is no engine folder"),
        (link, "is a symbolic link"),
    ):
        with pytest.raises(UsageError, match=reason):
            write(path, fill)
    assert (folder / "cat.jpg").read_bytes() == b"cat"
    assert file.read_text() == "notes"
    assert not list(target.iterdir())
    assert siblings(folder) == ["elsewhere", "link", "notes.txt", "photos"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no"), EffoptError("refused")])
def test_a_failure_leaves_what_was_there(made: Path, error: BaseException) -> None:
    def broken(folder: Path) -> Manifest:
        (folder / "half.onnx").write_bytes(b"half")
        raise error

    for path in (made, made.parent / "fresh"):
        with pytest.raises(type(error)):
            write(path, broken)
    assert siblings(made) == ["out"]
    assert "model.onnx" in read(made).files


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space, or choose another disk"),
        (errno.EACCES, "choose a folder that you may write to"),
    ],
)
def test_a_full_or_closed_disk_is_told(made: Path, code: int, remedy: str) -> None:
    def broken(folder: Path) -> Manifest:
        raise OSError(code, os.strerror(code))

    with pytest.raises(EffoptError) as caught:
        write(made, broken)
    said = f"{made} cannot be written: {os.strerror(code)}\n  remedy: {remedy}"
    assert str(caught.value) == said
    assert siblings(made) == ["out"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EffoptError, match="cannot be written"):
        write(tmp_path / "file" / "out", fill)


def test_the_old_engine_comes_back_if_the_swap_fails(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = os.rename, []

    def second_fails(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(EffoptError, match="Input/output error"):
        write(made, fill)
    assert "model.onnx" in read(made).files
    assert siblings(made) == ["out"]


def test_a_planted_link_is_not_followed(made: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (made / "model.onnx").unlink()
    (made / "model.onnx").symlink_to(outside)
    write(made, fill)
    assert outside.read_text() == "mine"
    assert (made / "model.onnx").read_bytes() == b"the model"


# --- reading ----------------------------------------------------------------------------------


def edit(made: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((made / MANIFEST).read_text())
    change(record)
    (made / MANIFEST).write_text(json.dumps(record))


def refused(made: Path) -> str:
    with pytest.raises(UnsafeFileError) as caught:
        read(made)
    assert caught.value.exit_code == 7
    assert caught.value.remedy
    return caught.value.reason


def test_what_is_no_engine_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, why in (
        ("none", "there is no such folder"),
        ("file", "it has no manifest.json"),
        (".", "it has no manifest.json"),
    ):
        with pytest.raises(UsageError) as caught:
            read(tmp_path / name)
        assert f"is no engine folder: {why}" in str(caught.value)


def test_changed_files(made: Path) -> None:
    (made / "model.onnx").write_bytes(b"The model")
    assert refused(made) == "'model.onnx' is not what was written: its hash differs"
    (made / "model.onnx").write_bytes(b"the mode")
    assert refused(made) == "'model.onnx' has 8 bytes, its manifest says 9"
    (made / "model.onnx").unlink()
    assert "'model.onnx' cannot be opened (No such file or directory)" in refused(made)


def test_files_that_are_not_in_the_manifest(made: Path) -> None:
    (made / "evil.so").write_bytes(b"")
    assert refused(made) == "'evil.so' is in the folder, but not in the manifest"


def test_links_and_other_files(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (made / "model.onnx").rename(copy)
    (made / "model.onnx").symlink_to(copy)
    assert "'model.onnx' is a symbolic link" in refused(made)
    (made / "model.onnx").unlink()
    os.link(copy, made / "model.onnx")
    assert refused(made) == "'model.onnx' is no plain file, or a hard link"
    (made / "model.onnx").unlink()
    os.mkfifo(made / "model.onnx")
    assert refused(made) == "'model.onnx' is no plain file, or a hard link"
    (made / "model.onnx").unlink()
    (made / "model.onnx").mkdir()
    assert refused(made) == "'model.onnx' is no plain file, or a hard link"


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "a\0",
        "a" * 129,
        "\x1b[2J",
        "naïve",
    ],
)
def test_names_that_could_leave_the_folder(made: Path, name: str) -> None:
    (made.parent / "secret").write_bytes(b"secret")
    record = {"sha256": "0" * 64, "bytes": 6}
    edit(made, lambda r: r["files"].update({name: record}))
    reason = refused(made)
    assert "could leave the folder" in reason
    assert reason.isprintable()


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda r: r.update(format=2), "manifest.json has format 2, not 1"),
    "no format": (lambda r: r.pop("format"), "it has no format"),
    "files": (lambda r: r.update(files=[]), "'files' is missing, or no dict"),
    "backend": (lambda r: r.update(backend=5), "'backend' is missing, or no str"),
    "recipe": (lambda r: r.pop("recipe"), "'recipe' is missing, or no str"),
    "hash": (lambda r: r["files"]["model.onnx"].update(sha256=5), "no hash and size"),
    "size": (lambda r: r["files"]["model.onnx"].update(bytes=True), "no hash and size"),
    "entry": (lambda r: r["files"].update({"model.onnx": None}), "no hash and size"),
    "itself": (lambda r: r["files"].update({MANIFEST: {}}), "could leave the folder"),
    "signature": (lambda r: r.update(signature={}), "the signature is damaged"),
    "port": (lambda r: r["signature"]["inputs"][0].pop("port"), "the signature is damaged"),
    "structure": (lambda r: r["signature"].update(structure=7), "the output structure is damaged"),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_damaged_manifests(made: Path, name: str) -> None:
    change, message = CHANGES[name]
    edit(made, change)
    assert message in refused(made)


def test_manifests_that_are_no_manifest(made: Path) -> None:
    for text in ("", "{", "[]", "null", '{"format": 1', "[" * 100_000, "\xff"):
        (made / MANIFEST).write_bytes(text.encode("latin1"))
        assert "manifest.json is damaged" in refused(made)


def test_a_manifest_that_nests_without_end(made: Path) -> None:
    text = (made / MANIFEST).read_text()
    deep = '{"tuple": [' * 900 + "0" + "]}" * 900
    (made / MANIFEST).write_text(
        re.sub(r'"structure": \{.*?\}\s*\}', f'"structure": {deep}', text, flags=re.S)
    )
    assert "nests without end" in refused(made) or "is damaged" in refused(made)


def test_a_huge_manifest_is_not_read(made: Path) -> None:
    os.truncate(made / MANIFEST, 2**40)
    assert "manifest.json is larger than" in refused(made)


# --- reference.npz ----------------------------------------------------------------------------


def test_reference_round_trip(tmp_path: Path) -> None:
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([True, False])
    write_reference(tmp_path, {"x": x}, {"a.b": y}, {"a.b": np.asfortranarray(x)})
    found = read_reference(tmp_path)
    assert list(found) == ["input.x", "original.a.b", "optimized.a.b"]
    np.testing.assert_array_equal(found["input.x"], x)
    np.testing.assert_array_equal(found["original.a.b"], y)
    np.testing.assert_array_equal(found["optimized.a.b"], x)
    with np.load(tmp_path / REFERENCE) as arrays:
        np.testing.assert_array_equal(arrays["optimized.a.b"], x)
    assert read_reference(tmp_path / "none") == {}


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_in_the_reference_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    np.savez(tmp_path / REFERENCE, x=np.array([Bomb(mark)], dtype=object))
    with pytest.raises(UnsafeFileError, match="damaged"):
        read_reference(tmp_path)
    assert not mark.exists()


def test_a_reference_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / REFERENCE
    np.savez(path, x=np.zeros(4, np.float32))
    with zipfile.ZipFile(path) as archive:
        good = archive.read("x.npy")
    for old, new, message in (
        (b"(4,), }          ", b"(4000000000,), } ", r"float32 \[4000000000\] is not all there"),
        (b"(4,), }", b"(-4,),}", "something else than plain arrays"),
        (b"'<f4'", b"'|O8'", "something else than plain arrays"),
        (b"'shape'", b"'shape(", "something else than plain arrays"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", good.replace(old, new))
        with pytest.raises(UnsafeFileError, match=message):
            read_reference(tmp_path)
    np.savez_compressed(path, x=np.zeros(10**7, np.float32))
    with pytest.raises(UnsafeFileError, match="it is compressed"):
        read_reference(tmp_path)
    path.write_bytes(b"PK no zip")
    with pytest.raises(UnsafeFileError, match=r"reference.npz is damaged: File is not a zip"):
        read_reference(tmp_path)
