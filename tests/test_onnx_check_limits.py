"""Hostile ONNX files: code, depth, size, and bytes that are no model are refused at once."""

import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from effopt.backends import onnx_check
from effopt.backends.onnx_check import MAX_DEPTH, check_file
from effopt.errors import UnsafeFileError
from tests.hostile_onnx import FLOAT, add, external, laid_out, model, refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return laid_out(tmp_path)


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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reason = refused(model(nodes, [_ints(2**34)]), folder)
    assert "is a constant" in reason
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


# --- weights beside the file that several tensors share ---------------------------------------


def test_equal_tensors_may_lie_on_the_same_bytes(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(_shared(folder, [0, 0, 16]).SerializeToString())
    check_file(folder / "model.onnx")


def test_tensors_that_overlap_are_refused(folder: Path) -> None:
    assert "tensors overlap at byte 8" in refused(_shared(folder, [0, 8]), folder)


def test_many_tensors_on_few_bytes_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime may copy a weight for each tensor that names it, so a small file takes much."""
    monkeypatch.setattr(onnx_check, "MAX_REPEATED", 32)
    reason = refused(_shared(folder, [0] * 4), folder)
    assert "its tensors share 48 bytes, and have 16 of their own" in reason
    (folder / "model.onnx").write_bytes(_shared(folder, [0] * 3).SerializeToString())
    check_file(folder / "model.onnx")


def _shared(folder: Path, offsets: list[int]) -> onnx.ModelProto:
    """Return a model that adds four numbers from each offset of one file."""
    (folder / "weights.bin").write_bytes(bytes(64))
    nodes, weights = [], []
    for place, offset in enumerate(offsets):
        tensor = external(location="weights.bin", offset=offset, length=16)
        tensor.name = f"w{place}"
        weights.append(tensor)
        ends = [f"y{place - 1}" if place else "x", tensor.name], [f"y{place}"]
        nodes.append(helper.make_node("Add", *ends))
    nodes.append(helper.make_node("Identity", [f"y{len(offsets) - 1}"], ["y"]))
    return model(nodes, weights)
