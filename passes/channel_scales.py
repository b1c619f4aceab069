"""Choose channel scales for groups of linear layers, and fold them, which changes no output."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effopt.edit import Edit
from effopt.errors import VerificationError, at
from effopt.memory import give_back
from effopt.passes.awq import search_scale
from effopt.passes.layer_statistics import LayerStatistics
from effopt.passes.quantizable import Layer
from effopt.passes.quantization_plan import Plan
from effopt.passes.smooth import search_alpha, smooth_scale
from effopt.program import Program, module_path, where
from effopt.scale_later import apply_scales_later
from effopt.scales import ScaleGroup, find_scales

EXACT = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 3e-2, torch.bfloat16: 0.2}
"""Folding may change outputs by this share of the largest value: weights are rounded once more.

Over the 12 layers of a ViT with outlier channels, 5e-15, 7e-7, 3e-3 and 3e-2 were measured.
"""

Seen = Mapping[Node, LayerStatistics]


def fold_scales(
    edit: Edit, layers: Sequence[Layer], plan: Plan, seen: Seen
) -> tuple[dict[Node, LayerStatistics], list[dict[str, Any]]]:
    """Scale the channels that layers read; returns the statistics behind it, by linear node.

    The outputs of the program on its samples are compared before and after: VerificationError
    where they differ by more than rounding.
    """
    program, chosen, rows = edit.program, dict[ScaleGroup, Tensor](), list[dict[str, Any]]()
    behind = {layer.node: seen[layer.source] for layer in layers}
    scales = program.get(find_scales)
    for group in scales.groups:
        own = [layer for layer in layers if layer.node in group.linears]
        if not own or (group.kind == "mul" and not plan.scheme.muls):
            continue
        with at(where(own[0].node)):
            scale, row = _chosen(program, group, own, plan, seen)
        give_back()
        if 0 in (row.get("ratio"), row.get("alpha")):
            continue  # plain rounding was best: no scale, and no multiplication by ones
        chosen[group] = scale
        rows.append(row)
        wide = scale[torch.tensor(group.roots)]
        behind |= {layer.node: seen[layer.source].divided(wide) for layer in own}
    before = program.run(program.samples)
    apply_scales_later(edit, scales, chosen, [layer.weight for layer in layers])
    edit.close()
    give_back()
    _compare(before, program.run(program.samples))
    give_back()
    return behind, rows


def _chosen(
    program: Program, group: ScaleGroup, own: Sequence[Layer], plan: Plan, seen: Seen
) -> tuple[Tensor, dict[str, Any]]:
    """Return the scale of each root of a group, and its row for the report."""
    statistics = seen[own[0].source]
    weights = [program.weight(layer.weight).detach() for layer in own]
    roots = None if group.kind == "mul" else torch.tensor(group.roots)
    row: dict[str, Any] = {"kind": group.kind, "linears": [layer.path for layer in own]}
    row["producers"] = [module_path(node) or node.name for node in group.producers]
    x, most = statistics.rows, statistics.most
    if plan.scaling == "smooth" and plan.alpha is not None:
        scale = smooth_scale(most, weights, plan.alpha, roots)
        return scale, {**row, "alpha": plan.alpha}
    if plan.scaling == "smooth":
        name, found = "alpha", search_alpha(x, most, weights, plan.grid, plan.activations, roots)
    else:
        name, found = (
            "ratio",
            search_scale(x, weights, plan.grid, stat=statistics.mean, roots=roots),
        )
    return found.scale, {**row, name: found.ratio, "loss": found.loss, "rtn_loss": found.rtn_loss}


def _compare(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Compare floating outputs; whole numbers and conditions may flip where values are close."""
    for place, (was, now) in enumerate(zip(before, after, strict=True)):
        if was.dtype not in EXACT or not was.numel():
            continue
        held = was.isfinite()
        first, second = (torch.where(held, x.double(), 0.0) for x in (was, now))
        error = float((first - second).abs().max())
        same = bool((held == now.isfinite()).all())
        if not same or not error <= EXACT[was.dtype] * float(first.abs().max()):
            reason = f"folding channel scales changed output {place} by {error:.3g}"
            raise VerificationError(reason, "this is a defect of the scale groups: report it")
