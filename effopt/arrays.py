"""Arrays of a `.npz` or `.safetensors` file, read row by row. Free of torch.

The file may come from a stranger: nothing is unpickled, nothing is allocated on a header's word,
and what a header claims is compared with the bytes that are there before any is read.
"""

import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from effopt.errors import UnsafeFileError, UsageError

KINDS = (".npz", ".safetensors")
FORMS = "pass a .npz (numpy.savez) or .safetensors file with one array for each input, by its name"
RATIO = 100
"""How many times its size a compressed file may unpack to."""

_MAX_HEADER = 1 << 20
_NPY = re.compile(
    rb"\{'descr': '(?P<descr>[^']{1,64})', 'fortran_order': (?P<order>True|False), "
    rb"'shape': \((?P<shape>(?:\d{1,18}(?:, \d{1,18})*,?)?)\), \}\s*"
)
_NUMPY = {
    **{f"<f{size}": f"float{8 * size}" for size in (2, 4, 8)},
    **{f"<i{size}": f"int{8 * size}" for size in (2, 4, 8)},
    **{f"<u{size}": f"uint{8 * size}" for size in (2, 4, 8)},
    **{"|b1": "bool", "|i1": "int8", "|u1": "uint8", "<c8": "complex64", "<c16": "complex128"},
}
"""Types of numpy's format by their names in a signature."""
_SAFE = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{"BOOL": "bool", "BF16": "bfloat16"},
}
"""Types of the safetensors format by their names in a signature."""


@dataclass(frozen=True)
class Stored:
    """One array [samples, ...] of a file: its type as in a signature, and where its bytes begin.

    `member` is its name in an archive, "" in a plain file.
    """

    path: Path
    member: str
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the whole array."""
        return math.prod(self.shape) * item_bytes(self.dtype)

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Open the file at the first byte of the array; errors of the format become ours."""
        with _guarded(self.path), self.path.open("rb") as file:
            if not self.member:
                file.seek(self.start)
                yield file
                return
            with zipfile.ZipFile(file) as archive, archive.open(self.member) as member:
                member.read(self.start)
                yield member

    def take(self, file: IO[bytes], rows: int) -> bytes:
        """Read the next rows of an opened array; UnsafeFileError where the file ends before."""
        size = rows * math.prod(self.shape[1:]) * item_bytes(self.dtype)
        return self._whole(file, size)

    def read(self) -> bytes:
        """Read the whole array."""
        with self.opened() as file:
            return self._whole(file, self.nbytes)

    def _whole(self, file: IO[bytes], size: int) -> bytes:
        data = file.read(size)
        if len(data) != size:
            raise _damaged(self.path, "it ends within an array")
        return data


def item_bytes(dtype: str) -> int:
    """Return the bytes of one element of a type, by its name in a signature."""
    return 1 if dtype == "bool" else int(re.sub(r"\D", "", dtype)) // 8


def open_arrays(path: Path) -> dict[str, Stored]:
    """Read the headers of a file: its arrays by name.

    Raises UsageError for a file that is not there or of another kind, UnsafeFileError for one
    with Python objects in it, or whose bytes are not what its headers say.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}", FORMS)
    if path.suffix not in KINDS:
        raise UsageError(f"{path} is neither {' nor '.join(KINDS)}", FORMS)
    with _guarded(path):
        return _npz(path) if path.suffix == ".npz" else _safetensors(path)


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Turn what the libraries raise over damaged data into an error of ours."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}", FORMS) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, ValueError) as error:
        # RuntimeError: what the archive says of itself is encrypted or of an unknown version.
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, what: str) -> UnsafeFileError:
    return UnsafeFileError(f"{path} is damaged: {what}", "save it again with numpy.savez")


# --- .npz


def _npz(path: Path) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > RATIO * path.stat().st_size:
            raise UnsafeFileError(
                f"{path} unpacks to {unpacked} bytes, more than {RATIO} times its size",
                "save it with numpy.savez in place of numpy.savez_compressed",
            )
        for member in members:
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _damaged(path, f"{member.filename!r} is packed in an unknown way")
            name = member.filename.removesuffix(".npy")
            if name == member.filename or name in found:
                raise _damaged(path, f"{member.filename!r} is no array, or there twice")
            with archive.open(member) as file:
                found[name] = _member(path, member, file)
    return found


def _member(path: Path, member: zipfile.ZipInfo, file: IO[bytes]) -> Stored:
    """Read one header of numpy's format 1.0; numpy's own parser fails in many ways on a bad one."""
    name = member.filename.removesuffix(".npy")
    prefix = file.read(10)
    length = int.from_bytes(prefix[8:10], "little")
    header = _NPY.fullmatch(file.read(length))
    if prefix[:8] != b"\x93NUMPY\x01\x00" or header is None:
        raise _damaged(path, f"{name!r} is something else than a plain array")
    descr = header["descr"].decode("latin-1")
    if "O" in descr:
        raise UnsafeFileError(
            f"{name!r} in {path} holds pickled Python objects, which could run code",
            "save arrays of numbers, all rows of one length",
        )
    if descr not in _NUMPY:
        raise UsageError(f"{name!r} in {path} is of type {descr!r}", "save it as plain numbers")
    sizes = tuple(int(size) for size in header["shape"].split(b",") if size.strip())
    if header["order"] == b"True" and len(sizes) > 1:
        raise UsageError(
            f"{name!r} in {path} is in column order", "save numpy.ascontiguousarray of it"
        )
    stored = Stored(path, member.filename, 10 + length, _NUMPY[descr], sizes)
    if stored.start + stored.nbytes != member.file_size:
        raise _damaged(path, f"{name!r} of {stored.dtype} {list(sizes)} is not all there")
    return stored


# --- .safetensors


def _safetensors(path: Path) -> dict[str, Stored]:
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, total - 8):
            raise _damaged(path, f"its header has {length} bytes")
        try:
            header = json.loads(file.read(length))
        except RecursionError as error:
            raise _damaged(path, "its header nests too deeply") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    base = 8 + length
    names = [name for name in header if name != "__metadata__"]
    return {name: _slice(path, name, header[name], base, total) for name in names}


def _slice(path: Path, name: str, record: Any, base: int, total: int) -> Stored:
    """Check one record of a safetensors header against the file."""
    match record:
        case {"dtype": str(dtype), "shape": list(sizes), "data_offsets": [int(low), int(high)]}:
            pass
        case _:
            raise _damaged(path, f"the record of {name!r} is {record!r:.60}")
    if dtype not in _SAFE:
        raise UsageError(f"{name!r} in {path} is of type {dtype!r}", "save it as plain numbers")
    whole = all(type(size) is int and size >= 0 for size in sizes)
    stored = Stored(path, "", base + low, _SAFE[dtype], tuple(sizes) if whole else ())
    if not (whole and 0 <= low <= high <= total - base and stored.nbytes == high - low):
        raise _damaged(path, f"{name!r} of {dtype} {sizes!r:.60} is not all there")
    return stored
