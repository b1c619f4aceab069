"""Inferring values: the rules agree with the operators, and what was inferred once is kept."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from effopt import infer as module
from effopt.axes import same_size
from effopt.capture import capture
from effopt.edit import Edit
from effopt.errors import VerificationError
from effopt.infer import fake_mode, infer
from effopt.program import Program
from effopt.shape_rules import RULES

aten = torch.ops.aten


class Takes(nn.Module):
    """Batches of 1-D to 4-D values and of numbers of another type."""

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(x + x for x in values)


INPUTS = (
    *(torch.randn(2, *shape) for shape in ((), (8,), (5, 8), (3, 5, 8))),
    *(torch.ones(2, 5, 8, dtype=dtype) for dtype in (torch.float16, torch.int64, torch.bool)),
)
WEIGHTS: tuple[Tensor | None, ...] = (
    None,
    *(torch.randn(*shape) for shape in ((8,), (6, 8), (6,), (8, 8), (2, 3, 8), (1,))),
    torch.randn(6, 8, dtype=torch.float16),
    torch.randn(8, dtype=torch.float16),
)
NORMALISED = ([8], [5, 8], [6])
RESHAPED = (
    *([-1], [-1, 8], [-1, 5, 8], [-1, 5, 2, 4], [-1, 1, 5, 8], [-1, 7], [-1, -1]),
    *((None, 40), (None, -1), (None, 2, -1), (None, 5, -1, 4), (None, 3, 7), (None, -1, -1)),
)
"""Sizes to view as; None stands for the batch."""


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Takes(), INPUTS)


def _arguments(target: Any, batch: Any) -> Iterator[tuple[Any, ...]]:
    """Return what comes behind the first argument."""
    if target is aten.linear.default:
        yield from itertools.product(WEIGHTS[1:], (None, WEIGHTS[1], WEIGHTS[3], WEIGHTS[-1]))
    elif target is aten.layer_norm.default:
        yield from itertools.product(NORMALISED, WEIGHTS[:3], WEIGHTS[:3])
    elif target is aten.rms_norm.default:
        yield from itertools.product(NORMALISED, WEIGHTS)
    elif target in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor):
        yield from ((other,) for other in (2, 0.5, True, *WEIGHTS[1:], torch.randn(5, 8)))
    elif target is aten.transpose.int:
        yield from itertools.product((0, 1, -1, 4), (0, 2, -2))
    elif target is aten.unsqueeze.default:
        yield from ((dim,) for dim in (0, 1, -1, -2, 3, -5))
    elif target in (aten.view.default, aten.reshape.default):
        yield from (([batch if n is None else n for n in shape],) for shape in RESHAPED)
    else:
        yield ()


def _called(program: Program, target: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return what the rule says of a call, and what the operator itself says (None: an error)."""
    mode = fake_mode(program)
    with mode:
        given = [mode.from_tensor(x) if isinstance(x, Tensor) and not _fake(x) else x for x in args]
    said = RULES[target](*given)
    try:
        with torch.no_grad(), mode:
            return said, target(*given)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return said, None


def _fake(x: Tensor) -> bool:
    return hasattr(x, "fake_mode")


@pytest.mark.parametrize("target", RULES, ids=str)
def test_a_rule_says_what_the_operator_says_or_nothing(program: Program, target: Any) -> None:
    spoken = 0
    for node in program.inputs():
        for rest in _arguments(target, node.meta["val"].shape[0]):
            said, made = _called(program, target, (node.meta["val"], *rest))
            if said is None:
                continue
            spoken += 1
            assert made is not None, f"{target} takes no {node.meta['val'].shape}, {rest}"
            for asked, held in zip(said, (made.shape, made.stride()), strict=True):
                assert all(map(same_size, asked, held))
                assert len(asked) == made.ndim
            assert made.dtype == node.meta["val"].dtype
    assert spoken >= 3


class Counted:
    """How often operators ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        run = module._run

        def counting(*args: Any) -> Any:
            self.runs += 1
            return run(*args)

        monkeypatch.setattr(module, "_run", counting)


def _call(program: Program, target: Any, *args: Any) -> Node:
    graph = program.module.graph
    with graph.inserting_before(program.output()):
        return graph.call_function(target, args)


def test_what_is_inferred_twice_is_the_same_and_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(Takes(), INPUTS).fork()
    counted = Counted(monkeypatch)
    x = program.inputs()[2]
    first, second = (infer(_call(program, aten.cumsum.default, x, 1), program) for _ in range(2))
    assert counted.runs == 1
    for found in (torch.Tensor.stride, lambda x: (x.shape, x.dtype)):
        assert found(first) == found(second)
    infer(_call(program, aten.cumsum.default, x, 2), program)
    infer(_call(program, aten.cumsum.default, program.inputs()[4], 1), program)
    assert counted.runs == 3, "another dimension or dtype is another question"


@pytest.mark.parametrize(
    ("one", "other"), [(1, 1.0), (1, True), (0.0, -0.0)], ids=["float", "bool", "signed zero"]
)
def test_equal_numbers_of_another_kind_are_other_arguments(one: Any, other: Any) -> None:
    program = capture(Takes(), INPUTS).fork()
    x = program.inputs()[5]
    made = [infer(_call(program, aten.mul.Tensor, x, number), program) for number in (one, other)]
    want = [(torch.ones(1, dtype=torch.int64) * number).dtype for number in (one, other)]
    assert [value.dtype for value in made] == want


def test_an_operator_that_narrows_the_batch_is_refused_each_time() -> None:
    program = capture(Takes(), INPUTS).fork()
    x = program.inputs()[2]
    for _ in range(3):
        with pytest.raises(VerificationError, match="fixes a size that must stay free"):
            infer(_call(program, aten.reshape.default, x, [2, 40]), program)
    assert not isinstance(x.meta["val"].shape[0], int)


def test_an_edit_infers_by_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(Takes(), INPUTS).fork()
    counted, edit = Counted(monkeypatch), Edit(program, "test")
    with edit.before(program.output()):
        made = edit.call(aten.gelu.default, program.inputs()[2])
    assert counted.runs == 0
    assert made.meta["val"].shape[1:] == (5, 8)
