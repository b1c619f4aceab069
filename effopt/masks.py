"""What the attention masks of a token axis say about padding, and if sizes can replace them."""

from dataclasses import dataclass

import torch
from torch.fx import Node

from effopt.attention import mask_of
from effopt.axis_rules import depends_on_input, tensors
from effopt.effects import Kind
from effopt.errors import PreconditionError
from effopt.program import shape, value, where
from effopt.sites import TokenAxis


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
    remedy = "use prune-tokens, which gathers masks, or pass a boolean padding mask"
    return PreconditionError(where(call), reason, remedy)


def _keys_on(axis: TokenAxis, call: Node) -> bool:
    keys = tensors(call)[1]
    return len(shape(keys)) - 2 in axis.tokens.on(keys)


def _is_vector(axis: TokenAxis, mask: Node | None) -> bool:
    """Tell whether a mask is boolean and hides keys alone."""
    if mask is None or value(mask).dtype != torch.bool:
        return False
    return set(axis.tokens.on(mask)) == {len(shape(mask)) - 1}


def _unmergeable(axis: TokenAxis, mask: Node) -> str:
    """Say why merged tokens cannot be given a place in a mask, or ""."""
    square = len(axis.tokens.on(mask)) > 1
    if value(mask).dtype == torch.bool:
        if square:
            return "a boolean mask that differs from query to query has no merged form"
        batched = len(shape(mask)) == 4 and not isinstance(shape(mask)[0], int)
        return "" if batched else "a boolean mask of unknown layout has no merged form"
    if depends_on_input(mask):
        return "an additive mask made from inputs may hide tokens, which sizes cannot show"
    return ""
