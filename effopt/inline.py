"""Inline: wrapped regions of a traced graph (`torch.no_grad`, `torch.autocast`) become flat."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from effopt.errors import CaptureError
from effopt.program import where

hop = torch.ops.higher_order


def inline_wrappers(module: GraphModule) -> None:
    """Put the nodes of each wrapped region in the place of its call, those inside it first.

    Raises CaptureError for a wrapper that changes numbers: a flat graph could not say so.
    """
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in WRAPPERS:
            place, effect = WRAPPERS[node.target]
            held = node.args[place]
            inner = module.get_submodule(str(held.target))
            assert isinstance(inner, GraphModule)
            if reason := effect(node, inner):
                first = next(n for n in inner.graph.nodes if n.op == "call_function")
                raise CaptureError(f"{where(first)} is under {reason}", _AUTOCAST_REMEDY)
            inline_wrappers(inner)
            _splice(node, held, inner, node.args[place + 1 :])


def _splice(call: Node, held: Node, inner: GraphModule, args: tuple[Any, ...]) -> None:
    """Copy a region in front of its call; readers of its results read the copies."""
    graph = call.graph
    places = [node for node in inner.graph.nodes if node.op == "placeholder"]
    seen: dict[Node, Any] = dict(zip(places, args, strict=True))
    with graph.inserting_before(call):
        results = graph.graph_copy(inner.graph, seen)
    for node, copied in seen.items():
        if node.op == "get_attr":
            copied.target = f"{held.target}.{node.target}"
    assert isinstance(results, (tuple, list)), "a traced region returns a tuple"
    for user in list(call.users):
        assert user.target is operator.getitem, "only single results are read"
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(call)
    if not held.users:
        graph.erase_node(held)


def _none(call: Node, inner: GraphModule) -> str:
    """Gradients do not change what forward yields."""
    return ""


def _autocast(call: Node, inner: GraphModule) -> str:
    """Autocast acts on the operators of its own device, where it is enabled."""
    device, dtype, enabled = call.args[:3]
    values = [node.meta.get("val") for node in inner.graph.nodes]
    acts = any(isinstance(val, Tensor) and val.device.type == device for val in values)
    return f"torch.autocast to {dtype}, which changes its numbers" if enabled and acts else ""


_AUTOCAST_REMEDY = "leave torch.autocast out of forward, or convert the model to that dtype"

WRAPPERS: dict[Any, tuple[int, Callable[[Node, GraphModule], str]]] = {
    hop.wrap_with_set_grad_enabled: (1, _none),
    hop.wrap_with_autocast: (4, _autocast),
}
"""The place of the region among a wrapper's arguments, and what the wrapper does to numbers."""
