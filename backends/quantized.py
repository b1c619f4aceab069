"""Quantized linears on their way to ONNX: which form each kind of machine gets.

Ahead of the trace a linear becomes one node without a form (`mark`), so that its narrow weights
stay as they are; in the ONNX graph that node gives way to its form (`expand`), with the weights
packed for it. Linears that read one value share the rounding of that value.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Graph, Node

from effopt.backends import quantized_forms as forms
from effopt.backends.quantized_draft import MICROSOFT, Draft, Linear
from effopt.errors import PreconditionError
from effopt.kernel import kernel
from effopt.plugin import DOMAIN
from effopt.products import Limit, Product, product
from effopt.program import Program, value, where

MARKED = ("effopt", "QuantizedLinear")
"""Domain and operator of the node that stands for a linear between `mark` and `expand`."""

BLOCKED_OPSET = 21
"""The first opset with 4-bit tensors, and with blocks in DequantizeLinear."""


@dataclass(frozen=True)
class Form:
    """One row: how a linear is written; what may be written is in `effopt.products`.

    `full` computes in float32 whatever the type of x. `opset` is what blocks or 4 bits ask for.
    """

    write: Callable[[Draft, Linear], ir.Value]
    full: bool = False
    opset: int = 0


_Key = tuple[str, str, str]
FORMS: Mapping[_Key, Form] = MappingProxyType({
    ("cpu", "int4", "float"): Form(forms.nbits, full=True),
    ("cpu", "int8", "float"): Form(forms.nbits, full=True),
    ("cpu", "int8", "tensor"): Form(forms.dynamic, full=True),
    ("cpu", "int8", "row"): Form(forms.rows_fused, full=True),
    ("cpu", "int8", "static"): Form(forms.static_fused, full=True),
    ("portable", "int4", "float"): Form(forms.dequantized, opset=BLOCKED_OPSET),
    ("portable", "int8", "float"): Form(forms.dequantized, opset=BLOCKED_OPSET),
    ("portable", "int8", "tensor"): Form(forms.dynamic, full=True),
    ("portable", "int8", "row"): Form(forms.rows, full=True),
    ("portable", "int8", "static"): Form(forms.static, full=True),
    ("gpu", "int4", "float"): Form(forms.dequantized_blocks, opset=BLOCKED_OPSET),
    ("gpu", "int8", "float"): Form(forms.dequantized),
    ("gpu", "int8", "static"): Form(forms.static_signed),
    ("gpu", "fp8", "fp8"): Form(forms.static_floats),
})  # fmt: skip
"""Forms by kind of machine, type of weights and activations; measured reasons are with each."""

LAUNCHED: Mapping[_Key, Form] = MappingProxyType({("gpu", "int4", "float"): Form(forms.launched)})
"""Forms in the place of those for linears of few rows, where files may have nodes of plugins."""

FEW_ROWS = 8
"""Rows of a sample up to which a linear has few: our plugin reads weights once for so many, and
there reading them is what takes time, while products that engines have of their own are made for
many rows. Where one overtakes the other has not been measured."""


def linears(program: Program) -> list[Node]:
    """Return the quantized linears of a program."""
    operator = kernel("quantized_linear").op
    return [node for node in program.nodes() if node.target is operator]


# --- ahead of the trace -----------------------------------------------------------------------


def mark(graph: Graph, kind: str, *, plugins: bool = False) -> int:
    """Make every quantized linear one node of its name; return the opset that their forms need.

    One whose weights are no constants becomes its kernel's standard lowering. `plugins` allows the
    forms of LAUNCHED. Raises PreconditionError, naming the linear, where the kind of target has no
    form for it.
    """
    found = kernel("quantized_linear")
    opset = 0
    for node in [node for node in graph.nodes if node.target is found.op]:
        names = [argument.name for argument in found.op._schema.arguments]
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        weights = [given[name] for name in ("codes", "scale", "zero")]
        if not all(weight is None or weight.op == "get_attr" for weight in weights):
            node.target = found.lowering
            continue
        form = _form(node, given, kind)
        launched = plugins and _key(kind, given) in LAUNCHED and _few_rows(given["x"])
        plain = launched or (given["bits"] == 8 and given["group"] == _inner(given))
        opset = max(opset, 0 if plain else form.opset)
        node.target = _marked
        words = (*(given[name] for name in names), node.name, int(launched))
        node.args, node.kwargs = words, {}
    return opset


def _marked(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    """Stand for a linear in the trace; `rest` are scale, zero, bias, and the words of WORDS."""
    inputs, words = (x, codes, *rest[:3]), dict(zip(WORDS, rest[3:], strict=True))
    shape = (*x.shape[:-1], codes.shape[0])
    return torch.onnx.ops.symbolic("::".join(MARKED), inputs, words, dtype=x.dtype, shape=shape)


WORDS = ("bits", "group", "activations", "step", "origin", "linear", "launched")
"""What a marker says of its linear, beside the tensors."""


def _form(node: Node, given: Mapping[str, Any], kind: str) -> Form:
    """Return the form of a linear; PreconditionError where the kind of machine has none."""
    key = _key(kind, given)
    found = product(*key)
    limit = found if isinstance(found, Limit) else _limit(found, given)
    if limit:
        raise PreconditionError(where(node), f"{kind}: {limit.reason}", limit.remedy)
    return FORMS[key]


def _key(kind: str, given: Mapping[str, Any]) -> _Key:
    return kind, _weights(given["bits"], given["activations"]), given["activations"]


def _few_rows(x: Node) -> bool:
    """Tell whether a sample has few rows: all sizes are fixed, but for that of the batch."""
    sizes: list[Any] = list(value(x).shape[:-1])
    if sizes and isinstance(sizes[0], torch.SymInt) and sizes[0].node.expr.is_symbol:
        del sizes[0]
    return all(isinstance(size, int) for size in sizes) and math.prod(sizes) <= FEW_ROWS


def _weights(bits: int, activations: str) -> str:
    """Name the type of a linear's weights: both sides are 8-bit floats, or neither is."""
    return "fp8" if activations == "fp8" else f"int{bits}"


def _limit(found: Product, given: Mapping[str, Any]) -> Limit | None:
    if not found.takes(given["group"], _inner(given)):
        return found.against_blocks(given["group"])
    return found.against(symmetric=given["zero"] is None, origin=given["origin"])


def _inner(given: Mapping[str, Any]) -> int:
    return int(given["codes"].meta["val"].shape[1])


# --- in the ONNX graph ------------------------------------------------------------------------


def expand(model: ir.Model, kind: str) -> None:
    """Write the form of every marked node, and drop the weights in their unpacked order."""
    marked = [n for n in model.graph.all_nodes() if (n.domain, n.op_type) == MARKED]
    draft = Draft(model.graph)
    for node in marked:
        linear = Linear.read(node)
        weights = _weights(linear.bits, linear.activations)
        form = (LAUNCHED if linear.launched else FORMS)[kind, weights, linear.activations]
        result = _write(draft, form, linear)
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        draft.put_before(node)
        ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    _drop_unread(model.graph)
    model.opset_imports.pop(MARKED[0], None)
    for domain in {node.domain for node in model.graph.all_nodes()} & {MICROSOFT, DOMAIN}:
        model.opset_imports[domain] = 1


def _write(draft: Draft, form: Form, linear: Linear) -> ir.Value:
    """Write a form between the casts that it needs."""
    own = linear.x.dtype
    assert own is not None
    inside = ir.DataType.FLOAT if form.full else own
    x = draft.cast(linear, linear.x, inside)
    bias = None if linear.bias is None else draft.cast(linear, linear.bias, inside)
    result = form.write(draft, replace(linear, x=x, bias=bias))
    return result if own == inside else draft.op("Cast", result, to=own)


def _drop_unread(graph: ir.Graph) -> None:
    unread = [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]
    for name in unread:
        del graph.initializers[name]
