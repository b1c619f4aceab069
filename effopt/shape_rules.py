"""Shape rules: shape and strides of the operators that fill a transformer, read off arguments.

To run an operator on fake tensors takes a millisecond where the batch is a symbol; these take a
tenth of it. A rule says what the operator would say or None, which leaves the answer to it.
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effopt.axes import same_size

aten = torch.ops.aten
Shape = tuple[Any, ...]
Layout = tuple[Shape, Shape]
"""Sizes and strides of a result; its dtype and device are those of the first argument."""


def _in_order(shape: Sequence[Any]) -> Layout:
    """Return the layout of a contiguous tensor."""
    inner = itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1)
    strides = tuple(inner)[: len(shape)]
    return tuple(shape), tuple(reversed(strides))


def _is_in_order(x: Tensor) -> bool:
    """Tell whether x is known to be contiguous, without adding a guard."""
    return all(map(same_size, x.stride(), _in_order(x.shape)[1]))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Layout | None:
    """Return [..., out] for x [..., in] and weight [out, in]; None where they do not fit."""
    fits = weight.ndim == 2 and x.ndim > 0 and same_size(x.shape[-1], weight.shape[1])
    typed = x.is_floating_point() and x.dtype == weight.dtype
    typed = typed and (bias is None or bias.dtype == x.dtype)
    placed = bias is None or (bias.ndim == 1 and same_size(bias.shape[0], weight.shape[0]))
    return _in_order((*x.shape[:-1], weight.shape[0])) if fits and typed and placed else None


def _norm(x: Tensor, normalised: Any, *given: Any) -> Layout | None:
    """Return the layout of x where a norm runs over its last dimension and its weights fit."""
    weights = [term for term in given if isinstance(term, Tensor)]
    own = len(normalised) == 1 and x.ndim > 0 and same_size(x.shape[-1], normalised[0])
    fits = all(w.dtype == x.dtype and list(w.shape) == list(normalised) for w in weights)
    floating = x.is_floating_point() and _is_in_order(x)
    return _in_order(x.shape) if own and fits and floating else None


def _activation(x: Tensor) -> Layout | None:
    """Return the layout of x; None where strides are out of order, which operators treat apart."""
    return _in_order(x.shape) if x.is_floating_point() and _is_in_order(x) else None


def _pointwise(x: Tensor, y: Any) -> Layout | None:
    """Return the layout of x where y is a number, or broadcasts to the shape of x."""
    if not x.is_floating_point() or not _is_in_order(x):
        return None
    if isinstance(y, (bool, int, float)):
        return _in_order(x.shape)
    if not isinstance(y, Tensor) or y.dtype != x.dtype or not 0 < y.ndim <= x.ndim:
        return None
    fits = all(map(same_size, reversed(y.shape), reversed(x.shape)))
    return _in_order(x.shape) if fits and _is_in_order(y) else None


def _transpose(x: Tensor, first: int, second: int) -> Layout | None:
    """Exchange two dimensions."""
    order = list(range(x.ndim))
    if not all(-x.ndim <= dim < x.ndim for dim in (first, second)):
        return None
    order[first], order[second] = order[second], order[first]
    return tuple(x.shape[i] for i in order), tuple(x.stride(i) for i in order)


def _unsqueeze(x: Tensor, dim: int) -> Layout | None:
    """Insert a dimension of size 1, as far apart as the one that it stands before."""
    if not -x.ndim - 1 <= dim <= x.ndim:
        return None
    at = dim % (x.ndim + 1)
    step = x.shape[at] * x.stride(at) if at < x.ndim else 1
    shape, strides = tuple(x.shape), x.stride()
    return (*shape[:at], 1, *shape[at:]), (*strides[:at], step, *strides[at:])


def _reshape(x: Tensor, shape: Sequence[Any]) -> Layout | None:
    """Return the asked shape of a contiguous x where as many elements have it; -1 is solved."""
    empty = any(isinstance(size, int) and size == 0 for size in (*shape, *x.shape))
    if empty or not _is_in_order(x):
        return None
    asked, held = _cancelled(shape, x.shape)
    free = [size for size in asked if isinstance(size, int) and size == -1]
    known = [size for size in asked if not isinstance(size, int) or size != -1]
    if len(free) > 1 or not all(isinstance(size, int) and size > 0 for size in known):
        return None
    rest, taken = math.prod(held), math.prod(known)
    if taken != 1:
        if not isinstance(rest, int) or rest % taken:
            return None
        rest //= taken
    if not free:
        return _in_order(shape) if same_size(rest, 1) else None
    return _in_order([rest if isinstance(n, int) and n == -1 else n for n in shape])


def _cancelled(left: Sequence[Any], right: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the sizes of each that the other does not have, symbolic ones among them."""
    others, own = list(right), []
    for size in left:
        place = next((i for i, other in enumerate(others) if same_size(size, other)), None)
        if place is None:
            own.append(size)
        else:
            del others[place]
    return own, others


RULES: dict[Any, Callable[..., Layout | None]] = {
    aten.linear.default: _linear,
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
    aten.gelu.default: _activation,
    aten.silu.default: _activation,
    aten.relu.default: _activation,
    aten.log.default: _activation,
    aten.add.Tensor: _pointwise,
    aten.sub.Tensor: _pointwise,
    aten.mul.Tensor: _pointwise,
    aten.transpose.int: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
}
