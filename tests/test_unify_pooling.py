"""unify-layers: every spelling of an average, of one token and of halves is mean, select, slice."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.layer_forms import FORM, C, Model, N, Spelling, becomes, check, stays

MEAN: tuple[Spelling, ...] = (
    lambda s, x: x.sum(1) / N,
    lambda s, x: x.sum(1) * (1 / N),
    lambda s, x: x.mean([1], keepdim=True).squeeze(1),
    lambda s, x: x.mean(1, keepdim=True)[:, 0],
    lambda s, x: functional.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1),
    lambda s, x: functional.adaptive_avg_pool1d(x.transpose(1, 2), 1).transpose(1, 2)[:, 0],
)
FIRST: tuple[Spelling, ...] = (
    lambda s, x: x[:, 0:1].squeeze(1),
    lambda s, x: x.narrow(1, 0, 1).reshape(-1, C),
    lambda s, x: torch.index_select(x, 1, torch.tensor([0])).squeeze(1),
    lambda s, x: x[:, [0]].flatten(1),
    lambda s, x: x[:, :1][:, 0],
    lambda s, x: x.unbind(1)[0],
)


@pytest.mark.parametrize("spelling", MEAN)
def test_mean_pooling(spelling: Spelling) -> None:
    done = check(spelling).run(FORM).numbers(4).idempotent(FORM)
    (call,) = [n for n in done.program.nodes() if n.op == "call_function"]
    assert (call.target, list(call.args[1])) == (torch.ops.aten.mean.dim, [1])  # type: ignore[arg-type]


@pytest.mark.parametrize("spelling", FIRST)
def test_picking_one_token(spelling: Spelling) -> None:
    done = check(spelling).run(FORM).numbers(1).idempotent(FORM)
    (call,) = [n for n in done.program.nodes() if n.op == "call_function"]
    assert (call.target, call.args[1:]) == (torch.ops.aten.select.int, (1, 0))


def test_the_last_token_is_picked_from_the_end() -> None:
    becomes(lambda s, x: x[:, -1:].squeeze(1), f"select[batch, {C}] = select(x, 1, -1)")


def test_pooling_a_dynamic_length() -> None:
    for spelling in (lambda s, x: x.sum(1) / x.shape[1], lambda s, x: x[:, -1:].squeeze(1)):
        done = check(spelling, dynamic=("batch", "length")).run(FORM).numbers(4)
        done.numbers(4, inputs=(torch.randn(3, 11, C),)).idempotent(FORM)
        targets = {n.target for n in done.program.nodes() if n.op == "call_function"}
        assert targets <= {torch.ops.aten.mean.dim, torch.ops.aten.select.int}


def test_pooling_a_grid() -> None:
    def pool(s: Model, x: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(x.reshape(-1, N, 2, 4), 1).flatten(1)

    (
        check(pool)
        .run(FORM)
        .after(
            f"""
            x[batch, {N}, {C}]
            reshape[batch, {N}, 2, 4] = reshape(x, [-1, {N}, 2, 4])
            mean_1[batch, {N}] = mean(reshape, [2, 3])
            return mean_1
            """
        )
        .numbers(4)
        .idempotent(FORM)
    )


def _rotated(pieces: Callable[[Tensor], tuple[Tensor, ...]]) -> Spelling:
    def rotated(s: Model, x: Tensor) -> Tensor:
        first, second = pieces(x)
        return torch.cat((-second, first), -1)

    return rotated


@pytest.mark.parametrize(
    "pieces",
    [
        lambda x: x.chunk(2, -1),
        lambda x: x.split(C // 2, -1),
        lambda x: torch.split(x, [4, 4], 2),
        lambda x: x.tensor_split(2, -1),
        lambda x: (x[..., : C // 2], x[..., C // 2 :]),
        lambda x: (x.narrow(-1, 0, 4), x.narrow(-1, -4, 4)),
    ],
)
def test_halves_are_slices(pieces: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    done = check(_rotated(pieces)).run(FORM).numbers(1).idempotent(FORM)
    calls = [n for n in done.program.nodes() if n.op == "call_function"]
    slices = [n for n in calls if n.target is torch.ops.aten.slice.Tensor]
    assert sorted(n.args[2] % C for n in slices) == [0, 4]  # type: ignore[operator, type-var]
    assert len(calls) == 4


def test_rotating_halves_by_chunk() -> None:
    (
        check(_rotated(lambda x: x.chunk(2, -1)))
        .run(FORM)
        .after(
            f"""
            x[batch, {N}, {C}]
            slice_1[batch, {N}, 4] = slice(x, 2, 0, 4)
            slice_2[batch, {N}, 4] = slice(x, 2, 4, 9223372036854775807)
            neg[batch, {N}, 4] = neg(slice_2)
            cat[batch, {N}, {C}] = cat([neg, slice_1], -1)
            return cat
            """
        )
    )


def test_a_slice_that_may_be_clamped_is_no_select() -> None:
    def early(s: Model, x: Tensor) -> Tensor:
        return x[:, -N - 2 : 1].squeeze(1)

    stays(early)
