"""What the attention masks of a token axis say about padding, and if sizes can replace them."""

from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from effopt.attention import mask_of
from effopt.axes import same_size
from effopt.axis_parts import depends_on_input
from effopt.axis_rules import tensors
from effopt.errors import PreconditionError
from effopt.program import shape, value, where
from effopt.sites import TokenAxis
from effopt.tokens import Kind

aten = torch.ops.aten
SEEN_THROUGH = (
    *(aten.reshape.default, aten.unsqueeze.default, aten.expand.default, aten.squeeze.dim),
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.logical_not.default),
    aten.bitwise_not.default,
    *(aten.clamp_min.default, aten.clamp.default, aten.ne.Scalar, aten.select.int),
)
LOW = -1e4
"""A mask value at or below this (as in half precision's -65504) is meant as minus infinity."""


@dataclass(frozen=True)
class Padding:
    """The boolean [B, 1, 1, N] mask (True = attend) of all attention calls over an axis, or none.

    `refusal` says why the calls' masks cannot be told from a padding mask.
    """

    mask: Node | None = None
    refusal: PreconditionError | None = None


def find_padding(axis: TokenAxis) -> Padding:
    """Find the padding mask that all attention calls over the axis share."""
    calls = [node for node, found in axis.effects.items() if found.kind is Kind.ATTEND]
    own = [call for call in calls if _keys_on(axis, call)]
    masks = {call: mask_of(call) for call in own}
    for call, mask in masks.items():
        if mask is not None and (reason := _unmergeable(axis, mask)):
            return Padding(refusal=_refuse(call, reason))
    vectors = {call: mask for call, mask in masks.items() if _is_vector(axis, mask)}
    if len(set(vectors.values())) > 1 or (vectors and len(vectors) < len(masks)):
        reason = "the attention calls over these tokens do not share one padding mask"
        return Padding(refusal=_refuse(own[0], reason))
    return Padding(next(iter(vectors.values()), None))


def _refuse(call: Node, reason: str) -> PreconditionError:
    remedy = "drop tokens in place of merging them, or pass a boolean padding mask"
    return PreconditionError(where(call), reason, remedy)


def _keys_on(axis: TokenAxis, call: Node) -> bool:
    keys = tensors(call)[1]
    return len(shape(keys)) - 2 in axis.tokens.on(keys)


def _is_vector(axis: TokenAxis, mask: Node | None) -> bool:
    """Tell whether a mask is boolean and hides keys alone, the same for all heads."""
    if mask is None or value(mask).dtype != torch.bool:
        return False
    return set(axis.tokens.on(mask)) == {len(shape(mask)) - 1}


def _unmergeable(axis: TokenAxis, mask: Node) -> str:
    """Say why merged tokens cannot be given a place in a mask, or ""."""
    if value(mask).dtype == torch.bool:
        if len(axis.tokens.on(mask)) > 1:
            return "a boolean mask that differs from query to query has no merged form"
        sizes = shape(mask)
        batched = len(sizes) == 4 and not same_size(sizes[0], 1)
        if not batched or not (same_size(sizes[1], 1) and same_size(sizes[2], 1)):
            return "a boolean mask that is not [batch, 1, 1, tokens] has no merged form"
        return ""
    if depends_on_input(mask):
        return "an additive mask made from inputs may hide tokens, which sizes cannot show"
    fixed = constant_value(mask)
    if fixed is None:
        return "an additive mask of unknown values may hide tokens, which sizes cannot show"
    return "an additive mask hides tokens, which sizes cannot show" if fixed.min() <= LOW else ""


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


def comes_from(node: Node, source: Node) -> bool:
    """Tell whether a value is the condition behind a mask: seen through views, casts and not."""
    return _origin(node) is _origin(source)


def _origin(node: Node) -> Node:
    while node.target in SEEN_THROUGH and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
