"""From an ONNX graph in memory to a checked file: names, provenance, external weights."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from effopt.backends.onnx import MODEL, WEIGHTS
from effopt.errors import PreconditionError, VerificationError
from effopt.signature import Signature, TensorSpec

EXTERNAL_FROM = 100_000_000
"""Bytes of weights from which on they go into a file of their own: it is written without a copy
in memory and mapped by the runtime, while a file with weights inside peaks at three copies."""

_STANDARD = ("", "ai.onnx")
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

    The folder gets `model.onnx`, and `model.onnx.data` where the weights are large. Inputs and
    outputs carry the names and sizes of the signature. `extended` allows onnxruntime's own
    operators. Raises PreconditionError for another operator that is not standard,
    VerificationError for a file that the ONNX checker refuses.
    """
    _only_known(model, _EXTENDED if extended else _STANDARD)
    _drop_zero_adds(model.graph)
    _own_output_nodes(model.graph)
    ports = _name_ports(model.graph, signature)
    _forget(model)
    model.producer_name = "effopt"
    model.producer_version = provenance.get("effopt.version", "")
    model.metadata_props.clear()
    model.metadata_props.update(provenance)
    external = _weight_bytes(model.graph) >= EXTERNAL_FROM
    path = folder / MODEL
    ir.save(model, path, external_data=WEIGHTS if external else None)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().splitlines()[0]
        reason = f"the ONNX checker refuses the file that was written: {first}"
        raise VerificationError(reason, "report this model: the export is at fault") from error
    return ports


def _only_known(model: ir.Model, domains: tuple[str, ...]) -> None:
    for node in model.graph.all_nodes():
        if node.domain not in domains or model.functions:
            raise PreconditionError(
                node.name or node.op_type,
                f"{node.domain}::{node.op_type} is no standard ONNX operator",
                "write the operation in common torch operations",
            )


def _drop_zero_adds(graph: ir.Graph) -> None:
    """Remove x + 0 with a constant tensor of zeros: the mask of a model that masks nothing."""
    for node in list(graph):
        if node.op_type != "Add":
            continue
        for kept, zeros in (node.inputs, reversed(node.inputs)):
            if kept is None or zeros is None or not _adds_nothing(kept, zeros, node.outputs[0]):
                continue
            ir.convenience.replace_all_uses_with(node.outputs[0], kept, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            break
    unused = [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]
    for name in unused:
        del graph.initializers[name]


def _adds_nothing(kept: ir.Value, zeros: ir.Value, total: ir.Value) -> bool:
    constant = zeros.const_value if zeros.is_initializer() else None
    if constant is None or constant.size > 1 << 20 or kept.shape is None:
        return False
    return kept.shape == total.shape and not np.any(constant.numpy())


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
    outputs = set(model.graph.outputs)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            if value not in outputs:
                value.type = value.shape = None
    for value in model.graph.initializers.values():
        value.type = value.shape = None  # the tensor itself says both
    for value in [*model.graph.inputs, *outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _weight_bytes(graph: ir.Graph) -> int:
    constants = (value.const_value for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in constants if tensor is not None)
