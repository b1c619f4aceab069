"""Small ONNX models for hostile files, and the check that one is refused with nothing outside read.

The secret is a real file outside of the model's folder; an audit hook sees every file opened.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from effopt.backends.onnx_check import check_file
from effopt.errors import UnsafeFileError

FLOAT = TensorProto.FLOAT
opened: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_watch)


def laid_out(tmp_path: Path) -> Path:
    """The model's folder, with plain weights of 16 bytes, beside a secret of 16 bytes."""
    (tmp_path / "secret.bin").write_bytes(b"the secret bytes")
    (tmp_path / "model-evil").mkdir()
    (tmp_path / "model-evil" / "w.bin").write_bytes(b"0" * 16)
    made = tmp_path / "model"
    (made / "sub").mkdir(parents=True)
    (made / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    os.symlink(tmp_path / "secret.bin", made / "link.bin")
    os.symlink(tmp_path, made / "out")
    os.link(tmp_path / "secret.bin", made / "hard.bin")
    os.mkfifo(made / "pipe.bin")
    return made


def external(dims: tuple[int, ...] = (4,), **entries: Any) -> TensorProto:
    tensor = TensorProto(name="w", data_type=FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def value(name: str, shape: list[Any] | None = None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes: list[Any], weights: list[TensorProto] = [], **more: Any) -> onnx.ModelProto:  # noqa: B006
    graph = helper.make_graph(nodes, "g", [value("x", ["n", 4])], [value("y")], weights, **more)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def add(tensor: TensorProto) -> onnx.ModelProto:
    return model([helper.make_node("Add", ["x", "w"], ["y"])], [tensor])


def refused(made: onnx.ModelProto, folder: Path) -> str:
    """Save, check that the file is refused and that no other file was opened for it."""
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    opened.clear()
    with pytest.raises(UnsafeFileError) as caught:
        check_file(folder / "model.onnx")
    seen = [path for path in opened if Path(path).name in ("secret.bin", "link.bin")]
    seen += [path for path in opened if "model-evil" in Path(path).parts]
    assert not seen, seen
    assert caught.value.exit_code == 7
    return caught.value.reason
