"""Quantized linears on their way to ONNX: which form each kind of target gets, and who is refused.

Ahead of the trace a linear becomes one node without a form (`mark`), so that its integer weights
stay as they are; in the ONNX graph that node gives way to its form (`expand`), with the weights
packed for it. Linears that read one value share the rounding of that value.
"""

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
from effopt.program import Program, where
from effopt.target import Target

MARKED = ("effopt", "QuantizedLinear")
"""Domain and operator of the node that stands for a linear between `mark` and `expand`."""

BLOCKED_OPSET = 21
"""The first opset with 4-bit tensors, and with blocks in DequantizeLinear."""


@dataclass(frozen=True)
class Form:
    """One row: how a linear is written, and what the form cannot take.

    `groups` are the sizes of which a block of weights must be a multiple (empty: any size); with
    `ragged`, a block of the whole row need not be. `whole` asks for one scale a row, `symmetric`
    for weights without a zero point, `centred` for activations around code 128. `full` computes in
    float32 whatever the type of x. `opset` is what blocks or 4 bits ask for.
    """

    write: Callable[[Draft, Linear], ir.Value]
    symmetric: bool = False
    whole: bool = False
    centred: bool = False
    groups: tuple[int, ...] = ()
    ragged: bool = False
    full: bool = False
    opset: int = 0


_Key = tuple[str, str, int]
FORMS: Mapping[_Key, Form] = MappingProxyType({
    ("cpu", "float", 4): Form(forms.nbits, groups=forms.BLOCKS, ragged=True, full=True),
    ("cpu", "float", 8): Form(forms.nbits, groups=forms.BLOCKS, ragged=True, full=True),
    ("cpu", "tensor", 8): Form(forms.dynamic, symmetric=True, full=True),
    ("cpu", "row", 8): Form(forms.rows_fused, symmetric=True, full=True),
    ("cpu", "static", 8): Form(forms.static_fused, symmetric=True, full=True),
    ("portable", "float", 4): Form(forms.dequantized, opset=BLOCKED_OPSET),
    ("portable", "float", 8): Form(forms.dequantized, opset=BLOCKED_OPSET),
    ("portable", "tensor", 8): Form(forms.dynamic, symmetric=True, full=True),
    ("portable", "row", 8): Form(forms.rows, symmetric=True, full=True),
    ("portable", "static", 8): Form(forms.static, symmetric=True, full=True),
    ("gpu", "float", 4): Form(
        forms.dequantized_blocks, symmetric=True, groups=forms.GPU_BLOCKS, opset=BLOCKED_OPSET
    ),
    ("gpu", "float", 8): Form(forms.dequantized, symmetric=True, whole=True),
    ("gpu", "static", 8): Form(forms.static_signed, symmetric=True, centred=True),
})  # fmt: skip
"""Forms by kind of target, activations and bits; measured reasons are with each form."""

_NO_RUN_TIME_SCALE = (
    "TensorRT has no operator that finds the scale of activations at run time",
    "quantize with calibrated activations (int8-static) or weights alone (int4)",
)
_NO_NARROW_PRODUCT = (
    "no engine multiplies 4-bit weights by 8-bit activations",
    "use 8-bit weights, or 4-bit ones with float activations",
)


def kind_of(target: Target) -> str:
    """Return the first part of the key in FORMS: "cpu", "portable" or "gpu"."""
    return "gpu" if target.gpu else target.arch


def linears(program: Program) -> list[Node]:
    """Return the quantized linears of a program."""
    operator = kernel("quantized_linear").op
    return [node for node in program.nodes() if node.target is operator]


# --- ahead of the trace -----------------------------------------------------------------------


def mark(graph: Graph, kind: str) -> int:
    """Make every quantized linear one node of its name; return the opset that their forms need.

    One whose weights are no constants is left for its kernel's standard lowering. Raises
    PreconditionError, naming the linear, where the kind of target has no form for it.
    """
    found = kernel("quantized_linear")
    opset = 0
    for node in [node for node in graph.nodes if node.target is found.op]:
        names = [argument.name for argument in found.op._schema.arguments]
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        weights = [given[name] for name in ("codes", "scale", "zero")]
        if all(weight is None or weight.op == "get_attr" for weight in weights):
            form = _form(node, given, kind)
            plain = given["bits"] == 8 and given["group"] == _inner(given)
            opset = max(opset, 0 if plain else form.opset)
            node.target = _marked
            node.args, node.kwargs = (*(given[name] for name in names), node.name), {}
    return opset


def _marked(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    """Stand for a linear in the trace; `rest` are scale, zero, bias, and the words of WORDS."""
    inputs, words = (x, codes, *rest[:3]), dict(zip(WORDS, rest[3:], strict=True))
    shape = (*x.shape[:-1], codes.shape[0])
    return torch.onnx.ops.symbolic("::".join(MARKED), inputs, words, dtype=x.dtype, shape=shape)


WORDS = ("bits", "group", "activations", "step", "origin", "linear")
"""What a marker says of its linear, beside the tensors."""


def _form(node: Node, given: Mapping[str, Any], kind: str) -> Form:
    """Return the form of a linear; PreconditionError where there is none."""
    activations, bits, group = given["activations"], given["bits"], given["group"]
    form = FORMS.get((kind, activations, bits))
    if form is None:
        runs = kind == "gpu" and activations in ("tensor", "row")
        reason, remedy = _NO_RUN_TIME_SCALE if runs else _NO_NARROW_PRODUCT
        raise PreconditionError(where(node), reason, remedy)
    whole = group == _inner(given)
    divides = not form.groups or any(group % block == 0 for block in form.groups)
    sizes = " or ".join(map(str, form.groups))
    rules = (
        (
            given["zero"] is None or not form.symmetric,
            f"the form of {activations} activations on {kind} takes no zero points of weights",
            "use a symmetric scheme",
        ),
        (
            not form.whole or whole,
            f"{bits}-bit weights on {kind} take one scale for each output, not blocks of {group}",
            "quantize these weights without blocks",
        ),
        (
            divides or (whole and form.ragged),
            f"blocks of {group} weights are no multiple of {sizes}",
            f"use blocks of {form.groups[-1] if form.groups else group}",
        ),
        (
            not form.centred or given["origin"] == 128,
            f"activations around code {given['origin']}: TensorRT takes symmetric ones alone",
            "calibrate with a symmetric range (origin 128)",
        ),
    )
    for holds, reason, remedy in rules:
        if not holds:
            raise PreconditionError(where(node), reason, remedy)
    return form


def _inner(given: Mapping[str, Any]) -> int:
    return int(given["codes"].meta["val"].shape[1])


# --- in the ONNX graph ------------------------------------------------------------------------


def expand(model: ir.Model, kind: str) -> None:
    """Write the form of every marked node, and drop the weights in their unpacked order."""
    marked = [n for n in model.graph.all_nodes() if (n.domain, n.op_type) == MARKED]
    draft = Draft(model.graph)
    for node in marked:
        linear = Linear.read(node)
        form = FORMS[kind, linear.activations, linear.bits]
        result = _write(draft, form, linear)
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        draft.put_before(node)
        ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    _drop_unread(model.graph)
    model.opset_imports.pop(MARKED[0], None)
    if any(node.domain == MICROSOFT for node in model.graph.all_nodes()):
        model.opset_imports[MICROSOFT] = 1


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
