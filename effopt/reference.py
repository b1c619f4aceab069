"""`reference.npz`: a few inputs and both models' outputs on them, to check an engine by."""

import io
import math
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from effopt.backend import Array
from effopt.errors import UnsafeFileError
from effopt.folder import read_file

REFERENCE = "reference.npz"

_PLAIN = "biufc"
"""Kinds of numpy types that are plain numbers: no object, no string, no record."""

_HEADER = re.compile(
    rb"\{'descr': '([<|][biufc]\d{1,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}(?:, \d{1,18})*,?)?)\), \}\s*"
)


def write_reference(
    folder: Path,
    inputs: Mapping[str, Array],
    original: Mapping[str, Array],
    optimized: Mapping[str, Array],
) -> None:
    """Write inputs and the outputs of both models, by the names of the signature."""
    groups = {"input": inputs, "original": original, "optimized": optimized}
    arrays = {f"{kind}.{n}": a for kind, group in groups.items() for n, a in group.items()}
    with zipfile.ZipFile(folder / REFERENCE, "w") as archive:
        for name, array in arrays.items():
            assert array.dtype.kind in _PLAIN, name
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def read_reference(folder: Path) -> dict[str, Array]:
    """Return the arrays "input.<name>", "original.<output>", "optimized.<output>"; {} if none.

    Raises UnsafeFileError for anything but plain arrays whose bytes are all in the file: numpy's
    own reader allocates what a header claims, and unpacks what is compressed.
    """
    if not os.path.lexists(folder / REFERENCE):
        return {}
    data = read_file(folder, REFERENCE)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members):
                raise _damaged("it is compressed")
            return {m.filename.removesuffix(".npy"): _array(archive.read(m)) for m in members}
    except (ValueError, TypeError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
        # RuntimeError: what the archive says of itself is encrypted or of an unknown version.
        raise _damaged(str(error)) from error


def _array(data: bytes) -> Array:
    """Read one `.npy` of version 1.0; numpy's own parser fails in many ways on a bad header."""
    length = int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10 : 10 + length])
    if data[:8] != b"\x93NUMPY\x01\x00" or header is None:
        raise _damaged("it holds something else than plain arrays")
    dtype = np.dtype(header[1].decode())
    shape = tuple(int(size) for size in header[3].split(b",") if size.strip())
    if math.prod(shape) * dtype.itemsize != len(data) - 10 - length:
        raise _damaged(f"an array of {dtype} {list(shape)} is not all there")
    flat = np.frombuffer(data, dtype, offset=10 + length)
    return flat.reshape(shape, order="F" if header[2] == b"True" else "C")


def _damaged(what: str) -> UnsafeFileError:
    return UnsafeFileError(f"{REFERENCE} is damaged: {what}", "write the engine again")
