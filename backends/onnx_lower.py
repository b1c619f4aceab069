"""From a Program to an ONNX graph in memory: standard operators, at one opset.

The graph is prepared in torch (kernels become their standard form, attention gets one plain
additive mask), traced again, and translated by torch's exporter with two translations of ours.
Quantized linears get the form of the kind of target that the graph is for.
"""

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, Node

from effopt.backends import quantized
from effopt.backends.fuse import fuse
from effopt.backends.fuse_pool import fuse_pool
from effopt.backends.onnx_plugins import plugin_node
from effopt.errors import PreconditionError
from effopt.kernel import adapters, lowerings
from effopt.plugin import running
from effopt.program import Program, where
from effopt.signature import Size, TensorSpec

OPSET = 20
"""Opset 23 has one Attention operator, which onnxruntime runs at 0.95-1.01 of the speed of the
form below (ViT-S, batch 1 and 8, one thread, ratio of medians) and TensorRT not at all in fp32."""

op: Any = opset18  # its stubs know eager tensors only, and the exporter traces

NARROW = 256
"""Inputs of a linear layer below which it becomes MatMul and Add."""
_UNBOUNDED = 2**31 - 1
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_LINEAR = torch.ops.aten.linear.default


def lower(
    program: Program, kind: str = "portable", opset: int = OPSET, *, plugins: bool = False
) -> ir.Model:
    """Translate a program; inputs and outputs are in the order of its signature, yet unnamed.

    `kind` says whose form quantized linears get: "cpu" may use onnxruntime's own operators,
    "portable" and "gpu" standard ones alone. `plugins` puts nodes of plugins for kernels that have
    one, yet without their functions. `opset` is the least. The program is left as it was, and
    computes the answers of all exits that it has, see `onnx_exits` in place of that. Raises
    PreconditionError, naming the operator or the node, for what has no such form.
    """
    fork = program.fork()
    opset = max(opset, quantized.mark(fork.module.graph, kind, plugins=plugins))
    if plugins:
        fuse(fork.module.graph)
        fuse_pool(fork.module.graph)
    _prepare(fork.module.graph, plugins)
    fork.compile()
    with _quiet(), torch.no_grad(), running(plugin_node):
        exported = _trace(fork)
        made = _translate(exported, fork, opset)
    quantized.expand(made, kind)
    return made


# --- the graph ahead of the trace -------------------------------------------------------------


def _prepare(graph: Graph, plugins: bool) -> None:
    """Put kernels in the form asked for, masks in additive form, outputs on nodes of their own."""
    forms = adapters() if plugins else lowerings()
    masks: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.target in forms:
            node.target = forms[node.target]
        elif node.target is torch.ops.aten.view.default:
            # A view depends on strides, which a kernel's standard form may give otherwise.
            node.target = torch.ops.aten.reshape.default
        elif node.target is _SDPA:
            _plain_attention(graph, node, masks)
    _own_outputs(graph)


def _plain_attention(graph: Graph, node: Node, masks: dict[Any, Node]) -> None:
    """Leave query, key, value, an additive mask or none, and the scale; nothing else."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "enable_gqa": False}
    given: dict[str, Any] = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, key, value, mask = (given[name] for name in names[:4])
    if given["dropout_p"]:
        raise PreconditionError(where(node), "attention drops at random", "capture in eval mode")
    with graph.inserting_before(node):
        if given["enable_gqa"]:
            key, value = (graph.call_function(_spread_heads, (n, query)) for n in (key, value))
    if given["is_causal"]:
        mask = _causal_mask(graph, node, query, given["key"], masks)
    elif mask is not None and mask.meta["val"].dtype is torch.bool:
        _answer_the_seeing(graph, node, mask, masks)
        mask = _additive_mask(graph, mask, query, masks)
    node.args, node.kwargs = (query, key, value, mask), {"scale": given.get("scale")}


def _answer_the_seeing(graph: Graph, node: Node, mask: Node, masks: dict[Any, Node]) -> None:
    """Let queries that may attend to nothing, as of padding on the left, get 0 as in torch."""
    source = mask
    while source.target is torch.ops.aten.expand.default and _broadcasts(source, mask):
        source = source.args[0]  # type: ignore[assignment]
    sizes = source.meta["val"].shape
    if len(sizes) < 2 or sizes[-2] == 1:
        return
    if (mask, "seeing") not in masks:
        with graph.inserting_after(mask):
            masks[mask, "seeing"] = graph.call_function(torch.any, (mask, -1, True))
    with graph.inserting_after(node):
        answered = graph.call_function(torch.where, (masks[mask, "seeing"], node, 0.0))
    answered.meta = dict(node.meta)
    node.replace_all_uses_with(answered, lambda user: user is not answered)


def _additive_mask(graph: Graph, mask: Node, query: Node, masks: dict[Any, Node]) -> Node:
    """Turn True/False into 0/lowest once for all layers, ahead of any broadcast of the mask."""
    source = mask
    while source.target is torch.ops.aten.expand.default and _broadcasts(source, mask):
        source = source.args[0]  # type: ignore[assignment]
    dtype = query.meta["val"].dtype
    if (source, dtype) not in masks:
        with graph.inserting_after(source):
            masks[source, dtype] = graph.call_function(_additive, (source, dtype))
    return masks[source, dtype]


def _broadcasts(expand: Node, mask: Node) -> bool:
    """Tell whether the argument of `expand` has the rank of the mask: adding it broadcasts."""
    inner: Any = expand.args[0]
    return bool(inner.meta["val"].ndim == mask.meta["val"].ndim)


def _causal_mask(graph: Graph, node: Node, query: Node, key: Node, masks: dict[Any, Node]) -> Node:
    sizes = [n.meta["val"].shape[-2] for n in (query, key)]
    place = (*map(str, sizes), query.meta["val"].dtype)
    if place not in masks:
        with graph.inserting_before(node):
            masks[place] = graph.call_function(_causal, (query, key))
    return masks[place]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where attention is allowed, the lowest finite number where it is not."""
    lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype)
    return torch.where(mask, torch.zeros((), dtype=dtype), lowest)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """Return [L, S]: 0 on and below the diagonal, the lowest finite number above it."""
    shape = (query.shape[-2], key.shape[-2])
    return torch.full(shape, torch.finfo(query.dtype).min, dtype=query.dtype).triu(1)


def _spread_heads(heads: Tensor, query: Tensor) -> Tensor:
    """Repeat each of the few key or value heads for its group of query heads: [B, H, S, D]."""
    batch, few, length, depth = heads.shape
    group = query.shape[1] // few
    spread = heads[:, :, None].expand(batch, few, group, length, depth)
    return spread.reshape(batch, few * group, length, depth)


def _own_outputs(graph: Graph) -> None:
    """Copy an output that is an input or a weight, or is returned twice: each needs a name."""
    output = next(reversed(graph.nodes))
    seen: set[Node] = set()
    own = []
    for node in output.args[0]:
        if node in seen or node.op != "call_function":
            with graph.inserting_before(output):
                node = graph.call_function(torch.ops.aten.clone.default, (node,))
        seen.add(node)
        own.append(node)
    output.args = (tuple(own),)


# --- trace and translation --------------------------------------------------------------------


def _trace(program: Program) -> ExportedProgram:
    dims: dict[str, Any] = {}
    for name, (low, high) in program.ranges.items():
        dims[name] = Dim(name, min=low, max=None if high >= _UNBOUNDED else high)
    specs = program.signature.inputs
    samples = tuple(_sample(s, spec) for s, spec in zip(program.samples, specs, strict=True))
    shapes = tuple(
        {place: dims[size] for place, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in specs
    )
    try:
        return torch.export.export(
            program.module,
            samples,
            dynamic_shapes=shapes,
            # Lengths after a merge give conditions that hold but that cannot be proved.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    except (RuntimeError, ValueError) as error:
        # torch's errors of the trace are all of these two kinds; the first line says what.
        raise PreconditionError("trace", _first_line(error), _TRACE_REMEDY) from error


_TRACE_REMEDY = "leave the dimension out of dynamic; a graph that passes made is a defect of theirs"


def _sample(sample: Tensor, spec: TensorSpec) -> Tensor:
    """Repeat a dynamic dimension of size 1: the trace would take it for a constant."""
    repeats = [
        2 if isinstance(d, str) and sample.shape[i] == 1 else 1 for i, d in enumerate(spec.shape)
    ]
    return sample.repeat(repeats) if 2 in repeats else sample


def _translate(exported: ExportedProgram, program: Program, opset: int) -> ir.Model:
    try:
        made = torch.onnx.export(
            exported,
            (),
            None,
            dynamo=True,
            opset_version=opset,
            verbose=False,
            custom_translation_table={_SDPA: _attention, _LINEAR: _linear},
        )
    except torch.onnx.OnnxExporterError as error:
        raise _no_form(error, program) from error
    assert made is not None
    return made.model


def _no_form(error: Exception, program: Program) -> PreconditionError:
    """Read the operator without a form from an error of the exporter, and find its node.

    The exporter decomposes first, so the operator is a part of the model's: `_linalg_svd` of
    `linalg_svd`. A node is named where it is the only kind that contains the operator's name.
    """
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    found = re.search(r"OpOverload\(op='(\w+\.(\w+))'", str(cause))
    operator, stem = (found[1], found[2]) if found else (_first_line(cause), "")
    stem = stem.strip("_").removesuffix("_ex")
    calls = [node for node in program.nodes() if node.op == "call_function"]
    nodes = [node for node in calls if stem and stem in str(node.target)]
    return PreconditionError(
        where(nodes[0]) if len({node.target for node in nodes}) == 1 else operator,
        f"no form in standard ONNX operators: {operator}",
        "replace that operation in the model by common torch operations",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None, scale: Any = None) -> Any:
    """softmax(s q k^T + mask) v; q [B, H, L, D], k and v [B, H, S, D], mask to [B, H, L, S].

    onnxruntime makes Transpose, MatMul and Mul one FusedMatMul wherever the scale stands (on q,
    on k or on the product: within 1 %). The exporter's own form splits the scale over q and k and
    takes 1.01-1.02 times as long in a whole ViT-S at batch 1, 1.00-1.06 times at batch 8 (one
    thread, ratios of medians). com.microsoft's MultiHeadAttention was 0.94-0.98 as fast as this.
    """
    rank = len(query.shape)
    factor = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    scores = op.MatMul(query, op.Transpose(key, perm=swapped))
    scores = op.Mul(scores, op.CastLike(op.Constant(value_float=float(factor)), query))
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """x W^T + b; x [..., I], W [O, I], b [O]: one Gemm over all rows, on the weight as it is.

    Gemm adds the bias itself, where MatMul needs an Add over the whole activation: a whole ViT-S
    is 1.01-1.03 times as fast at batch 1 and 0.99-1.02 times at batch 8 (one thread, ratios of
    medians). No transposed copy of a weight is made, in memory or in the file. Below NARROW
    inputs the two reshapes around it cost more than the Add: MatMul is 1.04-1.08 times as fast on
    the digits model (width 128, two threads, batch 1 and 8).
    """
    leading: list[Size] = [d if isinstance(d, int) else str(d) for d in input.shape[:-1]]
    symbols = [size for size in leading if isinstance(size, str)]
    narrow = len(leading) > 1 and weight.shape[1] < NARROW
    if not leading or len(symbols) > 1 or narrow:
        product = op.MatMul(input, op.Transpose(weight, perm=[1, 0]))
        return product if bias is None else op.Add(product, bias)
    if len(leading) == 1:
        return _gemm(input, weight, bias)
    rows = op.Reshape(input, op.Constant(value_ints=[-1, input.shape[-1]]))
    sizes = [-1 if isinstance(size, str) else size for size in leading]
    return op.Reshape(_gemm(rows, weight, bias), op.Constant(value_ints=[*sizes, weight.shape[0]]))


def _gemm(rows: Any, weight: Any, bias: Any) -> Any:
    inputs = (rows, weight) if bias is None else (rows, weight, bias)
    return op.Gemm(*inputs, transB=1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes to its own developers off the user's screen; errors pass."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
