"""Scale edit: write chosen scales into the constants of a program; its outputs stay the same."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from effopt.edit import Edit
from effopt.errors import PreconditionError, UsageError
from effopt.program import Program, value, where
from effopt.scale_groups import ScaleGroup, Scales
from effopt.scale_rules import parts

aten = torch.ops.aten


def apply_scales(edit: Edit, scales: Scales, chosen: Mapping[ScaleGroup, Tensor]) -> None:
    """Let every linear layer of the chosen groups read x / s, with the columns of W times s.

    `scales` are those of `edit.program`; `chosen` gives a group its scales [R] > 0, a group that
    is not there stays as it is. A constant is changed in float64 and rounded to its dtype once.
    Raises UsageError for groups of another program and for shapes that do not fit,
    PreconditionError where a scale is no positive finite number or leaves the range of a weight.
    """
    for group, scale in chosen.items():
        check_scales(edit, scales, group, scale)
    muls = {group: scale for group, scale in chosen.items() if group.kind == "mul"}
    factors: dict[Node, Tensor] = {}
    for constant, factor in (*_sites(edit, scales, chosen), *_columns(muls)):
        factors[constant] = factors[constant] * factor if constant in factors else factor
    scaled = {node: _scaled(edit.program, node, factor) for node, factor in factors.items()}
    for constant, tensor in scaled.items():
        name = f"{str(constant.target).replace('.', '_')}_scaled"
        edit.replace(constant, edit.constant(name, tensor))
    for group, scale in muls.items():
        multiply_source(edit, group, scale)


def check_scales(edit: Edit, scales: Scales, group: ScaleGroup, scale: Tensor) -> None:
    """Raise what `apply_scales` raises for the scales of a group."""
    if group not in scales.groups or group.source.graph is not edit.graph:
        raise UsageError("a scale group of another program", "find the groups of this program")
    if tuple(scale.shape) != (group.count,):
        reason = f"{tuple(scale.shape)} scales for a group that has ({group.count},)"
        raise UsageError(reason, "give one scale for each root of the group")
    if not bool((scale.isfinite() & (scale > 0)).all()):
        reason, remedy = "a scale is not a positive finite number", "clamp the scales from below"
        raise PreconditionError(where(group.linears[0]), reason, remedy)


def _sites(
    edit: Edit, scales: Scales, chosen: Mapping[ScaleGroup, Tensor]
) -> Iterator[tuple[Node, Tensor]]:
    """Yield what the constants around folded and tied groups are multiplied by."""
    values = scales.values(chosen)
    one = torch.ones((), dtype=torch.float64)
    for site in scales.sites:
        times = one if site.times is None else values[site.times]
        over = one if site.over is None else values[site.over]
        if bool((times != 1).any() or (over != 1).any()):
            yield site.constant, times / over


def _columns(muls: Mapping[ScaleGroup, Tensor]) -> Iterator[tuple[Node, Tensor]]:
    """Yield what the weights behind an added multiplication are multiplied by."""
    for group, scale in muls.items():
        for linear in group.linears:
            weight, inner, _ = parts(linear)
            yield weight, scale.to("cpu", torch.float64).unsqueeze(1 - inner)


def _scaled(program: Program, node: Node, factor: Tensor) -> Tensor:
    held = program.weight(node).detach()
    made = (held.to(torch.float64) * factor.to(held.device)).to(held.dtype)
    if bool(made.isfinite().all()) or not bool(held.isfinite().all()):
        return made
    raise PreconditionError(
        f"@{node.target}", f"scaled, it leaves the range of {held.dtype}", "choose smaller scales"
    )


def multiply_source(edit: Edit, group: ScaleGroup, scale: Tensor) -> None:
    """Add one multiplication of the source by 1/s, which the layers of the group read."""
    source = group.source
    val = value(source)
    inverse = (1 / scale.to(val.device, torch.float64)).to(val.dtype)
    constant = edit.constant(f"{source.name}_scale", inverse)
    with edit.before(group.linears[0]):
        product = edit.call(aten.mul.Tensor, source, constant, name=f"{source.name}_scaled")
    for linear in group.linears:
        args = [product if arg is source else arg for arg in linear.args]
        edit.update(linear, *args, **linear.kwargs)
