"""Products with a weight are linear layers: x W + b, as GPT-2 and others write them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from effopt.axis_rules import argument
from effopt.edit import Edit
from effopt.program import is_tensor, shape, value

aten = torch.ops.aten


def _addmm(edit: Edit, node: Node) -> Node | None:
    """b + x W, x [M, K], W [K, N], b [N]."""
    bias, x, weight = node.args
    scaled = argument(node, "beta") != 1 or argument(node, "alpha") != 1
    if scaled or not is_tensor(bias) or len(shape(bias)) != 1 or bias.op != "get_attr":
        return None
    return _linear(edit, x, weight, bias)


def _product(edit: Edit, node: Node) -> Node | None:
    """x W, x [..., K], W [K, N]."""
    x, weight = node.args
    return _linear(edit, x, weight, None)


def _linear(edit: Edit, x: Any, weight: Any, bias: Node | None) -> Node | None:
    """Make the layer on W^T [N, K], which is folded later; None where W is no weight."""
    if not is_tensor(x) or not is_tensor(weight) or weight.op != "get_attr":
        return None
    terms = [x, weight] if bias is None else [x, weight, bias]
    same = all(value(term).dtype == value(x).dtype for term in terms)
    if len(shape(weight)) != 2 or len(shape(x)) < 2 or x.op == "get_attr" or not same:
        return None
    if not value(x).is_floating_point():
        return None
    turned = edit.call(aten.t.default, weight)
    return edit.call(aten.linear.default, x, turned, *([] if bias is None else [bias]))


PRODUCTS: dict[Any, Callable[[Edit, Node], Node | None]] = {
    aten.addmm.default: _addmm,
    aten.mm.default: _product,
    aten.matmul.default: _product,
}
"""The linear layer that a product is, by its operator."""
