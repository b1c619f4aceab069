"""The engine folder: written whole or not at all, and checked before anything in it is used.

`manifest.json` names every other file with its size and SHA-256. The folder may come from a
stranger: names cannot leave it, links and unknown files are refused, nothing is unpickled.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from effopt.errors import EffoptError, UnsafeFileError, UsageError
from effopt.signature import Signature

FORMAT = 1
MANIFEST = "manifest.json"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_MAX_MANIFEST = 64 << 20
_CHUNK = 1 << 20
_AGAIN = "write the engine again, or get the folder again from a source that you trust"


@dataclass(frozen=True)
class Manifest:
    """What an engine folder says about itself; `files` is filled when the folder is written.

    `facts` are the backend's own; `steps`, `quality` and `measured` are records of the report;
    `files` maps each file's name to {"sha256": hex digits, "bytes": size}.
    """

    effopt: str
    target: str
    backend: str
    signature: Signature
    recipe: str = ""
    steps: list[Any] = field(default_factory=list)
    quality: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    pending: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Return the plain record that is written."""
        return {**asdict(self), "signature": self.signature.to_json()}


def write(path: str | os.PathLike[str], fill: Callable[[Path], Manifest]) -> Path:
    """Make an engine folder: `fill` writes files into a folder and returns their manifest.

    Everything is written beside the target and renamed, so that a failure or Ctrl-C leaves what
    was there. An engine folder is replaced; anything else that is not an empty folder is a
    UsageError. A full disk or a folder that cannot be written is an EffoptError.
    """
    target = Path(os.path.abspath(path))
    _check_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _disk_error(target, error) from error
    try:
        os.chmod(fresh, 0o777 & ~_umask())
        manifest = fill(fresh)
        seal(fresh, manifest)
        _check_free(target)
        _replace(fresh, target)
    except OSError as error:
        raise _disk_error(target, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # gone already where all went well
    return target


def read(path: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of a folder and check every file against it.

    Raises UsageError for what is no engine folder, UnsafeFileError for one that was damaged or
    changed, or that holds links or unknown files.
    """
    folder = Path(path)
    if not is_engine(folder):
        what = "there is no such folder" if not folder.exists() else "it has no manifest.json"
        remedy = "give a folder that effopt has written"
        raise UsageError(f"{folder} is no engine folder: {what}", remedy)
    manifest = _parse(read_file(folder, MANIFEST, _MAX_MANIFEST))
    found = {entry.name for entry in os.scandir(folder)} - {MANIFEST}
    if extra := sorted(found - set(manifest.files)):
        raise UnsafeFileError(f"{extra[0]!r} is in the folder, but not in the manifest", _AGAIN)
    for name, record in manifest.files.items():
        _check_file(folder, name, record)
    return manifest


def is_engine(folder: Path) -> bool:
    """Tell whether a path is a folder with a manifest in it."""
    return folder.is_dir() and os.path.lexists(folder / MANIFEST)


def read_file(folder: Path, name: str, limit: int | None = None) -> bytes:
    """Read one plain file of a folder; UnsafeFileError for a link or one above the limit."""
    with _opened(folder, name) as file:
        if limit is not None and os.fstat(file.fileno()).st_size > limit:
            raise UnsafeFileError(f"{name} is larger than {limit} bytes", _AGAIN)
        return file.read()


# --- writing ----------------------------------------------------------------------------------


def _check_free(target: Path) -> None:
    """Refuse a target that holds something which is not ours."""
    if target.is_symlink():
        raise UsageError(f"{target} is a symbolic link", "give the folder itself")
    if not target.exists() or is_engine(target):
        return
    if not target.is_dir() or any(target.iterdir()):
        raise UsageError(f"{target} exists and is no engine folder", "choose another name for it")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder that is being made, with the hashes of its other files."""
    files = {}
    entries = [entry for entry in os.scandir(folder) if entry.name != MANIFEST]
    for entry in sorted(entries, key=lambda entry: entry.name):
        assert _is_name(entry.name), entry.name
        assert entry.is_file(follow_symlinks=False), entry.name
        with open(entry.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[entry.name] = {"sha256": digest, "bytes": entry.stat().st_size}
    record = {**manifest.to_json(), "files": files}
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _replace(fresh: Path, target: Path) -> None:
    """Put the fresh folder in place; the old one comes back if that fails."""
    if not target.exists():
        os.rename(fresh, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.rename(target, aside)
    try:
        os.rename(fresh, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _disk_error(target: Path, error: OSError) -> EffoptError:
    remedies = {
        errno.ENOSPC: "free some space, or choose another disk",
        errno.EDQUOT: "free some space, or choose another disk",
        errno.EACCES: "choose a folder that you may write to",
        errno.EPERM: "choose a folder that you may write to",
        errno.EROFS: "choose a folder that you may write to",
        errno.ENOTDIR: "choose a path below a folder",
        errno.EEXIST: "choose a path below a folder",
    }
    remedy = remedies.get(error.errno or 0, "choose another folder")
    culprit = Path(os.fsdecode(error.filename)) if error.filename else target
    # What lies elsewhere, such as a cache or a compiler, is not the folder that was asked for.
    own = culprit.is_relative_to(target) or culprit.parent.name.startswith(f".{target.name}.")
    if culprit == target.parent or own or target.is_relative_to(culprit):
        return EffoptError(f"{target} cannot be written: {error.strerror or error}", remedy)
    remedy = f"nothing was written to {target}: mend that path, and try again"
    return EffoptError(f"{culprit}: {error.strerror or error}", remedy)


# --- reading ----------------------------------------------------------------------------------


def _is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name not in (".", "..")


@contextlib.contextmanager
def _opened(folder: Path, name: str) -> Iterator[io.BufferedReader]:
    """Open a regular file of the folder that has one name only, neither soft nor hard link."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        what = "is a symbolic link" if error.errno == errno.ELOOP else "cannot be opened"
        raise UnsafeFileError(f"{name!r} {what} ({error.strerror})", _AGAIN) from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(descriptor)
        raise UnsafeFileError(f"{name!r} is no plain file, or a hard link", _AGAIN)
    with open(descriptor, "rb") as file:
        yield file


def _check_file(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    with _opened(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size != record["bytes"]:
            reason = f"{name!r} has {size} bytes, its manifest says {record['bytes']}"
            raise UnsafeFileError(reason, _AGAIN)
        if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
            raise UnsafeFileError(f"{name!r} is not what was written: its hash differs", _AGAIN)


def _parse(data: bytes) -> Manifest:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged("it is no JSON") from error
    if not isinstance(record, dict) or "format" not in record:
        raise _damaged("it has no format")
    if record["format"] != FORMAT:
        shown = str(record["format"])[:20]
        raise UnsafeFileError(f"{MANIFEST} has format {shown}, not {FORMAT}", "upgrade effopt")
    for name, kind in _KINDS.items():
        if not isinstance(record.get(name), kind):
            raise _damaged(f"{name!r} is missing, or no {kind.__name__}")
    _check_names(record["files"])
    known = {name: record[name] for name in _KINDS if name != "signature"}
    try:
        return Manifest(**known, signature=Signature.from_json(record["signature"]))
    except UnsafeFileError as error:
        raise _damaged(error.reason) from error
    except RecursionError as error:
        raise _damaged("the signature nests without end") from error


_KINDS: dict[str, type] = {
    "format": int, "effopt": str, "target": str, "backend": str, "signature": dict,
    "recipe": str, "steps": list, "quality": dict, "measured": dict, "facts": dict,
    "tools": dict, "pending": str, "files": dict,
}  # fmt: skip


def _check_names(files: dict[str, Any]) -> None:
    for name, record in files.items():
        if not _is_name(name) or name == MANIFEST:
            raise _damaged(f"the file name {name[:100]!a} could leave the folder")
        good = isinstance(record, dict) and type(record.get("bytes")) is int
        if not good or not re.fullmatch(r"[0-9a-f]{64}", str(record.get("sha256"))):
            raise _damaged(f"the entry of {name!r} is no hash and size")


def _damaged(what: str) -> UnsafeFileError:
    return UnsafeFileError(f"{MANIFEST} is damaged: {what}", _AGAIN)
