"""Which linear layers can be quantized: their node, weight and bias, and why others stay float."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from effopt.attention import SDPA
from effopt.axis_rules import argument
from effopt.program import Program, is_tensor, module_path, shape, value

aten = torch.ops.aten
LINEAR = aten.linear.default


@dataclass(frozen=True)
class Layer:
    """A linear layer y = x W^T + b: W [N, K] is `weight`, b [N] `bias` or None."""

    node: Node
    source: Node
    weight: Node
    bias: Node | None

    @staticmethod
    def of(node: Node) -> "Layer":
        """Read a linear node as it is now."""
        return Layer(node, *(argument(node, name) for name in ("input", "weight", "bias")))

    @property
    def path(self) -> str:
        """The module that the layer comes from, or else the node's name."""
        return module_path(self.node) or self.node.name

    @property
    def columns(self) -> int:
        """Inputs of the layer: K."""
        return int(shape(self.weight)[1])

    @property
    def outputs(self) -> int:
        """Outputs of the layer: N."""
        return int(shape(self.weight)[0])


def layers_of(program: Program, least: int, heads: bool) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers to quantize in execution order, and by path why others stay in float.

    `least` is the smallest number of inputs and outputs; `heads` takes the last layers too, whose
    outputs no other layer or attention call reads.
    """
    inner = set() if heads else _inner(program)
    found, left = list[Layer](), dict[str, str]()
    for node in program.nodes():
        if node.target is not LINEAR:
            continue
        reason = _why_not(node, least, heads, inner)
        if reason:
            left[module_path(node) or node.name] = reason
        else:
            found.append(Layer.of(node))
    return found, left


def _why_not(node: Node, least: int, heads: bool, inner: set[Node]) -> str:
    """Say why a linear layer stays in float, or ""."""
    layer = Layer.of(node)
    if layer.weight.op != "get_attr" or (layer.bias is not None and layer.bias.op != "get_attr"):
        return "its weight is computed"
    if len(shape(layer.weight)) != 2 or not value(layer.weight).is_floating_point():
        return "its weight is no float matrix"
    if min(layer.columns, layer.outputs) < least:
        return f"it has fewer than {least} inputs or outputs"
    return "" if heads or node in inner else "it is a head: no other layer reads its output"


def _inner(program: Program) -> set[Node]:
    """Return the nodes that a later linear layer or attention call reads."""
    found: set[Node] = set()
    for node in reversed(list(program.nodes())):
        if node.target in (LINEAR, SDPA) or node in found:
            found.update(_read(node))
    return found


def _read(node: Node) -> Iterator[Node]:
    return (arg for arg in node.all_input_nodes if is_tensor(arg) or arg.op == "call_function")
