"""Hostile ONNX files: each must be refused before a runtime opens it, and nothing outside read.

The secret is a real file outside of the model's folder; an audit hook sees every file opened.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from effopt.backends.onnx_check import MAX_DEPTH, check_file
from effopt.errors import UnsafeFileError

FLOAT = TensorProto.FLOAT
opened: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_watch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
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
    assert not seen
    assert caught.value.exit_code == 7
    return caught.value.reason


# --- good files -------------------------------------------------------------------------------


def test_plain_files_pass(folder: Path) -> None:
    inside = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    for tensor in (
        inside,
        external(location="w.bin"),
        external(location="w.bin", offset=0, length=16),
        external((2,), location="w.bin", offset=8, length=8),
        helper.make_tensor("w", TensorProto.FLOAT16, [4], [1.0, 2.0, 3.0, 4.0]),
        helper.make_tensor("w", TensorProto.INT4, [3], [1, 2, 3]),
        helper.make_tensor("w", TensorProto.BOOL, [0], []),
    ):
        (folder / "model.onnx").write_bytes(add(tensor).SerializeToString())
        check_file(folder / "model.onnx")


def test_a_model_below_a_linked_folder_passes(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(add(external(location="w.bin")).SerializeToString())
    os.symlink(folder, folder.parent / "alias")
    check_file(folder.parent / "alias" / "model.onnx")


# --- bytes elsewhere --------------------------------------------------------------------------

ESCAPES = {
    "../secret.bin": "leaves the folder",
    "sub/../../secret.bin": "leaves the folder",
    "../model-evil/w.bin": "leaves the folder",
    "link.bin": "leaves the folder",
    "out/secret.bin": "leaves the folder",
    "hard.bin": "hard link",
    "pipe.bin": "no regular file",
    "sub": "no regular file",
    ".": "leaves the folder",
    "": "leaves the folder",
    "missing.bin": "cannot be opened (No such file or directory)",
    "w.bin\0": "leaves the folder",
    "C:\\w.bin": "leaves the folder",
    "*/_ORT_MEM_ADDR_/*": "leaves the folder",
}


@pytest.mark.parametrize("location", list(ESCAPES))
def test_location(folder: Path, location: str) -> None:
    reason = refused(add(external(location=location)), folder)
    assert reason.startswith("model.onnx: tensor 'w': ")
    assert ESCAPES[location] in reason


def test_absolute_location(folder: Path) -> None:
    absolute = str(folder.parent / "secret.bin")
    assert "leaves the folder" in refused(add(external(location=absolute)), folder)
    inside = str(folder / "w.bin")
    assert "leaves the folder" in refused(add(external(location=inside)), folder)


BOUNDS: dict[str, tuple[dict[str, Any], str]] = {
    "offset beyond": ({"offset": 2**40}, f"its bytes end at {2**40 + 16}, the file at 16"),
    "offset": ({"offset": 4}, "its bytes end at 20, the file at 16"),
    "negative offset": ({"offset": -1}, "its offset is '-1'"),
    "negative length": ({"length": -1}, "its length is '-1'"),
    "length": ({"length": 2**40}, f"length {2**40} for a shape of 16 bytes"),
    "short": ({"length": 8}, "length 8 for a shape of 16 bytes"),
    "huge number": ({"offset": "9" * 5000}, "its offset is '9999"),
    "unknown entry": ({"basepath": "/etc"}, "unknown or repeated entries"),
}


@pytest.mark.parametrize("name", list(BOUNDS))
def test_bounds(folder: Path, name: str) -> None:
    entries, message = BOUNDS[name]
    assert message in refused(add(external(location="w.bin", **entries)), folder)


def test_repeated_entry(folder: Path) -> None:
    tensor = external(location="w.bin")
    tensor.external_data.add(key="location", value="../secret.bin")
    assert "unknown or repeated entries" in refused(add(tensor), folder)


def test_location_without_the_external_mark(folder: Path) -> None:
    tensor = external(location="../secret.bin")
    tensor.data_location = TensorProto.DEFAULT
    assert "leaves the folder" in refused(add(tensor), folder)


# --- shapes -----------------------------------------------------------------------------------


def test_shapes_that_the_bytes_do_not_fill(folder: Path) -> None:
    for dims in ((2**32, 2**32), (5,), (2**62, 4)):
        size = 4 * np.prod(dims, dtype=object)
        tensor = external(dims, location="w.bin")
        assert "its bytes end at" in refused(add(tensor), folder)
        raw = TensorProto(name="w", data_type=FLOAT, dims=dims, raw_data=b"0" * 16)
        assert f"16 bytes for a shape of {size}" in refused(add(raw), folder)
        typed = TensorProto(name="w", data_type=FLOAT, dims=dims, float_data=[1.0])
        assert f"1 elements for a shape of {size // 4}" in refused(add(typed), folder)
    tensor = external((-4,), location="w.bin")
    assert "a negative size in [-4]" in refused(add(tensor), folder)
    text = TensorProto(name="w", data_type=TensorProto.STRING, dims=[2**40])
    assert "0 strings for" in refused(add(text), folder)
    assert "data type 99" in refused(
        add(TensorProto(name="w", data_type=99, dims=[1], raw_data=b"0")), folder
    )


# --- every place that holds a tensor ----------------------------------------------------------

BAD = external(location="../secret.bin")
SPARSE = helper.make_sparse_tensor(
    helper.make_tensor("w", FLOAT, [1], [1.0]),
    helper.make_tensor("i", TensorProto.INT64, [1], [0]),
    [4],
)


def _constant(**attribute: Any) -> list[Any]:
    return [helper.make_node("Constant", [], ["c"], **attribute)]


def _bad_sparse() -> Any:
    bad = onnx.SparseTensorProto()
    bad.CopyFrom(SPARSE)
    bad.values.CopyFrom(BAD)
    return bad


def _bad_indices() -> Any:
    bad = onnx.SparseTensorProto()
    bad.CopyFrom(SPARSE)
    bad.indices.CopyFrom(BAD)
    return bad


def _subgraph() -> list[Any]:
    graph = helper.make_graph([], "then", [], [value("w", [4])], [BAD])
    return [helper.make_node("If", ["x"], ["y"], then_branch=graph, else_branch=graph)]


def _function() -> onnx.ModelProto:
    made = model([helper.make_node("Relu", ["x"], ["y"])])
    body = _constant(value=BAD)
    made.functions.append(
        helper.make_function("", "F", [], ["c"], body, [helper.make_opsetid("", 20)])
    )
    return made


def _training() -> onnx.ModelProto:
    made = model([helper.make_node("Relu", ["x"], ["y"])])
    made.training_info.add().algorithm.initializer.append(BAD)
    return made


def _default() -> onnx.ModelProto:
    made = _function()
    del made.functions[0].node[:]
    made.functions[0].attribute_proto.append(helper.make_attribute("a", BAD))
    return made


PLACES: dict[str, Callable[[], onnx.ModelProto]] = {
    "sparse initializer": lambda: model(_constant(value_int=1), sparse_initializer=[_bad_sparse()]),
    "sparse indices": lambda: model(_constant(value_int=1), sparse_initializer=[_bad_indices()]),
    "constant": lambda: model(_constant(value=BAD)),
    "sparse constant": lambda: model(_constant(sparse_value=_bad_sparse())),
    "list of tensors": lambda: model(_constant(tensors=[BAD])),
    "list of sparse": lambda: model(_constant(sparse_tensors=[_bad_sparse()])),
    "subgraph": lambda: model(_subgraph()),
    "list of graphs": lambda: model(_constant(graphs=[helper.make_graph([], "g", [], [], [BAD])])),
    "function": _function,
    "function default": _default,
    "training": _training,
}


@pytest.mark.parametrize("place", list(PLACES))
def test_every_place_of_a_tensor(folder: Path, place: str) -> None:
    assert "its location '../secret.bin' leaves the folder" in refused(PLACES[place](), folder)


# --- operators, size and depth ----------------------------------------------------------------


def test_operators_that_load_code_or_files(folder: Path) -> None:
    custom = model([helper.make_node("Evil", ["x"], ["y"], domain="evil.ops")])
    assert "operator domain 'evil.ops' needs a library" in refused(custom, folder)
    blob = model([helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft")])
    assert "EPContext loads another file" in refused(blob, folder)


def test_names_cannot_write_to_the_terminal(folder: Path) -> None:
    tensor = external(location="../secret.bin")
    tensor.name = "\x1b[2Jw\nerror: " + "a" * 500
    reason = refused(add(tensor), folder)
    assert reason.isprintable()
    assert len(reason) < 300


def test_deep_nesting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_DEPTH == 32  # protobuf itself stops at about the same depth
    monkeypatch.setattr("effopt.backends.onnx_check.MAX_DEPTH", 5)
    graph = helper.make_graph([], "g", [], [])
    for _ in range(6):
        graph = helper.make_graph(
            [helper.make_node("If", ["x"], [], then_branch=graph)], "g", [], []
        )
    assert "nested more than 5 deep" in refused(helper.make_model(graph), folder)


def test_too_many_nodes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effopt.backends.onnx_check.MAX_NODES", 3)
    nodes = [helper.make_node("Relu", ["x"], ["y"])] * 2
    inner = helper.make_graph(nodes, "g", [], [])
    nested = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    assert "more than 3 nodes" in refused(model([nested]), folder)


def _ints(*numbers: int) -> TensorProto:
    return numpy_helper.from_array(np.array(numbers, dtype=np.int64), "s")


BOMBS: dict[str, list[Any]] = {
    "ConstantOfShape": [helper.make_node("ConstantOfShape", ["s"], ["c"])],
    "Expand": [
        helper.make_node("Constant", [], ["one"], value_float=1.0),
        helper.make_node("Expand", ["one", "s"], ["c"]),
    ],
    "shape by arithmetic": [
        helper.make_node("Mul", ["s", "s"], ["t"]),
        helper.make_node("ConstantOfShape", ["t"], ["c"]),
    ],
    "RandomNormal": [helper.make_node("RandomNormal", [], ["c"], shape=[2**34])],
    "shape that cannot be told": [
        helper.make_node("Cast", ["s"], ["f"], to=FLOAT),
        helper.make_node("Sqrt", ["f"], ["h"]),
        helper.make_node("Cast", ["h"], ["t"], to=TensorProto.INT64),
        helper.make_node("ConstantOfShape", ["t"], ["c"]),
    ],
}


@pytest.mark.parametrize("name", list(BOMBS))
def test_constants_out_of_proportion(folder: Path, name: str) -> None:
    nodes = [*BOMBS[name], helper.make_node("ReduceSum", ["c"], ["y"])]
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    reason = refused(model(nodes, [_ints(2**34)]), folder)
    assert "is a constant" in reason
    assert time.monotonic() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_many_small_constants_add_up(folder: Path) -> None:
    nodes = [helper.make_node("ConstantOfShape", ["s"], [f"c{i}"]) for i in range(10)]
    assert "is a constant" in refused(model(nodes, [_ints(2**22)]), folder)


def test_a_value_beyond_all_memory(folder: Path) -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["c"]),
        helper.make_node("Gather", ["x", "zero"], ["one"], axis=0),
        helper.make_node("Reshape", ["one", "col"], ["row"]),
        helper.make_node("MatMul", ["c", "row"], ["y"]),
    ]
    zero = numpy_helper.from_array(np.array(0, dtype=np.int64), "zero")
    col = numpy_helper.from_array(np.array([1, 4], dtype=np.int64), "col")
    made = model(nodes, [_ints(2**23, 1), zero, col])
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    check_file(folder / "model.onnx")
    made.graph.initializer[0].CopyFrom(_ints(2**31, 1))
    assert "bytes" in refused(made, folder)


def test_no_model_at_all(folder: Path) -> None:
    for data in (b"", b"not a model", b"PK\x03\x04" + b"0" * 100):
        (folder / "model.onnx").write_bytes(data)
        with pytest.raises(UnsafeFileError, match=r"no ONNX file|no graph"):
            check_file(folder / "model.onnx")
    (folder / "model.onnx").unlink()
    with pytest.raises(UnsafeFileError, match="cannot be opened"):
        check_file(folder / "model.onnx")
    os.symlink(folder.parent / "secret.bin", folder / "model.onnx")
    with pytest.raises(UnsafeFileError, match="or is a link"):
        check_file(folder / "model.onnx")


def test_flipped_bytes_never_crash_the_check(folder: Path) -> None:
    """Allowed: the file passes, or UnsafeFileError; 400 mutants of a valid file."""
    weights = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    good = add(weights).SerializeToString()
    draw = np.random.default_rng(0)
    refusals = 0
    for _ in range(400):
        data = bytearray(good)
        for place in draw.integers(0, len(data), 3):
            data[place] = draw.integers(0, 256)
        (folder / "model.onnx").write_bytes(data)
        try:
            check_file(folder / "model.onnx")
        except UnsafeFileError:
            refusals += 1
    assert 50 < refusals < 400
