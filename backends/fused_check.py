"""Whether onnxruntime runs every quantized linear on integers: read from what it makes of files.

A layout that it does not know costs no error but time: weights dequantized at each run take 2 to
20 times as long as float32. So the graph that it has optimised is written out and read.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
from onnx import GraphProto, NodeProto

from effopt.backends.session import optimize
from effopt.errors import VerificationError

FUSED = ("MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul")
"""Operators that multiply integer weights at full speed."""

_REMEDY = "report this model; meanwhile leave the layer in float"


def check_fused(paths: Sequence[Path], linears: Mapping[str, str]) -> None:
    """Load files as onnxruntime would run them, and find their quantized linears there.

    `linears` are the names of those in any of the files, which begin those of their weights
    (`<name>.codes`), each with the place to tell. Raises VerificationError that names a linear
    which has stayed in parts.
    """
    check_graphs([_optimized(path) for path in paths], linears)


def _optimized(path: Path) -> GraphProto:
    with tempfile.TemporaryDirectory(prefix="effopt-") as scratch:
        made = Path(scratch) / "optimized.onnx"
        optimize(path, made)
        return onnx.load(str(made), load_external_data=False).graph


def check_graphs(graphs: Sequence[GraphProto], linears: Mapping[str, str]) -> None:
    """Check optimised graphs and the graphs inside of their nodes; see `check_fused`."""
    fused: list[NodeProto] = []
    for node, weights in (found for graph in graphs for found in _nodes(graph, {})):
        if node.op_type in FUSED:
            fused.append(node)
        elif weight := _stuck(node, weights):
            reason = f"onnxruntime left it as {node.op_type}, slower than in float"
            raise VerificationError(f"{_place(node, weight, linears)}: {reason}", _REMEDY)
    if len(fused) < len(linears):
        read = {name.partition(".")[0] for node in fused for name in (*node.input, node.name)}
        lost = [place for name, place in linears.items() if name not in read]
        reason = f"onnxruntime runs {len(fused)} of {len(linears)} quantized linears on integers"
        raise VerificationError(f"{lost[0] if lost else 'model'}: {reason}", _REMEDY)


def _nodes(
    graph: GraphProto, outer: Mapping[str, int]
) -> Iterator[tuple[NodeProto, Mapping[str, int]]]:
    """Iterate over all nodes, each with the rank of every constant that it can read."""
    constants = {**outer, **{tensor.name: len(tensor.dims) for tensor in graph.initializer}}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t"):
                constants[node.output[0]] = len(attribute.t.dims)
    for node in graph.node:
        yield node, constants
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from _nodes(inner, constants)


def _stuck(node: NodeProto, constants: Mapping[str, int]) -> str:
    """Return the weight of a product that stayed integer, or that is dequantized at each run."""
    if node.op_type == "MatMulInteger":
        return str(node.input[1])
    weight = str(node.input[0]) if node.input else ""
    return weight if node.op_type == "DequantizeLinear" and constants.get(weight) == 2 else ""


def _place(node: NodeProto, weight: str, linears: Mapping[str, str]) -> str:
    for name in (weight, node.name):
        if (linear := name.partition(".")[0]) in linears:
            return linears[linear]
    return str(node.name or weight)
