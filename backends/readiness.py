"""Whether TensorRT will take an ONNX file, told from the file alone: no TensorRT, no GPU.

The rules are what its parser and builder refused when asked (TensorRT-RTX 1.7, the same parser
code base), one row each. A finding is a fact about the file, not about a build on the device.
Files without a finding that were tried there (ViT-S, four layers of BERT, a small ViT and BERT
with tokens merged) built for sm_80 and sm_89. For sm_75 that builder took no float32 product at
all, the plain export's neither; that is held to be a limit of it and is no rule here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.inliner import inline_local_functions
from onnx.numpy_helper import to_array

from effopt.backends.onnx_check import FLOAT8
from effopt.errors import PreconditionError
from effopt.target import Target

MAX_TOPK = 3840
"""The largest K that the builder takes."""

_INLINE = 1 << 16


@dataclass(frozen=True)
class Finding:
    """One reason why a node cannot go to the device, and what to do instead."""

    node: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class _View:
    """A graph as the rules see it: element types and constants by value name, and the device."""

    types: dict[str, int]
    constants: dict[str, TensorProto]
    arch: int

    def kinds(self, node: NodeProto) -> set[int]:
        """Return the element types of all inputs and outputs of a node."""
        return {self.types.get(name, 0) for name in (*node.input, *node.output)}


@dataclass(frozen=True)
class _Rule:
    """One row: where `refuses` says yes, `reason` and `remedy` are the finding."""

    refuses: Callable[[NodeProto, _View], bool]
    reason: str
    remedy: str


def readiness(path: Path, target: Target) -> list[Finding]:
    """Check the file of a GPU target; an empty list says that nothing known stands against it."""
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > _INLINE:  # only small constants matter to the rules
            tensor.ClearField("raw_data")
    return check_model(model, target)


def require(path: Path, target: Target) -> None:
    """Raise PreconditionError for the first finding; it counts the others."""
    found = readiness(path, target)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        reason = f"TensorRT cannot take it on {target.arch}: {found[0].reason}{more}"
        raise PreconditionError(found[0].node, reason, found[0].remedy)


def check_model(model: ModelProto, target: Target) -> list[Finding]:
    """Check a model in memory, without its large weights, against every rule.

    A node with a function is held to its body, which is what stands for it without its plugin.
    """
    inferred = onnx.shape_inference.infer_shapes(inline_local_functions(model))
    arch = int(target.arch.removeprefix("sm_"))
    return list(_check_graph(inferred.graph, _View({}, {}, arch)))


def _check_graph(graph: GraphProto, outer: _View) -> Iterator[Finding]:
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {**outer.types, **{v.name: v.type.tensor_type.elem_type for v in values}}
    constants = {**outer.constants, **{t.name: t for t in graph.initializer}}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t"):
                constants[node.output[0]] = attribute.t
    types |= {name: tensor.data_type for name, tensor in constants.items()}
    view = _View(types, constants, outer.arch)
    for node in graph.node:
        for rule in (rule for rule in RULES if rule.refuses(node, view)):
            yield Finding(
                f"{node.name or node.output[0]} ({node.op_type})", rule.reason, rule.remedy
            )
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _check_graph(attribute.g, view)


# --- the rules --------------------------------------------------------------------------------


def _is(*names: str) -> Callable[[NodeProto, _View], bool]:
    return lambda node, view: node.domain in ("", "ai.onnx") and node.op_type in names


def _reduces(node: NodeProto, view: _View) -> bool:
    words = {a.name: a.s for a in node.attribute}
    scatters = node.op_type in ("ScatterElements", "ScatterND")
    return scatters and words.get("reduction", b"none") != b"none"


def _open_k(node: NodeProto, view: _View) -> bool:
    return node.op_type == "TopK" and node.input[1] not in view.constants


def _large_k(node: NodeProto, view: _View) -> bool:
    if node.op_type != "TopK" or node.input[1] not in view.constants:
        return False
    return bool(to_array(view.constants[node.input[1]]).max() > MAX_TOPK)


def _off_zero(node: NodeProto, view: _View) -> bool:
    """Tell whether the zero point is not the constant 0; one that was computed cannot be seen."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
        return False
    point = view.constants.get(node.input[2])
    if point is None:
        return bool(node.input[2])
    size = max(point.ByteSize(), 1)
    return size > 1 and bool(to_array(point).astype("float32").any())


def _unsigned(node: NodeProto, view: _View) -> bool:
    quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear")
    return quantizes and bool(view.kinds(node) & {TensorProto.UINT8, TensorProto.UINT4})


def _full_attention(node: NodeProto, view: _View) -> bool:
    return node.op_type == "Attention" and TensorProto.FLOAT in view.kinds(node)


def _bfloat_attention(node: NodeProto, view: _View) -> bool:
    kinds = view.kinds(node)
    return node.op_type == "Attention" and TensorProto.BFLOAT16 in kinds and view.arch < 80


def _has(*kinds: int) -> Callable[[NodeProto, _View], bool]:
    return lambda node, view: bool(view.kinds(node) & set(kinds))


def _early_float8(node: NodeProto, view: _View) -> bool:
    return view.arch < 89 and bool(view.kinds(node) & FLOAT8)


_INTEGER = (
    "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QLinearMatMul", "QLinearConv",
)  # fmt: skip
_DYNAMIC = "choose a fixed number of tokens (TopK and Gather) instead of those that pass a test"
_OPEN_LENGTH = "the length of its result depends on the data"
RULES = (
    _Rule(
        lambda node, view: node.domain not in ("", "ai.onnx"),
        "the operator's domain is not standard, so it needs a plugin",
        "export with standard operators only",
    ),
    _Rule(_is("NonZero", "Compress", "Unique"), _OPEN_LENGTH, _DYNAMIC),
    _Rule(
        _is(*_INTEGER),
        "the parser does not know the operator",
        "quantize with QuantizeLinear and DequantizeLinear around float operators",
    ),
    _Rule(
        _reduces,
        "a scatter that adds up is not supported",
        "write the sum as a product with a one-hot matrix",
    ),
    _Rule(
        _open_k,
        "its K is not a constant",
        "leave length out of dynamic, or give a recipe that moves no tokens",
    ),
    _Rule(
        _large_k,
        f"its K is above {MAX_TOPK}, the most that the builder takes",
        f"keep at most {MAX_TOPK} tokens at a time",
    ),
    _Rule(_off_zero, "its zero point is not 0", "use a symmetric scheme, such as int8 or int4-awq"),
    _Rule(_unsigned, "it quantizes to an unsigned type", "use a symmetric signed scheme"),
    _Rule(
        _full_attention,
        "there is no float32 kernel for the Attention operator",
        "export at opset 20, or convert the model to float16",
    ),
    _Rule(_bfloat_attention, "bfloat16 needs sm_80", "convert the model to float16"),
    _Rule(_has(TensorProto.DOUBLE), "double precision is not supported", "use model.float()"),
    _Rule(_early_float8, "8-bit floats need sm_89", "use an int8 scheme on this target"),
)  # fmt: skip
