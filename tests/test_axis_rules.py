"""What the rules make of the axes of each operator: carried through, new, or a part of another."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from effopt.axes import Dims, leaves
from effopt.axes import show as shown
from effopt.axis_rules import argument
from tests.traced import traced


def dims(function: Callable[..., Any], *shapes: tuple[int, ...]) -> list[list[str]]:
    """Return the dims of the inputs and of the outputs, as text."""
    program, axes = traced(function, *shapes)
    assert not axes.unknown
    outputs = [arg for arg in program.output().args[0] if isinstance(arg, Node)]  # type: ignore[union-attr]
    return [_text(axes.of(node)) for node in (*program.inputs(), *outputs)]


def _text(found: Dims) -> list[str]:
    return [shown(dim) for dim in found]


def carries(function: Callable[..., Any], shapes: list[tuple[int, ...]], want: str) -> None:
    """Expect the dims `want`, in which x0 is the first of input x."""
    *inputs, output = dims(function, *shapes)
    names = {
        f"{letter}{place}": name
        for letter, found in zip("xy", inputs, strict=False)
        for place, name in enumerate(found)
    }
    expected = [
        "·".join(names.get(word, word) for word in part.split("·")) for part in want.split()
    ]
    assert output == expected


CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], str]] = {
    "elementwise": (lambda x, y: x + y, [(4, 5, 6), (5, 6)], "x0 y0 y1"),
    "broadcast-of-one": (lambda x, y: x * y, [(4, 5, 6), (4, 5, 1)], "x0 x1 x2"),
    "transpose": (lambda x: x.transpose(1, 2), [(4, 5, 6)], "x0 x2 x1"),
    "permute": (lambda x: x.permute(2, 0, 1), [(4, 5, 6)], "x2 x0 x1"),
    "flatten": (lambda x: x.flatten(1), [(4, 5, 6)], "x0 x1·x2"),
    "there-and-back": (lambda x: x.flatten(1).view(-1, 5, 6), [(4, 5, 6)], "x0 x1 x2"),
    "unsqueeze": (lambda x: x.unsqueeze(1), [(4, 5)], "x0 1 x1"),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1), [(4, 5)], "x0 x1"),
    "product": (lambda x, y: x @ y, [(4, 5, 6), (4, 6, 7)], "x0 x1 y2"),
    "sum": (lambda x: x.sum(1), [(4, 5, 6)], "x0 x2"),
    "kept-mean": (lambda x: x.mean(1, keepdim=True), [(4, 5, 6)], "x0 1 x2"),
    "select": (lambda x: x[:, 0], [(4, 5, 6)], "x0 x2"),
    "softmax": (lambda x: x.softmax(-1), [(4, 5, 6)], "x0 x1 x2"),
    "whole-slice": (lambda x: x[:, :], [(4, 5, 6)], "x0 x1 x2"),
}


@pytest.mark.parametrize("case", CASES)
def test_rules_carry_identities_through(case: str) -> None:
    carries(*CASES[case])


MORE: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], str]] = {
    "repeat": (lambda x: x.repeat(1, 2, 1).unflatten(1, (2, 5)).sum(1), [(4, 5, 6)], "x0 x1 x2"),
    "tile": (lambda x: x.tile(2).unflatten(1, (2, 5)).sum(1), [(4, 5)], "x0 x1"),
    "copies": (
        lambda x: x.repeat_interleave(3, 1).unflatten(1, (5, 3)).sum(2),
        [(4, 5, 6)],
        "x0 x1 x2",
    ),
    "channel-norm": (
        lambda x: F.batch_norm(x, torch.zeros(5), torch.ones(5)),
        [(4, 5, 6)],
        "x0 x1 x2",
    ),
    "movedim": (lambda x: x.movedim(0, -1), [(4, 5, 6)], "x1 x2 x0"),
    "swapaxes": (lambda x: x.swapaxes(0, 2), [(4, 5, 6)], "x2 x1 x0"),
    "turned": (lambda x: x.mT, [(4, 5, 6)], "x0 x2 x1"),
    "expand-as": (lambda x, y: x.expand_as(y), [(4, 5, 1), (4, 5, 6)], "x0 x1 y2"),
    "vector": (lambda x, y: x @ y, [(4, 5, 6), (6,)], "x0 x1"),
    "row": (lambda x, y: x[0] @ y, [(4, 6), (4, 6, 7)], "y0 y2"),
    "added-product": (
        lambda x, y: torch.baddbmm(torch.zeros(1), x, y),
        [(4, 5, 6), (4, 6, 7)],
        "x0 x1 y2",
    ),
    "einsum": (lambda x, y: torch.einsum("bij,kj->bik", x, y), [(4, 5, 6), (7, 6)], "x0 x1 y0"),
    "einsum-of-the-rest": (
        lambda x, y: torch.einsum("...i,ij->...j", x, y),
        [(4, 5, 6), (6, 7)],
        "x0 x1 y1",
    ),
    "einsum-without-arrow": (
        lambda x, y: torch.einsum("bn,nc", x, y),
        [(4, 5), (5, 6)],
        "x0 y1",
    ),
    "distance": (lambda x, y: torch.cdist(x, y), [(4, 5, 6), (4, 7, 6)], "x0 x1 y1"),
    "counted": (
        lambda x: x[torch.arange(x.shape[0]).unsqueeze(1), torch.arange(5)],
        [(4, 5, 6)],
        "x0 x1 x2",
    ),
    "table": (lambda x, y: x[y.long()], [(4, 6), (3, 5)], "y0 y1 x1"),
    "index-in-front": (
        lambda x, y: x[y[:, 0].long(), :, y[:, 1].long()],
        [(4, 5, 6), (3, 2)],
        "y0 x1",
    ),
    "index-in-place": (
        lambda x, y: x[:, y.long(), y.long()],
        [(4, 5, 6), (3, 2)],
        "x0 y0 y1",
    ),
    "one-place-convolution": (
        lambda x: F.conv1d(x, torch.ones(6, 5, 1)).sum(1),
        [(4, 5, 7)],
        "x0 x2",
    ),
    "pooled": (lambda x: F.avg_pool1d(x, 2).sum(-1), [(4, 5, 6)], "x0 x1"),
    "pixels": (
        lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
        [(3, 8, 5, 6)],
        "x0 x1 x2 x3",
    ),
    "complex": (
        lambda x: torch.view_as_real(torch.view_as_complex(x)).sum(-1),
        [(4, 5, 2)],
        "x0 x1",
    ),
    "overwritten": (
        lambda x: x.slice_scatter(x[:, 3:] * 0, 1, 0, 2),
        [(4, 5, 6)],
        "x0 x1 x2",
    ),
    "gated": (lambda x: F.glu(x).sum(-1), [(4, 5, 6)], "x0 x1"),
    "norm": (lambda x: x.norm(dim=1), [(4, 5, 6)], "x0 x2"),
    "variance": (lambda x: torch.var_mean(x, 1)[1], [(4, 5, 6)], "x0 x2"),
    "extreme": (lambda x: x.max(1, keepdim=True)[0], [(4, 5, 6)], "x0 1 x2"),
    "cache": (lambda x: torch.cat([torch.zeros(0), x], 1), [(4, 5, 6)], "x0 x1 x2"),
    "triangle": (lambda x: x.tril(), [(5, 6)], "x0 x1"),
}


@pytest.mark.parametrize("case", MORE)
def test_more_rules_carry_identities_through(case: str) -> None:
    carries(*MORE[case])


NEW: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "sort": lambda x: x.sort(1)[0],
    "sorted places": lambda x: x.argsort(1),
    "fft": lambda x: torch.fft.fft(x, dim=1),
    "index": lambda x: x[:, torch.tensor([4, 3, 2, 1, 0])],
    "index-select": lambda x: x.index_select(1, torch.tensor([4, 3, 2, 1, 0])),
    "gated": lambda x: F.glu(torch.cat([x, x], 1), 1),
    "count down": lambda x: x[:, torch.arange(4, -1, -1)],
    "crop and fill": lambda x: F.pad(x, (0, 0, 1, -1)),
    "wide convolution": lambda x: F.conv1d(x.mT, torch.ones(6, 6, 3), padding=1).mT,
}


@pytest.mark.parametrize("case", NEW)
def test_a_dimension_of_the_same_size_in_another_order_is_new(case: str) -> None:
    program, axes = traced(NEW[case], (4, 5, 6))
    assert not axes.unknown
    node = program.output().args[0][0]  # type: ignore[index]
    before, after = axes.of(program.inputs()[0]), axes.of(node)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_slice_is_a_new_axis_that_knows_its_part() -> None:
    program, axes = traced(lambda x: x[:, 2:5], (4, 6, 3))
    node = program.output().args[0][0]  # type: ignore[index]
    (cut,) = axes.of(node)[1]
    (whole,) = axes.of(program.inputs()[0])[1]
    assert cut is not whole
    (part,) = cut.parts
    assert (leaves(part.whole), part.start, part.stop) == ((whole,), 2, 5)


def test_joined_dimensions_have_segments() -> None:
    program, axes = traced(lambda x, y: torch.cat([x, y], 1), (4, 2, 3), (4, 5, 3))
    node = program.output().args[0][0]  # type: ignore[index]
    (joined,) = axes.of(node)[1]
    spans = [(part.start, part.stop, part.learned) for part in joined.segments]
    assert spans == [(0, 2, False), (2, 7, False)]


def test_padding_makes_segments_and_does_not_become_what_it_pads() -> None:
    program, axes = traced(lambda x: F.pad(x, (0, 0, 1, 2)), (4, 5, 6))
    (padded,) = axes.of(program.output().args[0][0])[1]  # type: ignore[index]
    spans = [(part.start, part.stop, part.learned) for part in padded.segments]
    assert spans == [(0, 1, True), (1, 6, False), (6, 8, True)]
    assert (padded,) != axes.of(program.inputs()[0])[1]


def test_a_cropped_dimension_is_a_part() -> None:
    program, axes = traced(lambda x: F.pad(x, (0, 0, -1, -2)), (4, 5, 6))
    (cropped,) = axes.of(program.output().args[0][0])[1]  # type: ignore[index]
    (part,) = cropped.parts
    assert (part.start, part.stop) == (1, 3)


def test_reflected_places_are_no_segments() -> None:
    program, axes = traced(lambda x: F.pad(x, (1, 1), mode="reflect"), (4, 5, 6))
    (padded,) = axes.of(program.output().args[0][0])[2]  # type: ignore[index]
    assert padded.segments == ()


def test_a_range_cut_by_a_view_elsewhere_is_remembered_by_its_factors() -> None:
    """The slice lost its part when its axis was cut: what read it seemed to hold no tokens."""
    program, axes = traced(lambda x: x[:, 2:].unflatten(1, (2, 3)), (4, 8, 6))
    node = program.output().args[0][0]  # type: ignore[index]
    (outer,), (inner,) = axes.of(node)[1:3]
    (cut,) = outer.cuts
    assert inner.cuts == (cut,)
    assert [(part.start, part.stop) for part in cut.parts] == [(2, 8)]


def test_arguments_are_read_by_name() -> None:
    program, _ = traced(lambda x: x.mean(-1, keepdim=True), (4, 5))
    (mean,) = (node for node in program.nodes() if node.target is torch.ops.aten.mean.dim)
    names = ("dim", "keepdim", "dtype", "unknown")
    assert [argument(mean, name) for name in names] == [[-1], True, None, None]
