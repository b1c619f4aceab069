"""Hostile ONNX files: no tensor, wherever it stands, has its bytes elsewhere or too few."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from effopt.backends.onnx_check import check_file
from tests.hostile_onnx import FLOAT, add, external, laid_out, model, refused, value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return laid_out(tmp_path)


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
    made.functions.append(function("F", _constant(value=BAD)))
    return made


def function(name: str, body: list[Any], domain: str = "effopt") -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("effopt", 1)]
    return helper.make_function(domain, name, ["a"], ["c"], body, imports)


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


def _calls(name: str, count: int = 1) -> list[Any]:
    node = helper.make_node(name, ["x"], ["y"], domain="effopt")
    return [node] * count


def _with(functions: list[onnx.FunctionProto], nodes: list[Any]) -> onnx.ModelProto:
    made = model(nodes)
    made.functions.extend(functions)
    made.opset_import.append(helper.make_opsetid("effopt", 1))
    return made


def test_a_node_may_call_a_function_of_the_file_and_a_function_none(folder: Path) -> None:
    """Each level of functions that call two others would double what a runtime unrolls."""
    made = _with([function("F", [helper.make_node("Relu", ["a"], ["c"])])], _calls("F"))
    path = folder / "model.onnx"
    path.write_bytes(made.SerializeToString())
    check_file(path)
    made.functions.append(function("G", _calls("F", 2)))
    assert "operator domain 'effopt' needs a library of its own" in refused(made, folder)


def test_a_function_does_not_stand_for_a_standard_operator(folder: Path) -> None:
    made = model([helper.make_node("Relu", ["x"], ["y"])])
    made.functions.append(function("Relu", [helper.make_node("Neg", ["a"], ["c"])], domain=""))
    assert "function 'Relu': it stands in the operator domain ''" in refused(made, folder)


def test_nodes_inside_of_a_function_count_for_each_call(folder: Path) -> None:
    """An If of 500 nodes called 1,000 times was accepted, after 12 seconds."""
    inner = helper.make_graph(
        [helper.make_node("Relu", ["a"], ["r"])] * 500, "then", [], [value("r")]
    )
    body = [helper.make_node("If", ["a"], ["c"], then_branch=inner, else_branch=inner)]
    found = refused(_with([function("F", body)], _calls("F", 1000)), folder)
    assert "more than 200000 nodes" in found


def test_constants_inside_of_a_function_count_for_each_call(folder: Path) -> None:
    big = numpy_helper.from_array(np.zeros(1 << 20, np.float32), "c")
    body = [helper.make_node("Constant", [], ["c"], value=big)]
    found = refused(_with([function("F", body)], _calls("F", 20)), folder)
    assert "its functions repeat" in found


@pytest.mark.parametrize("overload", ["", "two"])
def test_a_function_is_there_once(overload: str, folder: Path) -> None:
    relu = [helper.make_node("Relu", ["a"], ["c"])]
    again = function("F", relu)
    again.overload = overload
    found = refused(_with([function("F", relu), again], _calls("F")), folder)
    assert "function 'F': it is there more than once" in found


def test_a_function_makes_no_constant_out_of_proportion(folder: Path) -> None:
    shape = helper.make_tensor("s", onnx.TensorProto.INT64, [1], [1 << 40])
    body = [
        helper.make_node("Constant", [], ["s"], value=shape),
        helper.make_node("ConstantOfShape", ["s"], ["c"]),
    ]
    assert "(ConstantOfShape) is a constant of" in refused(
        _with([function("F", body)], _calls("F")), folder
    )


def test_calls_count_as_the_nodes_that_they_become(folder: Path) -> None:
    made = model(_calls("F", 2000))
    made.functions.append(function("F", [helper.make_node("Relu", ["a"], ["c"])] * 200))
    assert "more than 200000 nodes" in refused(made, folder)


@pytest.mark.parametrize("place", list(PLACES))
def test_every_place_of_a_tensor(folder: Path, place: str) -> None:
    assert "its location '../secret.bin' leaves the folder" in refused(PLACES[place](), folder)
