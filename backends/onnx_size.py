"""Memory that an ONNX file would take on opening: constants that a small file blows up."""

import math

import onnx
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto
from onnx.inliner import inline_local_functions

from effopt.errors import UnsafeFileError

MAX_FOLDED = 64 << 20
"""Bytes of one constant that a runtime would compute while it opens the file."""
MAX_VALUE = 16 << 30
"""Bytes of one value whose sizes are all fixed: no engine's activation is that large."""

_GROWING = ("ConstantOfShape", "Expand", "Tile", "Range", "OneHot", "Pad", "Resize", "Upsample")
_WIDENED = 8
"""How many times its own bytes a stored 4-bit tensor takes as float32."""
_SHAPED = ("RandomNormal", "RandomUniform")
_LARGE = 1 << 16
_REMEDY = "do not run this file; it takes far more memory than its size says"


def check_sizes(model: ModelProto, name: str, weights: int) -> None:
    """Refuse constants out of proportion; the model's large weights are dropped on the way.

    `weights` is the bytes of all stored tensors: all folded constants together may take twice
    that, or MAX_FOLDED if it is more. Raises UnsafeFileError that names the node.
    """
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > _LARGE:  # shapes are all that inference needs of it
            tensor.ClearField("raw_data")
    try:
        whole = inline_local_functions(model) if model.functions else model
        inferred = onnx.shape_inference.infer_shapes(whole, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise UnsafeFileError(f"{name}: its shapes contradict each other", _REMEDY) from error
    _check_graph(inferred.graph, name, max(MAX_FOLDED, 2 * weights), set())


def _check_graph(graph: GraphProto, name: str, budget: int, outer: set[str]) -> None:
    """Follow the constants of one graph, and of the graphs inside of its nodes."""
    sizes = {value.name: _bytes(value) for value in (*graph.value_info, *graph.output)}
    constant = outer | {tensor.name for tensor in graph.initializer}
    constant -= {value.name for value in graph.input}
    stored = {tensor.name for tensor in graph.initializer} & constant
    folded = 0
    for node in graph.node:
        place = f"{name}: node {(node.name or node.op_type)[:100]!a}"
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _check_graph(attribute.g, name, budget, constant)
        biggest = max((sizes.get(out) or 0 for out in node.output), default=0)
        if not all(source in constant or not source for source in node.input):
            if biggest > MAX_VALUE:
                raise UnsafeFileError(f"{place} makes a value of {biggest} bytes", _REMEDY)
            continue
        constant.update(node.output)
        unknown = any(sizes.get(out) is None for out in node.output)
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            # Weights in floats are in proportion to the file, and runtimes do not keep them.
            biggest //= _WIDENED
        folded += biggest if len(node.output) == 1 else sum(sizes.get(o) or 0 for o in node.output)
        if biggest > MAX_FOLDED or folded > budget:
            reason = f"{place} ({node.op_type}) is a constant of {max(biggest, folded)} bytes"
            raise UnsafeFileError(reason, _REMEDY)
        if unknown and node.op_type in (*_GROWING, *_SHAPED):
            reason = f"{place} ({node.op_type}) is a constant whose size cannot be told"
            raise UnsafeFileError(reason, _REMEDY)


def _bytes(value: ValueInfoProto) -> int | None:
    """Return the bytes of a value, None where a size is open."""
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
        return None
    width = 1
    if kind.elem_type not in (TensorProto.UNDEFINED, TensorProto.STRING):
        width = max(1, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize)
    return int(math.prod(d.dim_value for d in kind.shape.dim)) * width
