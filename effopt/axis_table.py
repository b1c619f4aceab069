"""The table of axis rules: by operator, its family; and the propagation that reads it."""

import operator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from effopt import axis_index as index
from effopt import axis_parts as parts
from effopt import axis_products as products
from effopt import axis_rules as rules
from effopt import axis_views as views
from effopt.axes import AxisError, MixedError, Propagation, fresh, fresh_dims
from effopt.axis_rules import Rule, named_dims
from effopt.kernel import kernels
from effopt.program import is_tensor, value

aten = torch.ops.aten


def _all(*names: str) -> tuple[Any, ...]:
    """Return every overload that computes one new tensor or more, of operators named in words."""
    packets = [getattr(aten, name) for words in names for name in words.split()]
    found = [getattr(packet, kind) for packet in packets for kind in packet.overloads()]
    return tuple(target for target in found if _is_functional(target))


def _is_functional(target: OpOverload) -> bool:
    results = target._schema.returns
    return not target._schema.is_mutable and all("Tensor" in str(one.type) for one in results)


POINTWISE = (
    *(aten.copy.default, aten.fill.Scalar, aten.fill.Tensor, aten.masked_fill.Tensor),
    *_all("multiply subtract divide negative absolute fix greater greater_equal less less_equal"),
    *(aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar),
    *_all("not_equal float_power __and__ __or__ log_sigmoid hardswish isclose"),
    *_all("alias contiguous detach dropout feature_dropout zeros_like ones_like full_like"),
    *_all("empty_like real imag conj _conj conj_physical resolve_conj polar complex"),
    *_all("broadcast_tensors lift_fresh_copy floor_divide"),
)
"""Operators that broadcast, element by element, of which torch's tag `pointwise` does not say so.

Those that have the tag are in the family by it: `torch.Tag.pointwise in target.tags`.
"""

FAMILIES: dict[str, tuple[Rule, tuple[Any, ...]]] = {
    "pointwise": (rules.pointwise, POINTWISE),
    "norm": (rules.norm, (aten.layer_norm.default, aten.rms_norm.default)),
    "channel-norm": (rules.channel_norm, _all("batch_norm prelu")),
    "place-norm": (rules.channel_norm, _all("instance_norm group_norm")),
    "weight-norm": (rules.keep, _all("_weight_norm")),
    "softmax": (rules.keep, _all("softmax _softmax log_softmax _log_softmax _safe_softmax")),
    "cast": (rules.keep, _all("type_as to _to_copy")),
    "scan": (rules.keep, _all("cumsum cumprod cummax cummin")),
    "triangle": (rules.keep, _all("tril triu")),
    "linear": (products.linear, (aten.linear.default,)),
    "matmul": (products.matmul, _all("matmul bmm mm mv dot addmm addmv baddbmm")),
    "einsum": (products.einsum, _all("einsum")),
    "outer": (products.outer, _all("outer ger")),
    "distance": (products.distance, _all("cdist")),
    "attention": (products.attention, (aten.scaled_dot_product_attention.default,)),
    "view": (
        views.view,
        (
            *_all("view reshape flatten unflatten unsqueeze squeeze ravel _unsafe_view"),
            *_all("atleast_1d atleast_2d atleast_3d"),
        ),
    ),
    "view-like": (views.view_like, _all("view_as reshape_as")),
    "permute": (views.permute, _all("permute")),
    "transpose": (views.transpose, (aten.transpose.int, *_all("t swapaxes swapdims"))),
    "reverse": (views.reverse, _all("numpy_T mT mH adjoint")),
    "movedim": (views.movedim, _all("movedim moveaxis")),
    "shuffle": (views.shuffle, _all("pixel_shuffle pixel_unshuffle")),
    "pairs": (views.complex_parts, _all("view_as_complex view_as_real")),
    "expand": (views.expand, _all("expand broadcast_to")),
    "expand-like": (views.expand_as, _all("expand_as")),
    "repeat": (views.repeat, _all("repeat tile")),
    "copies": (views.repeat_interleave, (aten.repeat_interleave.self_int,)),
    "reduction": (
        rules.reduction,
        (
            *_all("mean sum prod amax amin argmax argmin any all logsumexp var std var_mean"),
            *_all("std_mean norm linalg_norm linalg_vector_norm nansum nanmean count_nonzero"),
            *_all("median aminmax _is_all_true _is_any_true"),
            *(aten.max.default, aten.max.dim, aten.min.default, aten.min.dim),
        ),
    ),
    "select": (rules.select, (aten.select.int,)),
    "slice": (parts.slice_, (aten.slice.Tensor,)),
    "narrow": (parts.narrow, _all("narrow")),
    "join": (parts.join, _all("cat concat concatenate")),
    "stack": (parts.stack, _all("stack")),
    "pad": (parts.pad, _all("pad constant_pad_nd reflection_pad1d reflection_pad2d")),
    "write": (parts.write, _all("slice_scatter select_scatter")),
    "windows": (parts.windows, _all("unfold")),
    "patches": (parts.patches, _all("im2col")),
    "unbind": (parts.unbind, (aten.unbind.int,)),
    "pieces": (parts.pieces, _all("split chunk split_with_sizes tensor_split")),
    "embedding": (index.embedding, _all("embedding")),
    "gather": (index.gather, _all("gather")),
    "index": (index.index, _all("index")),
    "index-select": (index.index_select, _all("index_select")),
    "index-copy": (index.index_copy, _all("index_add index_copy")),
    "index-put": (index.index_put, _all("index_put")),
    "scatter": (index.scatter, _all("scatter scatter_add scatter_reduce")),
    "masked-scatter": (index.masked_scatter, _all("masked_scatter")),
    "one-hot": (index.one_hot, _all("one_hot")),
    "buckets": (index.buckets, _all("bucketize searchsorted isin")),
    "convolution": (rules.convolution, _all("conv1d conv2d conv3d")),
    "transposed": (
        rules.transposed_convolution,
        _all("conv_transpose1d conv_transpose2d conv_transpose3d"),
    ),
    "grid": (
        rules.channelwise,
        (
            *_all("max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d"),
            *_all("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
            *_all("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
            *_all("max_pool2d_with_indices upsample_nearest1d upsample_nearest2d"),
            *_all("upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d"),
            *_all("upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d"),
            *_all("_upsample_bilinear2d_aa _upsample_bicubic2d_aa"),
        ),
    ),
    "renewed": (
        rules.renewed(named_dims),
        _all("sort argsort topk fft_fft fft_ifft fft_fftn fft_ifftn fft_rfft fft_irfft diff"),
    ),
    "roll": (rules.renewed(lambda node: named_dims(node, "dims")), _all("roll flip")),
    "halve": (rules.renewed(named_dims), _all("glu")),
    "create": (
        rules.create,
        (
            *_all("arange linspace zeros ones full eye scalar_tensor empty tril_indices"),
            *_all("new_ones new_zeros new_full new_empty hann_window"),
        ),
    ),
    "meshgrid": (rules.meshgrid, _all("meshgrid")),
    "size": (rules.number, (aten.sym_size.int,)),
    "item": (rules.getitem, (operator.getitem,)),
}
"""Family → its rule and its operators. An operator without a row stops the analysis there."""

RULES = {target: (name, rule) for name, (rule, targets) in FAMILIES.items() for target in targets}

UNKNOWABLE: dict[str, tuple[Any, ...]] = {
    "it takes as many places as the data says": (
        *_all("nonzero masked_select unique_consecutive _unique2 unique_dim"),
        *(aten.where.default, aten.repeat_interleave.Tensor, aten.repeat_interleave.self_Tensor),
    ),
    "it counts values, whatever their places": _all("histc bincount"),
    "it reads memory by strides": _all("as_strided"),
    "a recurrent network runs along the places": _all("lstm gru rnn_tanh rnn_relu"),
}
"""Why no rule can say what the places of an operator's result are."""

REASONS = {target: reason for reason, targets in UNKNOWABLE.items() for target in targets}


def family(node: Node) -> str:
    """Return the family of a node's operator: "kernel" for ours, "" for one without a rule."""
    if node.target in kernels():
        return "kernel"
    if node.target in RULES:
        return RULES[node.target][0]
    return "pointwise" if is_pointwise(node.target) else ""


def is_pointwise(target: object) -> bool:
    """Tell whether torch says of an operator that it works element by element, and no more."""
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.pointwise in target.tags and len(target._schema.returns) == 1


def propagate(found: Propagation, node: Node) -> None:
    """Find the dims of one node from those of its arguments, or say why they are unknown."""
    many = isinstance(value(node), (tuple, list))
    if node.op == "output" or not (many or is_tensor(node)):
        return
    if node.op in ("placeholder", "get_attr"):
        found.put(node, fresh_dims(node), constant=node.op == "get_attr")
        return
    found.reader = node
    sources = (source for source in node.all_input_nodes if source in found.dims)
    constant = all(source in found.constant for source in sources)
    try:
        found.put(node, _rule(node)(found, node), constant)
    except AxisError as error:
        found.unknown[node] = str(error)
        if isinstance(error, MixedError):
            found.mixed[node] = str(error)
        found.put(node, _opaque(node), constant)


def _rule(node: Node) -> Rule:
    if node.target in kernels():
        return kernels()[node.target].axes
    if node.target in RULES:
        return RULES[node.target][1]
    if is_pointwise(node.target):
        return rules.pointwise
    raise AxisError(_why_not(node))


def _why_not(node: Node) -> str:
    """Say why the table has no rule for an operator."""
    if node.target in REASONS:
        return REASONS[node.target]
    tags = node.target.tags if isinstance(node.target, OpOverload) else ()
    if torch.Tag.nondeterministic_seeded in tags:
        return "it is random"
    return f"no axis rule for {node.target}"


def _opaque(node: Node) -> Any:
    val = value(node)
    if isinstance(val, Tensor):
        return fresh_dims(node)
    return tuple(
        tuple(fresh(f"{node.name}.{n}.{place}", size) for place, size in enumerate(item.shape))
        for n, item in enumerate(val)
        if isinstance(item, Tensor)
    )
