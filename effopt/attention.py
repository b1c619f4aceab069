"""Attention calls: reading and changing the arguments of scaled_dot_product_attention."""

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import Argument

from effopt.program import shape

SDPA = torch.ops.aten.scaled_dot_product_attention.default
"""The one form of attention: (query, key, value, mask, dropout, is_causal, *, scale)."""


def mask_of(call: Node) -> Node | None:
    """Return the mask (boolean, True = attend) or bias (added) of an attention call."""
    given = call.args[3] if len(call.args) > 3 else call.kwargs.get("attn_mask")
    return given if isinstance(given, Node) else None


def with_mask(
    call: Node, qkv: tuple[Node, ...], mask: Node | None
) -> tuple[tuple[Argument, ...], dict[str, Any]]:
    """Return the arguments of an attention call with other tensors and another mask."""
    kwargs = {key: arg for key, arg in call.kwargs.items() if key != "attn_mask"}
    tail = call.args[4:]
    return (*qkv, *((mask, *tail) if mask is not None or tail else ())), kwargs


def qkv_of(call: Node) -> tuple[Node, Node, Node]:
    """Return query [B, H, N, D], key and value of an attention call."""
    q, k, v = call.args[:3]
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    assert isinstance(v, Node)
    return q, k, v


def is_causal(call: Node) -> bool:
    """Tell whether an attention call has `is_causal=True`."""
    given = call.args[5] if len(call.args) > 5 else call.kwargs.get("is_causal")
    return given is True


def scale_of(call: Node) -> float:
    """Return the factor on the logits: the given one, or 1/sqrt(D)."""
    given = call.kwargs.get("scale")
    return (
        float(given)
        if isinstance(given, (int, float))
        else float(shape(qkv_of(call)[0])[-1]) ** -0.5
    )
