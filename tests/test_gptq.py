"""Rounding with error feedback: against plain loops, and what it promises."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from effopt.errors import UsageError
from effopt.passes.gptq import gptq
from effopt.passes.rounding import Grid, Rounded, round_weight

GRIDS = [Grid(4, 32, True), Grid(4, 32, False), Grid(3, 0, True), Grid(2, 64, False)]
all_grids = pytest.mark.parametrize("grid", GRIDS, ids=str)
orders = pytest.mark.parametrize("order", [False, True])

Matrix = NDArray[np.float64]


def layer(seed: int, rows: int = 20, columns: int = 64, tokens: int = 400) -> tuple[Tensor, ...]:
    """Draw correlated inputs [T, K], as hidden states are, and a weight [N, K]."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw) / columns**0.5
    common = torch.randn(tokens, 4, generator=draw) @ torch.randn(4, columns, generator=draw)
    x = torch.randn(tokens, columns, generator=draw) @ mix + common
    return x, torch.randn(rows, columns, generator=draw) / 8


def squares(x: Tensor) -> Tensor:
    return 2 / len(x) * x.T @ x


def loss(x: Tensor, weight: Tensor, made: Rounded) -> float:
    return float((x @ (made.dequantized() - weight).T).square().mean())


def same(one: Rounded, other: Rounded) -> None:
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)
    assert (one.zero is None) == (other.zero is None)
    assert one.zero is None or other.zero is None or torch.equal(one.zero, other.zero)
    assert (one.bits, one.group) == (other.bits, other.group)


# --- the independent version ------------------------------------------------------------------


def block_steps(block: Matrix, grid: Grid) -> tuple[float, float]:
    """Return scale and zero point of one block of one row."""
    if grid.symmetric:
        return max(float(np.abs(block).max()), 1e-8) / (2 ** (grid.bits - 1) - 1), 0
    low, high, top = min(0.0, *block), max(0.0, *block), 2**grid.bits - 1
    step = (high - low) / top
    return step, min(max(round(-low / step), 0), top)


def brain_surgeon(
    weight: Matrix, hessian: Matrix, grid: Grid, turns: list[int], fixed: bool
) -> tuple[Matrix, Matrix]:
    """Round column by column, inverting the Hessian of what is left each time, in float64.

    `turns` are the columns in order; with `fixed`, steps come from the weights as given. Returns
    the codes, and by row how near a weight came to a tie, in codes.
    """
    size = grid.block(weight.shape[1])
    assert size is not None
    low = -(2 ** (grid.bits - 1)) if grid.symmetric else 0
    damped = hessian + 0.01 * hessian.diagonal().mean() * np.eye(len(hessian))
    codes, margin = np.empty_like(weight), np.full(len(weight), np.inf)
    for n, row in enumerate(weight):
        work, steps = row.copy(), dict[int, tuple[float, float]]()
        for at, column in enumerate(turns):
            home, left = column // size, turns[at:]
            if home not in steps:
                block = slice(home * size, (home + 1) * size)
                steps[home] = block_steps((row if fixed else work)[block], grid)
            step, zero = steps[home]
            exact = work[column] / step
            margin[n] = min(margin[n], abs(abs(exact - np.floor(exact)) - 0.5))
            code = min(max(round(exact) + zero, low), low + 2**grid.bits - 1)
            inverse = np.linalg.inv(damped[np.ix_(left, left)])
            error = (work[column] - (code - zero) * step) / inverse[0, 0]
            work[left] -= error * inverse[:, 0]
            codes[n, column] = code
    return codes, margin


@all_grids
@orders
def test_codes_are_those_of_plain_loops(grid: Grid, order: bool) -> None:
    x, weight = layer(1, rows=12)
    hessian = squares(x)
    got = gptq(weight, hessian, grid, block=16, order=order)
    diagonal = hessian.diagonal().tolist()
    turns = sorted(range(64), key=lambda k: -diagonal[k]) if order else list(range(64))
    double = hessian.double().numpy()
    codes, margin = brain_surgeon(weight.double().numpy(), double, grid, turns, order)
    # float32 against float64: weights fed forward differ by 1e-6 of their size after 64 columns,
    # so rows whose weights all keep 1e-4 of a code from a tie must agree in every code.
    clear = margin > 1e-4
    assert clear.sum() >= 9  # measured: 11 or all 12
    assert np.array_equal(got.codes.double().numpy()[clear], codes[clear])


# --- promises ---------------------------------------------------------------------------------


@all_grids
@orders
@pytest.mark.parametrize("seed", range(10, 14))
def test_outputs_change_less_than_by_rounding(grid: Grid, order: bool, seed: int) -> None:
    x, weight = layer(seed, rows=48, columns=128)
    plain = loss(x, weight, round_weight(weight, grid))
    # Measured: 0.11 to 0.19 of the loss of rounding over these layers.
    assert loss(x, weight, gptq(weight, squares(x), grid, order=order)) < 0.3 * plain


@all_grids
@orders
@pytest.mark.parametrize("factor", [1.0, 7.0])
def test_inputs_without_correlation_leave_rounding(grid: Grid, order: bool, factor: float) -> None:
    _, weight = layer(20)
    same(gptq(weight, factor * torch.eye(64), grid, order=order), round_weight(weight, grid))
    same(gptq(weight, torch.zeros(64, 64), grid, order=order), round_weight(weight, grid))


@all_grids
@orders
def test_blocks_change_the_speed_only(grid: Grid, order: bool) -> None:
    x, weight = layer(21)
    one, other = (
        gptq(weight, squares(x), grid, block=block, order=order).dequantized() for block in (1, 128)
    )
    # Sums in another order: the last digits of float32 may turn a code. Measured: none turns.
    assert (one - other).abs().gt(1e-5).float().mean() < 0.01


def test_any_multiple_of_the_hessian_does() -> None:
    x, weight = layer(22)
    expected = gptq(weight, squares(x), GRIDS[0])
    for factor in (2.0**-40, 2.0**40):
        same(gptq(weight, factor * squares(x), GRIDS[0]), expected)


@all_grids
@orders
def test_channels_that_no_input_used_are_rounded_to_nearest(grid: Grid, order: bool) -> None:
    x, weight = layer(23)
    x[:, [0, 5, 40]] = 0
    got = gptq(weight, squares(x), grid, order=order)
    error = (got.dequantized() - weight)[:, [0, 5, 40]].abs()
    step = got.scale.repeat_interleave(got.group, 1)[:, [0, 5, 40]]
    # At the ends of an asymmetric block the rounded zero point costs another half step.
    assert (error <= step * (0.5 if grid.symmetric else 1) * (1 + 1e-5)).all()
    assert loss(x, weight, got) < 0.4 * loss(x, weight, round_weight(weight, grid))


@orders
def test_a_channel_without_input_needs_no_damping(order: bool) -> None:
    x, weight = layer(27)
    x[:, 7] = 0
    hessian = squares(x)
    used = hessian.clone()
    used[7, 7] = hessian.diagonal().max()
    got, apart = (gptq(weight, h, GRIDS[0], damp=0, order=order) for h in (hessian, used))
    assert torch.equal(got.codes, apart.codes)
    # The Hessians are normalized by different means, which turns the last digits of float32.
    torch.testing.assert_close(got.scale, apart.scale, rtol=1e-5, atol=0)


def test_with_order_steps_come_from_the_weights_as_given() -> None:
    x, weight = layer(24)
    got = gptq(weight, squares(x), GRIDS[0], order=True)
    assert torch.equal(got.scale, round_weight(weight, GRIDS[0]).scale)
    assert not torch.equal(gptq(weight, squares(x), GRIDS[0]).scale, got.scale)


@pytest.mark.parametrize("damp", [0, 0.01])
def test_fewer_inputs_than_channels(damp: float) -> None:
    x, weight = layer(25, tokens=20)
    got = gptq(weight, squares(x), GRIDS[0], damp=damp)
    assert torch.isfinite(got.dequantized()).all()
    assert loss(x, weight, got) < loss(x, weight, round_weight(weight, GRIDS[0]))


def test_damping_is_raised_where_it_is_not_enough() -> None:
    x, weight = layer(26)
    hessian = squares(x)
    low = torch.linalg.eigvalsh(hessian)[0] + 0.05 * hessian.diagonal().mean()
    hessian -= low * torch.eye(64)
    assert torch.linalg.eigvalsh(hessian)[0] < 0
    got = gptq(weight, hessian, GRIDS[0])
    same(got, gptq(weight, hessian, GRIDS[0], damp=0.1))


# --- refusals ---------------------------------------------------------------------------------


def test_wrong_arguments_are_refused() -> None:
    x, weight = layer(30)
    hessian = squares(x)
    broken, skew, negative, wild = (hessian.clone() for _ in range(4))
    broken[3, 3] = torch.nan
    skew[2, 5] += hessian.max()
    negative[1, 1] = -1
    wild[0, 1] = wild[1, 0] = 100 * hessian.max()
    for wrong, reason in (
        *((hessian[:32, :32], "for 64 channels"), (broken, "NaN or infinite")),
        *((skew, "not symmetric"), (negative, "not symmetric")),
        (wild, "not positive definite, even with a damping of 1.0"),
    ):
        with pytest.raises(UsageError, match=reason):
            gptq(weight, wrong, GRIDS[0])
    with pytest.raises(UsageError, match="damp is -1"):
        gptq(weight, hessian, GRIDS[0], damp=-1)
    with pytest.raises(UsageError, match="block is 0"):
        gptq(weight, hessian, GRIDS[0], block=0)
    with pytest.raises(UsageError, match="divides 48"):
        gptq(weight[:, :48], hessian[:48, :48], Grid(4, 128, True))
