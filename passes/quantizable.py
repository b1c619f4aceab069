"""Which linear layers can be quantized: their node, weight and bias, and why others stay float."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from effopt.attention import SDPA
from effopt.axis_rules import argument
from effopt.axis_table import family
from effopt.exits import find_exits
from effopt.program import Program, is_tensor, module_path, shape, value

aten = torch.ops.aten
LINEAR = aten.linear.default


@dataclass(frozen=True)
class Layer:
    """A linear layer y = x W^T + b: W [N, K] is `weight`, b [N] `bias` or None.

    `path` is the module that it comes from, with the node's name where a module has several.
    """

    node: Node
    source: Node
    weight: Node
    bias: Node | None
    path: str

    @staticmethod
    def of(node: Node, path: str) -> "Layer":
        """Read a linear node."""
        source, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
        return Layer(node, source, weight, bias, path)

    def now(self) -> "Layer":
        """Read the node again, after the graph was changed."""
        return Layer.of(self.node, self.path)

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
    outputs no other layer or attention call reads, unless they are added to what they come from:
    that is the end of a block. What serves exits alone is a head too.
    """
    inner, exits = (set(), set()) if heads else (_inner(program), _of_exits(program))
    found, left = list[Layer](), dict[str, str]()
    nodes = [node for node in program.nodes() if node.target is LINEAR]
    modules = Counter(map(module_path, nodes))
    for node in nodes:
        path = module_path(node)
        named = f"{path} ({node.name})" if path else node.name
        layer = Layer.of(node, path if path and modules[path] == 1 else named)
        if reason := _why_not(layer, least, heads, inner) or (HEAD if node in exits else ""):
            left[layer.path] = reason
        else:
            found.append(layer)
    return found, left | _other_products(program, least)


def _other_products(program: Program, least: int) -> dict[str, str]:
    """Return what multiplies by a weight and is no linear layer, such as a convolution."""
    found = {}
    for node in program.nodes():
        if node.op != "call_function" or family(node) not in PRODUCTS:
            continue
        weights = [arg for arg in node.all_input_nodes if arg.op == "get_attr" and is_tensor(arg)]
        large = [arg for arg in weights if value(arg).numel() >= least * least]
        if large and node.target is not LINEAR:
            named = f"{module_path(node)} ({node.name})".strip()
            found[named] = f"{node.target} is no linear layer"
    return found


HEAD = "it is the head of an exit"

PRODUCTS = ("linear", "matmul", "einsum", "convolution", "transposed", "")
"""Families of products with weights; "" are operators that no table knows, such as of experts."""


def _why_not(layer: Layer, least: int, heads: bool, inner: set[Node]) -> str:
    """Say why a linear layer stays in float, or ""."""
    if layer.weight.op != "get_attr" or (layer.bias is not None and layer.bias.op != "get_attr"):
        return "its weight or bias is computed"
    if len(shape(layer.weight)) != 2 or not value(layer.weight).is_floating_point():
        return "its weight is no float matrix"
    if min(layer.columns, layer.outputs) < least:
        return f"it has fewer than {least} inputs or outputs"
    if heads or layer.node in inner or _ends_block(layer.node):
        return ""
    return "it is a head: no other layer reads its output"


def _ends_block(node: Node) -> bool:
    """Tell whether the output of a layer is added to a value that the layer comes from."""
    ahead = _reached(node, lambda at: list(at.all_input_nodes))
    behind = _reached(node, lambda at: list(at.users)) | {node}
    sums = (found for found in behind if found.target is aten.add.Tensor)
    return any(ahead.intersection(_terms(found)) for found in sums)


def _terms(node: Node) -> Iterator[Node]:
    """Return what a sum adds up, taken apart where a term is a sum: x + attention(y) + mlp(y)."""
    for arg in node.all_input_nodes:
        yield arg
        if arg.target is aten.add.Tensor:
            yield from arg.all_input_nodes


def _reached(node: Node, step: Callable[[Node], list[Node]]) -> set[Node]:
    """Return the tensors that steps from a node lead to; parameters are none."""
    found, todo = set[Node](), step(node)
    while todo:
        at = todo.pop()
        if at not in found and at.op in ("call_function", "placeholder") and is_tensor(at):
            found.add(at)
            todo += step(at)
    return found


def _inner(program: Program) -> set[Node]:
    """Return the nodes that a later linear layer or attention call reads."""
    found: set[Node] = set()
    for node in reversed(list(program.nodes())):
        if node.target in (LINEAR, SDPA) or node in found:
            found.update(_read(node))
    return found


def _of_exits(program: Program) -> set[Node]:
    """Return the linear layers that only exits need; not those that the model has as well."""
    exits = program.get(find_exits)
    if exits is None:
        return set()
    chosen = {exits.index, *exits.index.users}
    whole = {*program.output().all_input_nodes, *exits.ends.values()} - chosen
    for node in reversed(list(program.nodes())):
        whole.update(node.all_input_nodes if node in whole else ())
    linear = (node for node in program.nodes() if node.target is LINEAR and node not in whole)
    return {node for node in linear if not whole.intersection(argument(node, "weight").users)}


def _read(node: Node) -> Iterator[Node]:
    return (arg for arg in node.all_input_nodes if is_tensor(arg) or arg.op == "call_function")
