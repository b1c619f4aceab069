"""Constants: what can be told of a value without an input."""

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

aten = torch.ops.aten
LOW = -1e4
"""A mask value at or below this (as in half precision's -65504) is meant as minus infinity."""


def constant_value(node: Node) -> torch.Tensor | None:
    """Compute a value that depends on weights alone; None if a size of an input is in it."""
    if node.op == "get_attr":
        module: object = node.graph.owning_module
        for name in str(node.target).split("."):
            module = getattr(module, name)
        return module.detach() if isinstance(module, torch.Tensor) else None
    if node.op != "call_function" or not callable(node.target):
        return None
    known = {source: constant_value(source) for source in node.all_input_nodes}
    if any(found is None for found in known.values()):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda source: known[source])
    with torch.no_grad():
        found = node.target(*args, **kwargs)
    return found if isinstance(found, torch.Tensor) else None


def number_in(arg: Any) -> float | None:
    """Return the one number that all elements of an argument are, or None."""
    if isinstance(arg, (int, float)):
        return float(arg)
    if not isinstance(arg, Node):
        return None
    if arg.target in FILLED:
        return FILLED[arg.target]
    if arg.target in FILLED_BY:
        number = arg.args[FILLED_BY[arg.target]]
        return float(number) if isinstance(number, (int, float)) else None
    held = constant_value(arg) if arg.op == "get_attr" else None
    if held is None or not held.numel() or held.is_complex():
        return None
    first = held.flatten()[0]
    return float(first) if bool((held == first).all()) else None


FILLED: dict[Any, float] = {
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), 1.0),
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), 0.0),
}
"""Operators that make a tensor of one number, and which."""

FILLED_BY = {
    **dict.fromkeys((aten.full.default, aten.full_like.default), 1),
    aten.scalar_tensor.default: 0,
}
"""Operators that make a tensor of one number, and which argument says it."""


def is_low(arg: Any) -> bool:
    """Tell whether an argument is one number that a mask means as minus infinity."""
    number = number_in(arg)
    return number is not None and number <= LOW
