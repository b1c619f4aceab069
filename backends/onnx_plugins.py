"""Nodes of plugins in an ONNX graph, and the functions that stand for them.

With its function a node runs in every runtime: in one that has a plugin of that name (TensorRT from
10.10) the plugin, else the body. Without it the file is for a runtime with the plugin alone.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import onnxscript
import torch
from onnx import FunctionProto
from onnx.helper import make_opsetid
from torch import Tensor

from effopt.errors import UnsafeFileError
from effopt.kernel import kernels
from effopt.plugin import DOMAIN, Plugin, results

VERSION = 1
"""Of the domain, and of every plugin in it."""


@functools.cache
def plugins() -> Mapping[str, Plugin]:
    """Return all plugins by the names of their nodes."""
    found = [made.plugin for made in kernels().values() if made.plugin is not None]
    return {plugin.name: plugin for plugin in found}


def plugin_node(
    plugin: Plugin, inputs: Sequence[Tensor], attributes: Mapping[str, float]
) -> Sequence[Tensor]:
    """Put the node of a plugin into a trace for ONNX, with values of zeros; see `running`."""
    kinds, shapes = zip(*results(plugin, inputs, attributes), strict=True)
    found: Sequence[Tensor] = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{plugin.name}",
        inputs,
        dict(attributes),
        dtypes=kinds,
        shapes=shapes,
        version=1,
    )
    return found


def attach(model: ir.Model) -> None:
    """Give every plugin node of a model its function, at the opset of the model."""
    opset = model.opset_imports[""]
    for name in count(model):
        made = ir.serde.deserialize_function(function(plugins()[name], opset))
        model.functions[made.identifier()] = made


def count(model: ir.Model) -> dict[str, int]:
    """Count the nodes of each plugin, in the graph and all below it."""
    nodes = (node for node in model.graph.all_nodes() if node.domain == DOMAIN)
    return dict(Counter(node.op_type for node in nodes))


def plugin_nodes(paths: Iterable[Path]) -> dict[str, int]:
    """Count the nodes of each plugin in ONNX files; UnsafeFileError for one that is not ours."""
    found = Counter[str]()
    for path in paths:
        found.update(count(ir.load(path)))
    if strange := sorted(set(found) - set(plugins())):
        reason = f"{DOMAIN}::{strange[0][:100]!a} is no kernel of this version"
        raise UnsafeFileError(reason, "convert the model again")
    return dict(sorted(found.items()))


def function(plugin: Plugin, opset: int) -> FunctionProto:
    """Return the function of a plugin: the body is one of opset 20, and means the same above it."""
    script = onnxscript.script(onnxscript.opset20)(plugin.body)
    made: FunctionProto = script.to_function_proto()
    made.domain, made.name = DOMAIN, plugin.name
    del made.opset_import[:]
    made.opset_import.append(make_opsetid("", opset))
    return made
