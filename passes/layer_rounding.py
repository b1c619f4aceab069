"""Round one linear layer as a plan says, and measure what that did to its outputs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Node

from effopt.attention import SDPA, qkv_of
from effopt.edit import Edit
from effopt.errors import PreconditionError, UsageError
from effopt.kernel import kernel
from effopt.passes.awq import search_clip
from effopt.passes.gptq import gptq
from effopt.passes.layer_statistics import LayerStatistics
from effopt.passes.quantizable import LINEAR, Layer
from effopt.passes.quantization_plan import Plan
from effopt.passes.rounding import Grid, Rounded, round_weight
from effopt.passes.weight_formats import power_of_two, reconstruct, two_of_four
from effopt.program import where

TINY = 1e-30
"""A layer whose outputs are all 0 has no error."""

Known = dict[str, tuple[Rounded, dict[str, Node]]]
"""By the path of a weight: what it was rounded to, and the constants that hold that."""


def quantize_layer(
    edit: Edit,
    layer: Layer,
    plan: Plan,
    seen: LayerStatistics | None,
    static: tuple[float, int],
    known: Known,
) -> dict[str, Any]:
    """Replace a layer by `effopt::quantized_linear`; returns its row for the report.

    `static` are step and origin of its inputs. Layers that share a weight (the same path in the
    module) share its codes: `known` keeps them.
    """
    now = layer.now().source  # another layer, which was replaced by now, may have made it
    weight = edit.program.weight(layer.weight).detach()
    name = str(layer.weight.target)
    if plan.scheme.rounding in FLOATS:
        values = FLOATS[plan.scheme.rounding](weight, plan, seen).to(weight.dtype)
        held = edit.constant(f"{name.replace('.', '_')}_values", values)
        edit.update(layer.node, now, held, *([layer.bias] if layer.bias else []))
        return _row(layer, weight, values, plan.grid, seen)
    if name not in known:
        try:
            made = _rounded(layer, weight, plan, seen)
        except UsageError as error:
            raise PreconditionError(where(layer.node), error.reason, error.remedy) from error
        known[name] = made, _constants(edit, name.replace(".", "_"), made)
    rounded, parts = known[name]
    with edit.before(layer.node):
        call = edit.call(
            kernel("quantized_linear").op,
            *(now, parts["codes"], parts["scale"], parts.get("zero"), layer.bias),
            *(rounded.bits, rounded.group, plan.activations, *static),
            name=f"{layer.node.name}_quantized",
        )
    edit.replace(layer.node, call)
    return _row(layer, weight, rounded.dequantized(), plan.grid, seen)


def _constants(edit: Edit, stem: str, rounded: Rounded) -> dict[str, Node]:
    parts = {"codes": rounded.codes, "scale": rounded.scale, "zero": rounded.zero}
    return {
        part: edit.constant(f"{stem}_{part}", held)
        for part, held in parts.items()
        if held is not None
    }


def _rounded(layer: Layer, weight: Tensor, plan: Plan, seen: LayerStatistics | None) -> Rounded:
    if plan.scheme.rounding == "gptq":
        assert seen is not None
        assert seen.hessian is not None
        return gptq(weight, seen.hessian, plan.grid, order=True)
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


def _powers(weight: Tensor, plan: Plan, seen: LayerStatistics | None) -> Tensor:
    return power_of_two(weight, plan.grid.group, EXPONENT_BITS).values


def _sparse(weight: Tensor, plan: Plan, seen: LayerStatistics | None) -> Tensor:
    """Keep the weights that matter to the inputs seen, and fit them; else the largest."""
    if seen is None or seen.hessian is None:
        return weight * two_of_four(weight)
    mask = two_of_four(weight, seen.hessian.diagonal().sqrt().float())
    return reconstruct(weight, mask, seen.hessian)


EXPONENT_BITS = 3
"""Bits of a power of two beside its sign."""

FLOATS: dict[str, Callable[[Tensor, Plan, LayerStatistics | None], Tensor]] = {
    "pow2": _powers,
    "2:4": _sparse,
}
"""Roundings that leave a float weight."""


def _row(
    layer: Layer, weight: Tensor, values: Tensor, grid: Grid, seen: LayerStatistics | None
) -> dict[str, Any]:
    """Describe a layer: the error is the change of its outputs, as a share of their energy."""
    pair = values.float() - weight.float(), weight.float()
    change, whole = pair if seen is None else (seen.rows @ part.T for part in pair)
    error = change.square().sum() / whole.square().sum().clamp_min(TINY)
    return {
        "path": layer.path,
        "shape": [layer.outputs, layer.columns],
        "bits": grid.bits,
        "group": grid.block(layer.columns),
        "symmetric": grid.symmetric,
        "error": float(error),
        "measured_on": "weights" if seen is None else f"{len(seen.rows)} tokens",
    }
