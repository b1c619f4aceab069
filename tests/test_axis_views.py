"""The arithmetic of axes: joined, cut and made one, by their factors and never by their sizes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effopt.axes import Axis, AxisError, Dims, leaves, same_sizes, size_of, unify
from effopt.axis_views import regroup
from effopt.capture import capture
from effopt.program import shape
from tests.traced import Wrapped


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
