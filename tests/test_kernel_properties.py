"""What holds for every input of the kernels, by hypothesis; both forms of each kernel."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effopt.kernel import kernel
from tests.eager import groups_of

FORMS = ("op", "lowering")
few = settings(max_examples=20, deadline=None)


@dataclass(frozen=True)
class Case:
    """A batch to merge: protected ends, r that fits, sizes (0 for padding at the end)."""

    metric: Tensor
    x: Tensor
    size: Tensor
    r: int
    prefix: int
    suffix: int
    ordered: bool


@st.composite
def cases(draw: st.DrawFn, padded: bool = True) -> Case:
    b, n = draw(st.integers(1, 4)), draw(st.integers(4, 24))
    prefix, suffix = draw(st.integers(0, 2)), draw(st.integers(0, 1))
    free = range(prefix, n - suffix)
    even = sum(place % 2 == 0 for place in free)
    most = min(len(free) // 2, even)
    r, seed = draw(st.integers(0, max(most, 0))), draw(st.integers(0, 10**6))
    made = torch.Generator().manual_seed(seed)
    size = torch.randint(1, 5, (b, n), generator=made).float()
    if padded and draw(st.booleans()):
        ends = torch.randint(max(prefix, 1), n + 1, (b, 1), generator=made)
        size = size.masked_fill(torch.arange(n) >= ends, 0)
    metric = torch.randn(b, n, 4, generator=made)
    if draw(st.booleans()):
        metric = metric.round()  # many ties, and zero keys
    x = torch.randn(b, n, draw(st.integers(1, 8)), generator=made)
    return Case(metric, x, size, r, prefix, suffix, draw(st.booleans()))


def matched(form: str, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    keep = case.metric.shape[1] - case.r
    ends = (case.prefix, case.suffix)
    found: tuple[Tensor, Tensor, Tensor] = getattr(kernel("match_tokens"), form)(
        case.metric, case.size, case.r, keep, *ends, case.ordered
    )
    return found


@pytest.mark.parametrize("form", FORMS)
@few
@given(case=cases())
def test_places_are_unique_in_range_and_cover_all(form: str, case: Case) -> None:
    kept, source, target = matched(form, case)
    n = case.metric.shape[1]
    for row in range(len(kept)):
        held, gone = kept[row].tolist(), source[row].tolist()
        assert sorted(held + gone) == list(range(n))
        assert all(place % 2 == 0 for place in gone)
        assert set(target[row].tolist()) <= {place for place in held if place % 2 == 1}
        ends = {*range(case.prefix), *range(n - case.suffix, n)}
        assert not ends & {*gone, *target[row].tolist()}
        if case.ordered:
            assert held == sorted(held)


@pytest.mark.parametrize("form", FORMS)
@few
@given(case=cases())
def test_sizes_and_weighted_sums_are_conserved(form: str, case: Case) -> None:
    kept, source, target = matched(form, case)
    y, size = getattr(kernel("merge_tokens"), form)(case.x, case.size, kept, source, target)
    assert torch.equal(size.sum(1), case.size.sum(1)), "integers in float32 add up exactly"
    want = (case.x * case.size[..., None]).sum(1)
    torch.testing.assert_close((y * size[..., None]).sum(1), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@few
@given(case=cases())
def test_a_merged_value_lies_between_those_of_its_group(form: str, case: Case) -> None:
    kept, source, target = matched(form, case)
    y, _ = getattr(kernel("merge_tokens"), form)(case.x, case.size, kept, source, target)
    home = getattr(kernel("group_tokens"), form)(case.x, kept, source, target)
    assert home.min() >= 0
    assert home.max() < kept.shape[1]
    for row in range(len(y)):
        for spot in range(y.shape[1]):
            group = case.x[row][(home[row] == spot) & (case.size[row] > 0)]
            if len(group):
                assert (y[row, spot] <= group.amax(0) + 1e-5).all()
                assert (y[row, spot] >= group.amin(0) - 1e-5).all()


@pytest.mark.parametrize("form", FORMS)
@few
@given(case=cases())
def test_protected_tokens_stay_as_they_are_at_a_fixed_place(form: str, case: Case) -> None:
    case.size[:, : case.prefix] = 1
    case.size[:, case.size.shape[1] - case.suffix :] = 1
    kept, source, target = matched(form, case)
    y, size = getattr(kernel("merge_tokens"), form)(case.x, case.size, kept, source, target)
    n, k, front, back = case.x.shape[1], kept.shape[1], case.prefix, case.suffix
    assert torch.equal(y[:, :front], case.x[:, :front])
    assert torch.equal(y[:, k - back :], case.x[:, n - back :])
    assert (size[:, :front] == 1).all()
    assert (size[:, k - back :] == 1).all()


@few
@given(case=cases(padded=False))
def test_groups_are_those_of_the_oracle(case: Case) -> None:
    """On keys that are equal or at right angles: scores are exact, and ties are many.

    The standard form leaves ties to TopK, which takes the lower index in ONNX, not in torch.
    """
    metric = torch.nn.functional.one_hot(case.metric[..., 0].abs().long() % 3, 3).float()
    tied = Case(metric, case.x, case.size, case.r, case.prefix, case.suffix, case.ordered)
    kept, source, target = matched("op", tied)
    for row in range(len(kept)):
        groups = {place: [place] for place in kept[row].tolist()}
        for gone, onto in zip(source[row].tolist(), target[row].tolist(), strict=True):
            groups[onto].append(gone)
        ends = (case.prefix, case.suffix)
        want = groups_of(metric[row], case.size[row], case.r, ends, case.ordered)
        assert [sorted(group) for group in groups.values()] == [sorted(group) for group in want]


@pytest.mark.parametrize("form", FORMS)
@few
@given(case=cases())
def test_a_row_alone_is_the_row_of_the_batch(form: str, case: Case) -> None:
    together = matched(form, case)
    for row in range(len(case.x)):
        one = slice(row, row + 1)
        ends = (case.prefix, case.suffix)
        single = Case(case.metric[one], case.x, case.size[one], case.r, *ends, case.ordered)
        for a, b in zip(matched(form, single), together, strict=True):
            assert torch.equal(a, b[one])


@pytest.mark.parametrize("form", FORMS)
@few
@given(st.integers(1, 4), st.integers(3, 24), st.integers(0, 2), st.integers(0, 1), st.data())
def test_selected_places_ascend_and_hold_the_best(
    form: str, b: int, n: int, prefix: int, suffix: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(max(prefix + suffix, 1), n))
    seed = data.draw(st.integers(0, 10**6))
    score = torch.rand(b, n, generator=torch.Generator().manual_seed(seed))
    if form == "op" and data.draw(st.booleans()):
        score = (score * 3).floor()  # ties: TopK takes the lower index in ONNX, not in torch
    kept = getattr(kernel("select_tokens"), form)(score, keep, prefix, suffix)
    ends = [*range(prefix), *range(n - suffix, n)]
    for row in range(b):
        others = [place for place in range(n) if place not in ends]
        others.sort(key=lambda place: (-score[row, place].item(), place))
        assert kept[row].tolist() == sorted(ends + others[: keep - len(ends)])


@pytest.mark.parametrize("form", FORMS)
@few
@given(st.integers(1, 4), st.integers(2, 24), st.integers(1, 6), st.data())
def test_what_is_gathered_and_scattered_comes_back(
    form: str, b: int, n: int, c: int, data: st.DataObject
) -> None:
    k, seed = data.draw(st.integers(1, n)), data.draw(st.integers(0, 10**6))
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(b, n, c, generator=draw)
    kept = torch.stack([torch.randperm(n, generator=draw)[:k] for _ in range(b)])
    rows = getattr(kernel("gather_tokens"), form)(x, kept, 1)
    base = torch.zeros(b, n, c)
    back = getattr(kernel("scatter_tokens"), form)(base, rows, kept)
    held = torch.zeros(b, n, dtype=torch.bool).scatter(1, kept, True)
    assert torch.equal(back[held], x[held])
    assert (back[~held] == 0).all()
    assert (base == 0).all(), "the base is not written into"
