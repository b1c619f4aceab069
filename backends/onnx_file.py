"""From an ONNX graph in memory to a checked file: names, provenance, external weights."""

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from effopt.backends.onnx import MODEL, WEIGHTS
from effopt.backends.onnx_plugins import attach
from effopt.backends.onnx_tidy import drop_zero_adds
from effopt.errors import PreconditionError, VerificationError
from effopt.plugin import DOMAIN
from effopt.signature import Signature, TensorSpec

EXTERNAL_FROM = 100_000_000
"""Bytes of weights from which on they go into a file of their own: it is written without a copy
in memory and mapped by the runtime, while a file with weights inside peaks at three copies."""

_STANDARD = ("", "ai.onnx", DOMAIN)
_EXTENDED = (*_STANDARD, "com.microsoft")


def save(
    model: ir.Model,
    signature: Signature,
    folder: Path,
    provenance: Mapping[str, str],
    *,
    extended: bool = False,
) -> dict[str, str]:
    """Name, tidy, write and check a lowered graph; return the names that had to differ.

    The folder gets `model.onnx`, and `model.onnx.data` where the weights are large. Errors are
    those of `finish` and `check_written`.
    """
    ports = finish(model, signature, provenance, extended=extended)
    external = _weight_bytes(model.graph) >= EXTERNAL_FROM
    path = folder / MODEL
    ir.save(model, path, external_data=WEIGHTS if external else None)
    check_written(path)
    return ports


def finish(
    model: ir.Model, signature: Signature, provenance: Mapping[str, str], *, extended: bool
) -> dict[str, str]:
    """Name and tidy a lowered graph that is to be a file; return the names that had to differ.

    Inputs and outputs carry the names and sizes of the signature. `extended` allows onnxruntime's
    own operators. Nodes of plugins get the functions that stand for them. Raises PreconditionError
    for another operator that is not standard.
    """
    _only_known(model, _EXTENDED if extended else _STANDARD)
    attach(model)
    drop_zero_adds(model.graph)
    _own_output_nodes(model.graph)
    ports = _name_ports(model.graph, signature)
    _forget(model)
    model.producer_name = "effopt"
    model.producer_version = provenance.get("effopt.version", "")
    model.metadata_props.clear()
    model.metadata_props.update(provenance)
    return ports


def check_written(path: Path) -> None:
    """Raise VerificationError for a file that the ONNX checker refuses."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().splitlines()[0]
        reason = f"the ONNX checker refuses the file that was written: {first}"
        raise VerificationError(reason, "report this model: the export is at fault") from error


def _only_known(model: ir.Model, domains: tuple[str, ...]) -> None:
    for node in model.graph.all_nodes():
        if node.domain not in domains or model.functions:
            raise PreconditionError(
                node.name or node.op_type,
                f"{node.domain}::{node.op_type} is no standard ONNX operator",
                "write the operation in common torch operations",
            )


def _own_output_nodes(graph: ir.Graph) -> None:
    """Give every output a node of its own: an input, a weight or a repeated output has none."""
    seen: set[ir.Value] = set()
    for place, value in enumerate(graph.outputs):
        if value.producer() is None or value in seen:
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[place] = node.outputs[0]
        seen.add(graph.outputs[place])


def _name_ports(graph: ir.Graph, signature: Signature) -> dict[str, str]:
    """Rename inputs and outputs to the model's names; an output named like an input cannot be."""
    inputs = [spec.name for spec in signature.inputs]
    wanted = inputs + [_free(spec.name, inputs) for spec in signature.outputs]
    values = [*graph.inputs, *graph.outputs]
    specs: list[TensorSpec] = [*signature.inputs, *signature.outputs]
    ports = {id(value) for value in values}
    for value in _values(graph):
        if id(value) not in ports and value.name in wanted:
            value.name = f"{value.name}.inner"
    # Through names that nobody has, so that two ports can swap their names.
    for place, value in enumerate(values):
        value.name = f"effopt.port.{place}"
    for value, name, spec in zip(values, wanted, specs, strict=True):
        value.name, value.shape = name, ir.Shape(spec.shape)
    pairs = zip(signature.outputs, wanted[len(inputs) :], strict=True)
    return {spec.name: port for spec, port in pairs if spec.name != port}


def _free(name: str, taken: list[str]) -> str:
    while name in taken:
        name += "_out"
    return name


def _values(graph: ir.Graph) -> list[ir.Value]:
    made = [value for node in graph.all_nodes() for value in node.outputs]
    return [*made, *graph.initializers.values()]


def _forget(model: ir.Model) -> None:
    """Drop inferred types and the exporter's notes: the one goes stale, the other names paths."""
    graphs = (model.graph, *model.graph.subgraphs())
    outputs = {value for graph in graphs for value in graph.outputs}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outputs:
                value.type = value.shape = None
    for value in model.graph.initializers.values():
        if not value.is_graph_input():
            value.type = value.shape = None  # the tensor itself says both
    for value in [*model.graph.inputs, *outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _weight_bytes(graph: ir.Graph) -> int:
    graphs = (graph, *graph.subgraphs())
    constants = (value.const_value for one in graphs for value in one.initializers.values())
    return sum(tensor.nbytes for tensor in constants if tensor is not None)
