"""Calibration data for tests: a model of two inputs, its batches, and the bytes of files."""

import io
import json
import struct
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from effopt.calibration import Calibration

Batch = dict[str, Tensor]


class Pair(nn.Module):
    """Two inputs of one batch, a scale for all samples, and a mode that the graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 3)

    def forward(self, x: Tensor, ids: Tensor, scale: Tensor, mode: str = "sum") -> Tensor:
        found: Tensor = self.up(x) * scale + ids.sum(1, keepdim=True)
        return found if mode == "sum" else found.exp()


def batch(rows: int = 2, **changes: Tensor) -> Batch:
    made = {"x": torch.randn(rows, 4), "ids": torch.ones(rows, 5).long(), "scale": torch.ones(3)}
    return {**made, **changes}


def numbered(*sizes: int) -> list[Batch]:
    """Make batches whose x counts the samples."""
    starts = np.cumsum([0, *sizes])
    rows = [torch.arange(4.0 * a, 4.0 * b).reshape(-1, 4) for a, b in pairwise(starts)]
    return [batch(len(x), x=x) for x in rows]


def samples_of(data: Calibration) -> Tensor:
    return torch.cat([x for x, _, _ in data])


def arrays(rows: int = 19) -> dict[str, Tensor]:
    (made,) = numbered(rows)
    return {**made, "ids": torch.arange(rows * 5).reshape(rows, 5)}


def saved(path: Path, tensors: dict[str, Any]) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
        return path
    save = np.savez_compressed if "packed" in path.name else np.savez
    save(path, **{key: np.asarray(item) for key, item in tensors.items()})
    return path


def header(length: int, **records: Any) -> bytes:
    data = json.dumps(records).encode()
    return struct.pack("<Q", len(data) if length < 0 else length) + data


def npy(shape_: str, descr: str = "'<f4'", order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape_}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def zipped(data: bytes, name: str = "x.npy", **options: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr(name, data)
    return file.getvalue()


def record(dtype: Any = "F32", shape_: Any = (2, 4), offsets: Any = (0, 32)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape_, "data_offsets": offsets}}
