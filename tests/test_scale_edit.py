"""Scales written into a program: what changes, what stays as it was, and what is refused."""

import pytest
import torch
from torch import Tensor

from effopt.edit import Edit
from effopt.errors import PreconditionError, UsageError
from effopt.program import Program, module_path
from effopt.scale_edit import apply_scales
from effopt.scales import find_scales
from effopt.verify import verify
from tests.scale_networks import NETWORKS, WIDTH, Scaled, groups, ids, program_of
from tests.scaling import by_place, new_inputs, powers, rescaled


def weight_of(program: Program, path: str) -> Tensor:
    node = next(n for n in program.nodes() if n.op == "call_function" and module_path(n) == path)
    weight = node.args[1]
    assert isinstance(weight, torch.fx.Node)
    return program.weight(weight)


def test_only_the_rows_of_the_values_change_in_a_fused_projection() -> None:
    program = program_of(NETWORKS["fused qkv, SDPA, GELU"][0](), (ids(),))
    scales = program.get(find_scales)
    place = next(
        n for n, g in enumerate(scales.groups) if module_path(g.linears[0]) == "parts.0.output"
    )
    after = rescaled(program, {place: torch.full((WIDTH,), 4.0)})
    before, now = (weight_of(p, "parts.0.inputs.0") for p in (program, after))
    assert torch.equal(now[: 2 * WIDTH], before[: 2 * WIDTH])
    assert torch.equal(now[2 * WIDTH :], before[2 * WIDTH :] / 4)


def test_nothing_else_is_touched() -> None:
    program = program_of(NETWORKS["post-LN, GELU"][0](), (ids(),))
    places = [n for n, group in enumerate(groups(program)) if group.kind == "mul"][:1]
    after = rescaled(program, {place: torch.full((WIDTH,), 2.0) for place in places})
    was = {n.target: program.weight(n) for n in program.nodes() if n.op == "get_attr"}
    new = {n.target for n in after.nodes() if n.op == "get_attr"} - set(was)
    # Query, key and value of the first block, and the one factor that they all read.
    assert len(new) == 4
    assert set(was) - {n.target for n in after.nodes()} == {
        f"parts.0.inputs.{n}.weight" for n in range(3)
    }


def test_a_lower_precision_is_kept() -> None:
    model = NETWORKS["pre-LN, ReLU"][0]().to(torch.bfloat16)
    program = program_of(model, (ids(),))
    scales = program.get(find_scales)
    after = rescaled(program, by_place(scales, powers(scales)))
    verify(after, "test")
    inputs = new_inputs(program)
    assert torch.equal(after.run(inputs)[0], program.run(inputs)[0])


def attempt(program: Program, scale: Tensor) -> None:
    scales = program.get(find_scales)
    apply_scales(Edit(program, "test"), scales, {scales.groups[0]: scale})


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_refused(bad: float) -> None:
    program = program_of(Scaled(), (torch.randn(2, 8),))
    with pytest.raises(PreconditionError, match="not a positive finite number"):
        attempt(program, torch.tensor([1.0] * 7 + [bad]))


def test_a_weight_that_would_overflow_is_refused() -> None:
    program = program_of(Scaled(), (torch.randn(2, 8),))
    text = program.text()
    with pytest.raises(PreconditionError, match=r"leaves the range of torch\.float32"):
        attempt(program, torch.full((8,), 1e45, dtype=torch.float64))
    assert program.text() == text


def test_scales_of_another_program_or_size_are_refused() -> None:
    program = program_of(Scaled(), (torch.randn(2, 8),))
    with pytest.raises(UsageError, match="one scale for each root"):
        attempt(program, torch.ones(3))
    scales = program.get(find_scales)
    with pytest.raises(UsageError, match="of another program"):
        apply_scales(Edit(program.fork(), "test"), scales, {scales.groups[0]: torch.ones(8)})
