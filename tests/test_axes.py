"""Axes: what the rules make of small graphs; identities, never sizes; conflicts are explained."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from effopt.axes import (
    Axis,
    AxisError,
    AxisMap,
    Dims,
    find_axes,
    leaves,
    same_sizes,
    size_of,
    unify,
)
from effopt.axes import show as shown
from effopt.axis_rules import argument
from effopt.axis_views import regroup
from effopt.capture import capture
from effopt.program import Program, shape


class Wrapped(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.function(x) if y is None else self.function(x, y)


def traced(function: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[Program, AxisMap]:
    inputs = tuple(torch.randn(shape) for shape in shapes)
    program = capture(Wrapped(function), inputs)
    return program, program.get(find_axes)


def dims(function: Callable[..., Any], *shapes: tuple[int, ...]) -> list[list[str]]:
    """Return the dims of the inputs and of the outputs, as text."""
    program, axes = traced(function, *shapes)
    assert not axes.unknown
    outputs = [arg for arg in program.output().args[0] if isinstance(arg, Node)]  # type: ignore[union-attr]
    return [_text(axes.of(node)) for node in (*program.inputs(), *outputs)]


def _text(found: Dims) -> list[str]:
    return [shown(dim) for dim in found]


def axis(name: str, size: int) -> Axis:
    return Axis(name, size)


def test_a_view_joins_and_cuts_batch_and_heads() -> None:
    b, n, h, d = axis("b", 2), axis("n", 5), axis("h", 3), axis("d", 4)
    joined = regroup(((b,), (n,), (h,), (d,)), (2, 5, 12), "view")
    assert joined == ((b,), (n,), (h, d))
    assert regroup(joined, (10, 3, 4), "view") == ((b, n), (h,), (d,))
    assert regroup(joined, (2, 1, 5, 12), "view") == ((b,), (), (n,), (h, d))


def test_a_whole_axis_is_cut_into_the_same_two_every_time() -> None:
    c = axis("c", 12)
    first = regroup(((c,),), (3, 4), "view")
    second = regroup(((c,),), (3, 4), "view")
    assert leaves(first[0]) == leaves(second[0])
    assert leaves((c,)) == (*first[0], *first[1])


def test_a_cut_in_the_middle_of_a_factor_is_refused() -> None:
    h, d = axis("h", 3), axis("d", 4)
    with pytest.raises(AxisError, match=r"view: .* is cut in the middle"):
        regroup(((h,), (d,)), (2, 6), "view")


def test_different_factors_of_one_size_do_not_become_one() -> None:
    b, h, n = axis("b", 4), axis("h", 4), axis("n", 4)
    assert len({b, h, n}) == 3
    assert regroup(((b,), (h,), (n,)), (16, 4), "view") == ((b, h), (n,))


def test_a_product_unifies_with_a_whole_axis_by_cutting_it() -> None:
    c, h, d = axis("c", 12), axis("h", 3), axis("d", 4)
    unify((c,), (h, d))
    assert leaves((c,)) == (h, d)
    other = axis("o", 12)
    unify((other,), (c,))
    assert leaves((other,)) == (h, d)


def test_sizes_that_do_not_match_are_a_conflict_with_both_names() -> None:
    with pytest.raises(AxisError, match="left of 5 does not fit right of 7"):
        unify((axis("left", 5),), (axis("right", 7),))


def test_before_and_after_a_reduction_never_meet() -> None:
    before = axis("n", 8)
    after = Axis("m", 8, reduced_from=(before,))
    with pytest.raises(AxisError, match="before and after a reduction meet"):
        unify((before,), (after,))


factors = st.lists(st.integers(2, 5), min_size=1, max_size=5)


@settings(max_examples=20, deadline=None)
@given(factors, st.data())
def test_regrouping_there_and_back_gives_the_same_dims(sizes: list[int], data: Any) -> None:
    before: Dims = tuple((axis(f"a{place}", size),) for place, size in enumerate(sizes))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sizes)))) | {len(sizes)})
    spans = zip([0, *cuts], cuts, strict=False)
    groups = [size_of([dim[0] for dim in before[start:stop]]) for start, stop in spans]
    joined = regroup(before, groups, "join")
    assert [size_of(dim) for dim in joined] == groups
    assert regroup(joined, sizes, "cut") == before


def test_sizes_are_the_same_if_they_are_for_every_batch() -> None:
    program = capture(Wrapped(lambda x: x + 1), torch.randn(3, 4), dynamic=("batch",))
    (x,) = program.inputs()
    assert same_sizes(shape(x), shape(x))
    assert not same_sizes(shape(x), (3, 4))
    assert not same_sizes((3, 4), (3, 4, 1))
    assert same_sizes((), ())


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
    function, shapes, want = CASES[case]
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


def _self_attention(x: Tensor) -> Tensor:
    h = x.unflatten(2, (5, 5)).transpose(1, 2)
    y = scaled_dot_product_attention(h, h, h).transpose(1, 2).flatten(2)
    return x + y


def test_equal_sizes_are_not_equal_axes() -> None:
    """Five tokens, five heads, heads five wide, batch five, and an equal second sequence."""
    program, axes = traced(
        lambda x, y: (_self_attention(x), _self_attention(y)), (5, 5, 25), (5, 5, 25)
    )
    assert not axes.unknown
    for node in program.inputs():
        batch, tokens, channels = axes.of(node)
        heads, width = channels
        assert len({*batch, *tokens, heads, width}) == 4
    first, second = (axes.of(node)[1] for node in program.inputs())
    assert first != second, "two sequences of one length are two axes"


def test_cross_attention_keeps_two_axes_of_one_size() -> None:
    def cross(x: Tensor, y: Tensor) -> Tensor:
        q, k = x.unsqueeze(1), y.unsqueeze(1)
        return x + scaled_dot_product_attention(q, k, k).squeeze(1)

    program, axes = traced(cross, (3, 6, 8), (3, 6, 8))
    left, right = (axes.of(node) for node in program.inputs())
    assert left[0] == right[0]
    assert left[1] != right[1]
    assert left[2] == right[2]


def test_torch_cross_attention_is_understood() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    _, axes = traced(lambda x, y: layer(x, y, y)[0], (3, 6, 8), (3, 5, 8))
    assert not axes.unknown, list(axes.unknown.values())


def test_arguments_are_read_by_name() -> None:
    program, _ = traced(lambda x: x.mean(-1, keepdim=True), (4, 5))
    (mean,) = (node for node in program.nodes() if node.target is torch.ops.aten.mean.dim)
    names = ("dim", "keepdim", "dtype", "unknown")
    assert [argument(mean, name) for name in names] == [[-1], True, None, None]


def test_an_operator_without_a_rule_is_named() -> None:
    program, axes = traced(lambda x: x.logcumsumexp(1) + 1, (4, 5))
    assert {node.name: why for node, why in axes.unknown.items()} == {
        "logcumsumexp": "no axis rule for aten.logcumsumexp.default"
    }
    node = next(iter(axes.unknown))
    assert all(dim not in axes.of(program.inputs()[0]) for dim in axes.of(node))


def test_a_conflict_is_explained_at_the_operator_where_it_shows() -> None:
    program, axes = traced(lambda x: torch.relu(x).view(-1, 2, 6) + 1, (4, 3, 4))
    assert {node.name: why for node, why in axes.unknown.items()} == {
        "view": "view: x.1 of 3 is cut in the middle"
    }
    found = axes.of(program.inputs()[0])
    assert not set(found) & set(axes.of(next(iter(axes.unknown)))), "nothing is guessed"


def test_an_arange_becomes_the_axis_that_it_first_meets() -> None:
    program, axes = traced(lambda x: x + torch.arange(5.0), (4, 5))
    counted = next(node for node in program.nodes() if "arange" in node.name)
    assert axes.of(counted)[0] == axes.of(program.inputs()[0])[1]


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
    function, shapes, want = MORE[case]
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


def test_what_the_data_decides_is_unknown_with_a_reason() -> None:
    _, axes = traced(lambda x: x + torch.rand_like(x), (4, 5))
    assert list(axes.unknown.values()) == ["it is random"]


def test_windows_of_a_symbolic_batch_are_understood_there_and_back() -> None:
    """(B, 8, 6, C) -> (B * 4 * 3, 2 * 2, C) -> back: all with B a symbol."""

    def windows(x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        cut = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        flat = torch.relu(cut.reshape(-1, 4, c))
        back = flat.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        return back.reshape(b, h, w, c)

    program = capture(Wrapped(windows), (torch.randn(3, 8, 6, 5),), dynamic=("batch",))
    axes = program.get(find_axes)
    assert not axes.unknown, axes.unknown
    node = program.output().args[0][0]  # type: ignore[index]
    assert axes.of(node) == axes.of(program.inputs()[0])


def test_a_range_cut_by_a_view_elsewhere_is_remembered_by_its_factors() -> None:
    """The slice lost its part when its axis was cut: what read it seemed to hold no tokens."""
    program, axes = traced(lambda x: x[:, 2:].unflatten(1, (2, 3)), (4, 8, 6))
    node = program.output().args[0][0]  # type: ignore[index]
    (outer,), (inner,) = axes.of(node)[1:3]
    (cut,) = outer.cuts
    assert inner.cuts == (cut,)
    assert [(part.start, part.stop) for part in cut.parts] == [(2, 8)]
