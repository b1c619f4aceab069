"""The verifier: a pass that leaves a program wrong is caught, by name, with node and rule."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.functional import scaled_dot_product_attention

from effopt.edit import Edit
from effopt.errors import PreconditionError, VerificationError
from effopt.kernel import kernel
from effopt.pipeline import Outcome
from effopt.program import Program
from tests.check import Check, said, text
from tests.programs import reduced

aten = torch.ops.aten
Change = Callable[[Program], None]


@dataclass(frozen=True)
class Broken:
    """A pass that does what it is told and claims that all is well."""

    change: Change
    name: ClassVar[str] = "broken"
    exact: ClassVar[bool] = True

    def check(self, program: Program) -> list[PreconditionError]:
        return []

    def run(self, program: Program) -> Outcome:
        self.change(program)
        return Outcome(True)


class Small(nn.Module):
    """One attention over six tokens, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(1)
        x = x + scaled_dot_product_attention(h, h, h).squeeze(1)
        return x + self.up(x)


def node(program: Program, name: str) -> Node:
    return next(found for found in program.nodes() if found.name == name)


def caught(change: Change) -> str:
    """Run a broken pass, twice; the program that was given must be left as it was."""
    check = Check(Small(), torch.randn(2, 6, 4))
    before = text(check.program)
    for _ in range(2):
        with pytest.raises(VerificationError) as error:
            check.run(Broken(change))
        assert text(check.program) == before
    check.numbers(1)
    return said(error.value)


REPORT = "\n  remedy: this is a defect of the pass: please report it"


def test_a_stale_shape() -> None:
    def narrow(program: Program) -> None:
        edit = Edit(program, "broken")
        add = node(program, "add")
        with edit.after(add):
            half = edit.call(aten.slice.Tensor, add, 1, 0, 3)
        reader = node(program, "linear")
        reader.args = (half, *reader.args[1:])
        edit.close()

    assert caught(narrow) == (
        "after broken: linear (linear.default) in up at linear.py: "
        f"its shape is [s77, 3, 4], noted as [s77, 6, 4]{REPORT}"
    )


def test_a_stale_dtype() -> None:
    def halve(program: Program) -> None:
        edit = Edit(program, "broken")
        x = program.inputs()[0]
        with edit.before(node(program, "unsqueeze")):
            double = edit.call(aten.to.dtype, x, torch.float64)
        reader = node(program, "unsqueeze")
        reader.args = (double, 1)
        edit.close()

    assert caught(halve).startswith("after broken: unsqueeze (unsqueeze.default)")
    assert "its dtype is torch.float64, not torch.float32" in caught(halve)


def test_a_node_made_without_its_value() -> None:
    def bare(program: Program) -> None:
        graph, add = program.module.graph, node(program, "add")
        with graph.inserting_after(add):
            made = graph.call_function(aten.relu.default, (add,))
        add.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)

    assert caught(bare) == f"after broken: relu_default (relu.default): it has no value{REPORT}"


def test_an_operator_that_writes_in_place() -> None:
    def write(program: Program) -> None:
        edit = Edit(program, "broken")
        add = node(program, "add")
        with edit.after(add):
            edit.replace(node(program, "linear"), edit.call(aten.relu_.default, add))
        edit.close()

    assert "aten.relu_.default changes its argument in place" in caught(write)


def test_a_function_that_is_no_operator() -> None:
    def call(program: Program) -> None:
        add = node(program, "add")
        add.target = operator.matmul

    assert "<built-in function matmul> is no ATen operator" in caught(call)


def test_a_submodule_call() -> None:
    def call(program: Program) -> None:
        graph, add = program.module.graph, node(program, "add")
        program.module.add_module("extra", nn.ReLU())
        with graph.inserting_after(add):
            made = graph.call_module("extra", (add,))
        made.meta["val"] = add.meta["val"]
        add.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)

    assert "call_module has no place in a program" in caught(call)


def test_arguments_that_do_not_fit() -> None:
    def misfit(program: Program) -> None:
        reader = node(program, "linear")
        reader.args = (node(program, "add"), node(program, "x"))

    assert "linear (linear.default) in up at linear.py: does not fit its arguments" in caught(
        misfit
    )


def test_a_batch_that_became_fixed() -> None:
    def fix(program: Program) -> None:
        edit = Edit(program, "broken")
        add = node(program, "add")
        with edit.after(add):
            edit.call(aten.reshape.default, add, [2, 6, 4])
        edit.close()

    assert "fixes a size that must stay free" in caught(fix)


def test_old_and_new_tokens_in_one_operator() -> None:
    def mix(program: Program) -> None:
        edit = Edit(program, "broken")
        x, linear = program.inputs()[0], node(program, "linear")
        with edit.before(linear):
            score = edit.call(aten.select.int, x, 2, 0)
            kept = edit.call(kernel("select_tokens").op, score, 6, 0, 0)
            fewer = edit.call(kernel("gather_tokens").op, node(program, "add"), kept, 1)
        edit.update(linear, fewer, *linear.args[1:])
        edit.close()

    # Six tokens kept of six: sizes agree everywhere, and the residual adds old to new tokens.
    assert caught(mix) == (
        "after broken: add_1 (add.Tensor) at test_verify.py: x.1 before and after a reduction meet"
        + REPORT
    )


def test_outputs_that_changed_their_shape() -> None:
    def cut(program: Program) -> None:
        edit = Edit(program, "broken")
        last = node(program, "add_1")
        with edit.after(last):
            fewer = edit.call(aten.slice.Tensor, last, 1, 0, 3)
        program.output().args = ((fewer,),)
        edit.close()

    assert caught(cut).startswith("after broken: output")


def test_a_dangling_reader_is_caught_by_the_linter() -> None:
    def dangle(program: Program) -> None:
        first, last = node(program, "unsqueeze"), node(program, "add_1")
        first.args = (last, 1)

    check = Check(Small(), torch.randn(2, 6, 4))
    with pytest.raises((VerificationError, RuntimeError)):
        check.run(Broken(dangle))


@pytest.mark.parametrize("spec", ["merge-tokens{r=3}", "prune-tokens{keep=0.5,fuse=true}"])
def test_a_lossy_program_gives_the_shapes_that_it_notes(spec: str) -> None:
    """Run every node for real at another batch: its shape must be the noted one."""
    program, _ = reduced("clip_vision", spec)
    inputs = (torch.randn(5, 3, 32, 32),)
    seen: dict[str, Any] = {}

    class Recorded(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    Recorded(program.module).run(*inputs)
    for found in program.nodes():
        val, real = found.meta.get("val"), seen[found.name]
        if isinstance(val, Tensor) and isinstance(real, Tensor):
            noted = [5 if not isinstance(size, int) else size for size in val.shape]
            assert list(real.shape) == noted, found.name
            assert real.dtype == val.dtype, found.name
