"""Round one linear layer as a plan says, and measure what that did to its outputs."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effopt.attention import SDPA, qkv_of
from effopt.edit import Edit
from effopt.errors import at
from effopt.kernel import kernel
from effopt.passes.awq import search_clip
from effopt.passes.float_weights import FLOATS
from effopt.passes.gptq import gptq
from effopt.passes.layer_statistics import LayerStatistics
from effopt.passes.quantizable import LINEAR, Layer
from effopt.passes.quantization_plan import Plan
from effopt.passes.rounding import Rounded, relative_error, round_weight
from effopt.program import value, where
from effopt.scale_later import computed, constant_of

aten = torch.ops.aten

Known = dict[str, tuple[Rounded | Tensor, dict[str, Node]]]
"""By the path of a weight: what it was rounded to, and the constants that hold that."""


def quantize_layer(
    edit: Edit,
    layer: Layer,
    plan: Plan,
    seen: LayerStatistics | None,
    static: tuple[float, int],
    known: Known,
) -> dict[str, Any]:
    """Replace a layer by `effopt::quantized_linear`, or its weight; returns its row for the report.

    `static` are step and origin of its inputs. Layers that share a weight (the same path in the
    module) share what it was rounded to: `known` keeps that.
    """
    now = layer.now().source  # another layer, which was replaced by now, may have made it
    weight = computed(edit.program, layer.weight)
    name = str(constant_of(layer.weight).target)
    if name not in known:
        with at(where(layer.node)):
            made = _rounded(layer, weight, plan, seen)
        known[name] = made, _constants(edit, name.replace(".", "_"), made)
    rounded, parts = known[name]
    if isinstance(rounded, Tensor):
        _put(edit, layer, now, parts["values"], plan)
        return _row(layer, weight, rounded, plan, seen)
    with edit.before(layer.node):
        call = edit.call(
            kernel("quantized_linear").op,
            *(now, parts["codes"], parts["scale"], parts.get("zero"), _bias(edit, layer)),
            *(rounded.bits, rounded.group, plan.activations, *static),
            name=f"{layer.node.name}_quantized",
        )
    edit.replace(layer.node, call)
    return _row(layer, weight, rounded.dequantized(), plan, seen)


def _bias(edit: Edit, layer: Layer) -> Node | None:
    """Return the bias, None for zeros: engines add them in 1 to 2 % of the product's time."""
    zeros = layer.bias is not None and not computed(edit.program, layer.bias).any()
    return None if zeros else layer.bias


def _put(edit: Edit, layer: Layer, source: Node, held: Node, plan: Plan) -> None:
    """Let a layer read other values; narrower ones are widened, or the layer computes in them."""
    own, narrow = value(layer.weight).dtype, value(held).dtype
    bias = [layer.bias] if layer.bias else []
    if narrow == own:
        edit.update(layer.node, source, held, *bias)
        return
    with edit.before(layer.node):
        if not plan.inside:
            wide = edit.call(aten.to.dtype, held, own)
            edit.update(layer.node, source, wide, *bias)
            return
        inputs = [edit.call(aten.to.dtype, x, narrow) for x in (source, *bias)]
        made = edit.call(LINEAR, inputs[0], held, *inputs[1:])
        edit.replace(layer.node, edit.call(aten.to.dtype, made, own))


def _constants(edit: Edit, stem: str, rounded: Rounded | Tensor) -> dict[str, Node]:
    if isinstance(rounded, Tensor):
        return {"values": edit.constant(f"{stem}_values", rounded)}
    parts = {"codes": rounded.codes, "scale": rounded.scale, "zero": rounded.zero}
    return {
        part: edit.constant(f"{stem}_{part}", held)
        for part, held in parts.items()
        if held is not None
    }


def _rounded(
    layer: Layer, weight: Tensor, plan: Plan, seen: LayerStatistics | None
) -> Rounded | Tensor:
    if plan.scheme.rounding in FLOATS:
        return FLOATS[plan.scheme.rounding](weight, plan, seen)
    if plan.scheme.rounding == "gptq" and seen is not None:
        return gptq(weight, seen.read_hessian, plan.grid, order=True)
    if plan.clip and plan.scaling == "awq" and seen is not None and not _only_logits(layer.node):
        weight = search_clip(seen.rows, weight, plan.grid)
    return round_weight(weight, plan.grid)


def _only_logits(node: Node) -> bool:
    """Tell whether a layer makes queries or keys alone: their product is not its own output."""
    reads, todo, known = set[bool](), [node], set[Node]()
    while todo:
        made = todo.pop()
        for user in made.users:
            if user.target is SDPA:
                reads.add(made in qkv_of(user)[:2] and made is not qkv_of(user)[2])
            elif user.target is LINEAR or user.op == "output":
                reads.add(False)
            elif user not in known:
                known.add(user)
                todo.append(user)
    return reads == {True}


def _row(
    layer: Layer, weight: Tensor, values: Tensor, plan: Plan, seen: LayerStatistics | None
) -> dict[str, Any]:
    """Describe a layer: the error is the change of its outputs, as a share of their energy."""
    pair = values.float() - weight.float(), weight.float()
    change, whole = pair if seen is None else (seen.rows @ part.T for part in pair)
    return {
        "path": layer.path,
        "shape": [layer.outputs, layer.columns],
        "bits": plan.scheme.bits,
        "group": plan.grid.block(layer.columns),
        "symmetric": plan.grid.symmetric,
        "weights": plan.scheme.values,
        "error": relative_error(change, whole),
        "measured_on": "weights" if seen is None else f"{seen.count} tokens",
    }
