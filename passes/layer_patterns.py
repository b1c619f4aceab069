"""The layers that unify-layers knows: a table of their spellings as patterns.

A layer is matched only where all of it has one dtype: a cast ends a match. So a norm in float32
between two casts becomes one operator between the same two casts, and rounds where it did.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import isclose, pi, sqrt

import torch
from torch import SymInt
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import Argument

from effopt.axes import same_size, same_sizes
from effopt.axis_rules import argument, dims_arg
from effopt.edit import Edit
from effopt.match import Call, Capture, Either, Match, Pattern, product, total
from effopt.passes.layer_views import mean
from effopt.program import is_tensor, shape, value

aten = torch.ops.aten
Build = Callable[[Edit, Node, Match], Node | None]


@dataclass(frozen=True)
class Layer:
    """One spelling of a layer, and what builds its form, or None where it is another layer."""

    pattern: Pattern
    build: Build


# --- what the operators of a pattern must say beside their operands ---------------------------


def _over_last(node: Node) -> bool:
    """Tell whether a reduction keeps all but the last dimension, and that as size 1."""
    last = dims_arg(node, 1) == (len(shape(node.args[0])) - 1,)  # type: ignore[arg-type]
    return last and argument(node, "keepdim") is True and argument(node, "dtype") is None


def _biased(node: Node) -> bool:
    """Tell whether a variance over the last dimension divides by n, not by n - 1."""
    unbiased, correction = argument(node, "unbiased"), argument(node, "correction")
    return _over_last(node) and (unbiased is False or (unbiased is None and correction == 0))


def _over_one(node: Node) -> bool:
    return len(dims_arg(node, 1)) == 1 and argument(node, "dtype") is None


def _bare(node: Node) -> bool:
    """Tell whether a norm has no bias, and no reader but the one that may add it."""
    return len(node.users) == 1 and (
        node.target is aten.rms_norm.default or argument(node, "bias") is None
    )


def _bare_of_both(node: Node) -> bool:
    return _bare(node) and argument(node, "weight") is None


# --- builders ---------------------------------------------------------------------------------


def _like(node: Node, x: Node) -> bool:
    """Tell whether a layer yields floats of the shape and dtype of its argument."""
    if not is_tensor(x) or not value(x).dtype.is_floating_point:
        return False
    return same_sizes(shape(node), shape(x)) and bool(value(node).dtype == value(x).dtype)


def _precise(x: Node) -> bool:
    """Tell whether intermediate squares and sums are out of danger of overflow."""
    return bool(is_tensor(x) and value(x).dtype.is_floating_point and value(x).itemsize >= 4)


def _activation(target: OpOverload, **options: str) -> Build:
    def build(edit: Edit, node: Node, found: Match) -> Node | None:
        x = found["x"]
        return _call(edit, target, x, **options) if _like(node, x) else None

    return build


def _call(edit: Edit, target: OpOverload, *args: Argument, **options: Argument) -> Node:
    return edit.call(target, *args, name=target.overloadpacket.__name__, **options)


def _norm(target: OpOverload) -> Build:
    """Make the builder of a norm: `x`, optional `w`, and `eps`."""

    def build(edit: Edit, node: Node, found: Match) -> Node | None:
        x, weight, eps = found["x"], found.get("w"), found["eps"]
        fits = _like(node, x) and _precise(x) and eps >= 0
        if not fits or not _is_channel(x, weight):
            return None
        bias = (None,) if target is aten.layer_norm.default else ()
        return _call(edit, target, x, [shape(x)[-1]], weight, *bias, eps)

    return build


def _is_channel(x: Node, weight: Node | None) -> bool:
    """Tell whether a weight is one number for each of the static last dimension."""
    channels = shape(x)[-1] if shape(x) else None
    if not isinstance(channels, int) or weight is None:
        return isinstance(channels, int)
    same = is_tensor(weight) and shape(weight) == (channels,)
    return same and bool(value(weight).dtype == value(x).dtype)


def _join_norm(name: str) -> Build:
    """Make the builder that takes the weight or the bias behind a norm into it."""

    def build(edit: Edit, node: Node, found: Match) -> Node | None:
        norm, term = found["norm"], found["term"]
        x, sizes = norm.args[0], argument(norm, "normalized_shape")
        if len(sizes) != 1 or not _like(node, x) or not _is_channel(x, term):
            return None
        names = [known.name for known in norm.target._schema.arguments[2:]]
        rest = [
            term if key == name else argument(norm, key) for key in names if key != "cudnn_enable"
        ]
        return _call(edit, norm.target, x, sizes, *rest)

    return build


def _mean(edit: Edit, node: Node, found: Match) -> Node | None:
    """A sum over one dimension, divided by its size."""
    summed = found["sum"]
    x = summed.args[0]
    (place,) = dims_arg(summed, 1)
    size, scale, count = shape(x)[place], found["scale"], found.get("count")
    if count is None:
        right = isinstance(size, int) and size > 0 and isclose(scale * size, 1, rel_tol=2e-7)
    else:
        right = scale == 1 and isinstance(value(count), SymInt) and same_size(value(count), size)
    if not right or not _precise(x) or not _like(node, summed):
        return None
    return mean(edit, x, [place], keep=argument(summed, "keepdim"))


# --- the table --------------------------------------------------------------------------------

X, WEIGHT, TERM = Capture("x"), Capture("w"), Capture("term")
_VAR_MEAN = Call((aten.var_mean.correction, aten.var_mean.dim), (X,), _biased)
_MEAN = Either(
    (Call((aten.mean.dim,), (X,), _over_last), Call((operator.getitem,), (_VAR_MEAN, 1)))
)
_CENTRED = total((_MEAN, -1), (X, 1))
_VARIANCE = Either(
    (
        Call((aten.mean.dim,), (product((_CENTRED, 2)),), _over_last),
        Call((aten.var.correction, aten.var.dim), (X,), _biased),
        Call((operator.getitem,), (_VAR_MEAN, 0)),
    )
)
_DEVIATION = (total((_VARIANCE, 1), constant="eps"), -0.5)
_SQUARES = Call((aten.mean.dim,), (product((X, 2)),), _over_last)
_ROOT_MEAN_SQUARE = (total((_SQUARES, 1), constant="eps"), -0.5)

_CUBIC = total((product((X, 3), scale=0.044715), 1), (X, 1))
_SQUARE_PLUS_1 = total((product((X, 2), scale=0.044715), 1), constant=1)
_TANH_OF = Either(
    (
        product((_CUBIC, 1), scale=sqrt(2 / pi)),
        product((_SQUARE_PLUS_1, 1), (X, 1), scale=sqrt(2 / pi)),
    )
)
_ERF = Call((aten.erf.default,), (product((X, 1), scale=sqrt(0.5)),))
_TANH = Call((aten.tanh.default,), (_TANH_OF,))
_EXP = Call((aten.exp.default,), (product((X, 1), scale=-1),))

_BARE_NORM = Call((aten.layer_norm.default, aten.rms_norm.default), (), _bare_of_both)
_BARE_LAYER_NORM = Call((aten.layer_norm.default,), (), _bare)
_SUM = Capture("sum", Call((aten.sum.dim_IntList,), (), _over_one))
_GELU, _GELU_TANH = (
    _activation(aten.gelu.default),
    _activation(aten.gelu.default, approximate="tanh"),
)
_SILU = _activation(aten.silu.default)
_LAYER_NORM, _RMS_NORM = _norm(aten.layer_norm.default), _norm(aten.rms_norm.default)

LAYERS = (
    Layer(product((total((_ERF, 1), constant=1), 1), (X, 1), scale=0.5), _GELU),
    Layer(product((total((_TANH, 1), constant=1), 1), (X, 1), scale=0.5), _GELU_TANH),
    Layer(product((Call((aten.sigmoid.default,), (X,)), 1), (X, 1)), _SILU),
    Layer(product((total((_EXP, 1), constant=1), -1), (X, 1)), _SILU),
    Layer(product(_DEVIATION, (_CENTRED, 1)), _LAYER_NORM),
    Layer(product(_DEVIATION, (_CENTRED, 1), (WEIGHT, 1)), _LAYER_NORM),
    Layer(product(_ROOT_MEAN_SQUARE, (X, 1)), _RMS_NORM),
    Layer(product(_ROOT_MEAN_SQUARE, (X, 1), (WEIGHT, 1)), _RMS_NORM),
    Layer(product((Capture("norm", _BARE_NORM), 1), (TERM, 1)), _join_norm("weight")),
    Layer(total((Capture("norm", _BARE_LAYER_NORM), 1), (TERM, 1)), _join_norm("bias")),
    Layer(product((_SUM, 1), scale="scale"), _mean),
    Layer(product((_SUM, 1), (Capture("count"), -1), scale="scale"), _mean),
)
"""A whole layer before its parts; a norm's weight and bias also join one by one."""
