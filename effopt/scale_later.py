"""Scale later: weights that are about to be rounded are scaled where they are read.

A scaled copy of every weight would take as much memory as the model. So the graph multiplies each
by its scales, until it is rounded: `computed` gives one scaled weight at a time.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from effopt.edit import Edit
from effopt.errors import PreconditionError
from effopt.memory import give_back
from effopt.program import Program, value
from effopt.scale_edit import apply_scales, check_scales, multiply_source
from effopt.scale_groups import ScaleGroup, Scales
from effopt.scale_rules import parts

aten = torch.ops.aten


def apply_scales_later(
    edit: Edit, scales: Scales, chosen: Mapping[ScaleGroup, Tensor], later: Collection[Node]
) -> None:
    """Do as `apply_scales`; the graph multiplies the constants of `later` where they are read.

    Products are in float32, or float64 for such weights. Errors are those of `apply_scales`.
    """
    muls = {group: scale for group, scale in chosen.items() if group.kind == "mul"}
    folded = {group: scale for group, scale in chosen.items() if group not in muls}
    for group, scale in muls.items():
        check_scales(edit, scales, group, scale)
    factors = _factors(scales, folded, muls, later)
    rest = tuple(site for site in scales.sites if site.constant not in factors)
    apply_scales(edit, replace(scales, sites=rest), folded)
    for weight, times in factors.items():
        _read_scaled(edit, weight, times, keep=weight not in later)
        give_back()
    for group, scale in muls.items():
        multiply_source(edit, group, scale)


def _factors(
    scales: Scales,
    folded: Mapping[ScaleGroup, Tensor],
    muls: Mapping[ScaleGroup, Tensor],
    later: Collection[Node],
) -> dict[Node, list[Tensor]]:
    """Return what weights are multiplied by: float64, each [N, 1] or [1, K] or the like."""
    values, found = scales.values(folded), dict[Node, list[Tensor]]()
    for group, scale in muls.items():
        for linear in group.linears:
            weight, inner, _ = parts(linear)
            found.setdefault(weight, []).append(scale.double().unsqueeze(1 - inner))
    for site in scales.sites:
        if site.constant in later or site.constant in found:
            times = [] if site.times is None else [values[site.times]]
            over = [] if site.over is None else [1 / values[site.over]]
            found.setdefault(site.constant, []).extend(
                factor for factor in (*times, *over) if bool((factor != 1).any())
            )
    return {weight: factors for weight, factors in found.items() if factors}


def _read_scaled(edit: Edit, weight: Node, factors: Sequence[Tensor], keep: bool) -> None:
    """Let the one reader of a weight read its product; `keep` makes that a constant."""
    (reader,), held, stem = weight.users, value(weight), str(weight.target).replace(".", "_")
    wide = torch.promote_types(held.dtype, torch.float32)
    with edit.before(reader):
        made = weight
        for factor in factors:
            constant = edit.constant(f"{stem}_factor", factor.to(held.device, wide))
            made = edit.call(aten.mul.Tensor, made, constant)
        made = edit.call(aten.to.dtype, made, held.dtype, name=f"{weight.name}_scaled")
    scaled = computed(edit.program, made)
    if not bool(scaled.isfinite().all()) and bool(edit.program.weight(weight).isfinite().all()):
        reason = f"scaled, it leaves the range of {held.dtype}"
        raise PreconditionError(f"@{weight.target}", reason, "choose smaller scales")
    if keep:
        made = edit.constant(f"{stem}_scaled", scaled)
    args = [made if arg is weight else arg for arg in reader.args]
    edit.update(reader, *args, **reader.kwargs)


def computed(program: Program, node: Node) -> Tensor:
    """Return the value of a node that follows from constants alone."""
    if node.op == "get_attr":
        return program.weight(node).detach()
    assert callable(node.target)
    args, kwargs = map_arg((node.args, node.kwargs), lambda source: computed(program, source))
    made: Tensor = node.target(*args, **kwargs)
    return made


def constant_of(node: Node) -> Node:
    """Return the constant that a node computes from: a weight, however it is scaled."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return node
