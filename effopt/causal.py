"""Causal axes: token axes on which every token sees only those before it."""

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from effopt.attention import is_causal, mask_of, qkv_of
from effopt.axis_table import family
from effopt.constants import LOW
from effopt.masks import ACTIVATIONS, parts_of
from effopt.program import Program, is_tensor
from effopt.sites import TokenAxis
from effopt.tokens import Kind

_UNKNOWN = object()


def looks_back(program: Program, axis: TokenAxis) -> bool:
    """Tell whether attention over the axis hides what comes later, in every call.

    Masks that the model computes are read on the program's sample inputs: this says what to
    prefer, not what is sound.
    """
    known: dict[Node, object] = {}
    own = own_calls(axis)
    return bool(own) and all(hides_later(program, call, known) for call in own)


def own_calls(axis: TokenAxis) -> list[Node]:
    """Return the attention calls in which tokens of the axis ask tokens of the axis."""
    calls = (node for node, found in axis.effects.items() if found.kind is Kind.ATTEND)
    return [call for call in calls if all(_on_tokens(axis, arg) for arg in qkv_of(call)[:2])]


def _on_tokens(axis: TokenAxis, arg: Node) -> bool:
    return arg.meta["val"].ndim - 2 in axis.tokens.on(arg)


def hides_later(program: Program, call: Node, known: dict[Node, object] | None = None) -> bool:
    """Tell whether a call hides from each token those behind it, as far as the samples show.

    `known` holds values computed on the samples for other calls, and takes those of this one.
    """
    if is_causal(call):
        return True
    known, parts = {} if known is None else known, parts_of(mask_of(call))
    values = (_value(program, part, known) for part in (*parts.seen, *parts.added))
    return any(isinstance(found, Tensor) and _is_triangle(found) for found in values)


def _is_triangle(mask: Tensor) -> bool:
    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return False
    seen = mask if mask.dtype == torch.bool else mask > LOW
    later = torch.ones(seen.shape[-2:], dtype=torch.bool).triu(1)
    return not bool((seen & later).any()) and bool(seen.any())


def _value(program: Program, node: Node, known: dict[Node, object]) -> object:
    """Compute a value on the samples; unknown where learned features are in it."""
    if node in known:
        return known[node]
    known[node] = _UNKNOWN
    if node.op == "placeholder":
        known[node] = program.samples[program.inputs().index(node)]
    elif node.op == "get_attr" and is_tensor(node):
        known[node] = program.weight(node)
    elif node.op == "call_function" and family(node) not in ACTIVATIONS and callable(node.target):
        sources = {arg: _value(program, arg, known) for arg in node.all_input_nodes}
        if not any(found is _UNKNOWN for found in sources.values()):
            with torch.no_grad():
                known[node] = node.target(
                    *pytree.tree_map_only(Node, sources.__getitem__, node.args),
                    **pytree.tree_map_only(Node, sources.__getitem__, node.kwargs),
                )
    return known[node]
