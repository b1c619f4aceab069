"""Every rule of the TensorRT check: one file that it refuses, and one like it that passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from effopt.backends.readiness import MAX_TOPK, RULES, check_model, readiness, require
from effopt.errors import PreconditionError
from effopt.target import target

FLOAT, HALF, INT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64


def model(
    node: onnx.NodeProto, kind: int = FLOAT, weights: dict[str, Any] | None = None, opset: int = 23
) -> onnx.ModelProto:
    node.name = "here"
    shape = [2, 4, 4000, 8] if node.op_type == "Attention" else [2, 4000]
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    outputs = [helper.make_tensor_value_info("y", kind, None)]
    made = [
        t if isinstance(t, TensorProto) else numpy_helper.from_array(t, n)
        for n, t in (weights or {}).items()
    ]
    graph = helper.make_graph([node], "g", inputs, outputs, made)
    domains = {"": opset, node.domain: opset if not node.domain else 1}
    imports = [helper.make_opsetid(name, version) for name, version in domains.items()]
    return helper.make_model(graph, opset_imports=imports)


def topk(k: int) -> onnx.ModelProto:
    node = helper.make_node("TopK", ["x", "k"], ["v", "y"])
    return model(node, weights={"k": np.array([k])})


def scatter(reduction: str) -> onnx.ModelProto:
    node = helper.make_node("ScatterElements", ["x", "i", "u"], ["y"], reduction=reduction)
    return model(node, weights={"i": np.zeros((1, 1), int), "u": np.zeros((1, 1), np.float32)})


def quantize(point: int, kind: Any) -> onnx.ModelProto:
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    weights = {"s": np.array(0.1, np.float32), "z": np.array(point, kind)}
    return model(node, weights=weights)


def float8() -> onnx.ModelProto:
    zero = helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0])
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    return model(node, weights={"s": np.array(0.1, np.float32), "z": zero})


def plain(name: str, kind: int = FLOAT, **more: Any) -> onnx.ModelProto:
    return model(helper.make_node(name, ["x"], ["y"], **more), kind)


def attention(kind: int) -> onnx.ModelProto:
    return model(helper.make_node("Attention", ["x", "x", "x"], ["y"]), kind)


def open_k() -> onnx.ModelProto:
    made = model(helper.make_node("TopK", ["x", "k"], ["v", "y"]))
    made.graph.input.append(helper.make_tensor_value_info("k", INT, [1]))
    return made


Make = Callable[[], onnx.ModelProto]
CASES: dict[str, tuple[Make, str, str, Make]] = {
    "domain": (
        lambda: plain("Gelu", domain="com.microsoft"),
        "a100",
        "the operator's domain is not standard, so it needs a plugin",
        lambda: plain("Gelu"),
    ),
    "nonzero": (
        lambda: plain("NonZero"), "a100", "the length of its result depends on the data",
        lambda: plain("Abs"),
    ),
    "unique": (
        lambda: plain("Unique"), "t4", "the length of its result depends on the data",
        lambda: plain("Neg"),
    ),
    "integer": (
        lambda: model(helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "b", "c"])),
        "a100", "the parser does not know the operator", lambda: quantize(0, np.int8),
    ),
    "scatter": (
        lambda: scatter("add"), "h100", "a scatter that adds up is not supported",
        lambda: scatter("none"),
    ),
    "open k": (open_k, "a100", "its K is not a constant", lambda: topk(5)),
    "large k": (
        lambda: topk(MAX_TOPK + 1), "a100", "its K is above 3840, the most that the builder takes",
        lambda: topk(MAX_TOPK),
    ),
    "zero point": (
        lambda: quantize(3, np.int8), "a100", "its zero point is not 0",
        lambda: quantize(0, np.int8),
    ),
    "unsigned": (
        lambda: quantize(0, np.uint8), "a100", "it quantizes to an unsigned type",
        lambda: quantize(0, np.int8),
    ),
    "attention": (
        lambda: attention(FLOAT), "h200", "there is no float32 kernel for the Attention operator",
        lambda: attention(HALF),
    ),
    "bfloat": (
        lambda: attention(TensorProto.BFLOAT16), "t4", "bfloat16 needs sm_80",
        lambda: attention(HALF),
    ),
    "double": (
        lambda: plain("Abs", TensorProto.DOUBLE), "a100", "double precision is not supported",
        lambda: plain("Abs"),
    ),
    "float8": (float8, "a100", "8-bit floats need sm_89", lambda: quantize(0, np.int8)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name: str) -> None:
    bad, device, reason, good = CASES[name]
    found = check_model(bad(), target(device))
    assert [item.reason for item in found] == [reason]
    assert found[0].node.startswith("here (")
    assert found[0].remedy
    assert check_model(good(), target(device)) == []


def test_every_rule_has_its_case() -> None:
    assert {reason for _, _, reason, _ in CASES.values()} == {rule.reason for rule in RULES}


def test_what_a_newer_device_takes() -> None:
    assert check_model(float8(), target("l4")) == []
    assert check_model(attention(TensorProto.BFLOAT16), target("a100")) == []


def test_subgraphs_are_checked() -> None:
    inner = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["y"], name="deep")], "then", [], []
    )
    inner.output.add(name="y")
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    assert [item.node for item in check_model(model(node), target("a100"))] == [
        "deep (NonZero)"
    ] * 2


def test_require_names_the_first_and_counts_the_rest(tmp_path: Path) -> None:
    made = plain("NonZero")
    made.graph.node.add().CopyFrom(helper.make_node("Unique", ["x"], ["z"]))
    onnx.save(made, str(tmp_path / "m.onnx"))
    assert len(readiness(tmp_path / "m.onnx", target("a100"))) == 2
    with pytest.raises(PreconditionError) as caught:
        require(tmp_path / "m.onnx", target("a100"))
    assert str(caught.value) == (
        "here (NonZero): TensorRT cannot take it on sm_80: the length of its result depends on the "
        "data (and 1 more)\n"
        "  remedy: choose a fixed number of tokens (TopK and Gather) instead of those that pass a "
        "test"
    )
