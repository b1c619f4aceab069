"""Scale and clip search: a layer by hand, a textbook version in plain loops, and the promises."""

from math import floor, sqrt

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from effopt.errors import UsageError
from effopt.passes.awq import condense, per_root, scale_at, search_clip, search_scale
from effopt.passes.rounding import Grid, fake

X = torch.tensor([[10, 1, 0.5, 0.1], [-8, 0.5, 1, 0.2]])
W = torch.tensor([[0.11, 0.52, -0.9, 0.7], [-0.06, 0.33, 0.48, -1]])
HAND = Grid(4, 4, True)
GRIDS = [Grid(4, 32, True), Grid(4, 32, False), Grid(3, 0, True), Grid(3, 64, False)]
all_grids = pytest.mark.parametrize("grid", GRIDS, ids=str)


def layer(seed: int, tokens: int = 200, rows: int = 16, columns: int = 128) -> tuple[Tensor, ...]:
    """Draw inputs with a few loud channels, as a norm gives them, and two linears."""
    draw = torch.Generator().manual_seed(seed)
    loud = torch.exp(1.2 * torch.randn(columns, generator=draw))
    x = torch.randn(tokens, columns, generator=draw) * loud
    return x, *(torch.randn(n, columns, generator=draw) / 11 for n in (rows, rows // 2))


# --- by hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "scale", "loss"),
    [
        (0, [1, 1, 1, 1], 0.161060),
        (0.25, [1.66828, 0.896342, 0.896342, 0.599420], 0.0340992),
        (0.5, [2.783158, 0.803428, 0.803428, 0.359304], 0.000456071),
        (0.75, [4.643086, 0.720146, 0.720146, 0.215374], 0.00421533),
    ],
)
def test_scales_and_losses_by_hand(ratio: float, scale: list[float], loss: float) -> None:
    got = scale_at(torch.tensor([9, 0.75, 0.75, 0.15]), ratio)
    # The table has six digits; so has a float32.
    torch.testing.assert_close(got, torch.tensor(scale, dtype=torch.float32), rtol=2e-6, atol=0)
    changed = (X @ (fake(W * got, HAND) / got).T - X @ W.T).square().mean()
    assert float(changed) == pytest.approx(loss, rel=1e-4)


def test_the_search_by_hand() -> None:
    found = search_scale(X, [W], HAND)
    assert found.ratio == 0.7
    assert found.loss == pytest.approx(0.000288408, rel=1e-5)
    assert found.rtn_loss == pytest.approx(0.161060, rel=5e-6)


# --- the textbook -----------------------------------------------------------------------------


Matrix = NDArray[np.floating]


def textbook_round(row: Matrix, grid: Grid) -> Matrix:
    """Round one block of one row, in the type that it has."""
    if grid.symmetric:
        top = 2 ** (grid.bits - 1) - 1
        step = max(max(abs(w) for w in row), 1e-8) / top
        return np.array([min(max(round(w / step), -top - 1), top) * step for w in row])
    low, high, top = min(0 * row[0], *row), max(0 * row[0], *row), 2**grid.bits - 1
    step = (high - low) / top
    zero = min(max(round(-low / step), 0), top)
    return np.array([(min(max(round(w / step) + zero, 0), top) - zero) * step for w in row])


def textbook_rounded(weight: Matrix, grid: Grid) -> Matrix:
    size = grid.block(weight.shape[1])
    assert size is not None
    made = np.empty_like(weight)
    for n in range(len(weight)):
        for start in range(0, weight.shape[1], size):
            part = slice(start, start + size)
            made[n, part] = textbook_round(weight[n, part], grid)
    return made


def textbook_scale(
    x: Matrix, weights: list[Matrix], grid: Grid
) -> tuple[float, Matrix, list[float]]:
    stat = np.abs(x).mean(axis=0)
    best, losses = (float("inf"), 0.0, stat), list[float]()
    for i in range(20):
        scale = np.maximum(stat ** (i / 20), 1e-4)
        scale = scale / sqrt(scale.max() * scale.min())
        loss = 0.0
        for weight in weights:
            changed = textbook_rounded(weight * scale, grid) / scale
            loss += float(((x @ changed.T - x @ weight.T) ** 2).mean())
        losses.append(loss)
        if loss < best[0]:
            best = (loss, i / 20, scale)
    return best[1], best[2], losses


def textbook_clip(x: Matrix, weight: Matrix, grid: Grid) -> Matrix:
    """Return the chosen factor [N, G] of every block, judged in float64.

    The rounding itself is in float32: a block clipped at both ends has its zero point at 7.5 on an
    asymmetric grid, a tie that the last digit of the type decides.
    """
    size = grid.block(weight.shape[1])
    assert size is not None
    used = min(512, len(x))
    x = x[[floor(i * len(x) / used) for i in range(used)]]
    chosen = np.empty((len(weight), weight.shape[1] // size))
    for n in range(len(weight)):
        for g in range(chosen.shape[1]):
            part = slice(g * size, (g + 1) * size)
            w, seen, least = weight[n, part], x[:, part], float("inf")
            for i in range(10):
                bound = np.abs(w).max() * (1 - i / 20)
                made = textbook_round(np.clip(w, -bound, bound), grid)
                error = float(((seen @ made.astype(float) - seen @ w.astype(float)) ** 2).mean())
                if error < least:
                    least, chosen[n, g] = error, 1 - i / 20
    return chosen


@all_grids
@pytest.mark.parametrize("seed", range(2))
def test_scales_are_those_of_the_textbook(grid: Grid, seed: int) -> None:
    x, *weights = layer(seed)
    found = search_scale(x, weights, grid)
    ratio, scale, losses = textbook_scale(
        x.double().numpy(), [weight.double().numpy() for weight in weights], grid
    )
    assert found.ratio == ratio
    np.testing.assert_allclose(found.scale.numpy(), scale, rtol=1e-5)
    # A weight that lies within float32 of half a step may round the other way than in float64:
    # one code of thousands, and the loss is a sum over all.
    assert found.loss == pytest.approx(min(losses), rel=2e-4)
    assert found.rtn_loss == pytest.approx(losses[0], rel=2e-4)


@all_grids
@pytest.mark.parametrize("tokens", [40, 700])
def test_clips_are_those_of_the_textbook(grid: Grid, tokens: int) -> None:
    x, weight, _ = layer(5, tokens)
    got = search_clip(x, weight, grid)
    factors = textbook_clip(x.double().numpy(), weight.numpy(), grid)
    blocks = grid.cut(weight)
    ratio = grid.cut(got).abs().amax(-1) / blocks.abs().amax(-1)
    np.testing.assert_allclose(ratio.numpy(), factors, rtol=1e-6)
    assert len(np.unique(factors)) > 3, "the layer must ask for different bounds"
    bound = torch.from_numpy(factors).float()[..., None] * blocks.abs().amax(-1, keepdim=True)
    expected = blocks.clamp(-bound, bound).reshape(weight.shape)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


# --- promises of the scale search -------------------------------------------------------------


@all_grids
@pytest.mark.parametrize("seed", range(10, 16))
def test_scaling_is_never_worse_than_rounding(grid: Grid, seed: int) -> None:
    x, *weights = layer(seed, tokens=90)
    found = search_scale(x, weights, grid)
    assert found.loss <= found.rtn_loss
    plain = sum(float((x @ (fake(w, grid) - w).T).square().mean()) for w in weights)
    assert found.rtn_loss == pytest.approx(plain, rel=1e-5)


def test_where_all_channels_are_alike_the_first_ratio_wins() -> None:
    x = torch.ones(4, 32)
    found = search_scale(x, [layer(0, columns=32)[1]], Grid(4, 0, True))
    assert found.ratio == 0
    assert torch.equal(found.scale, torch.ones(32))


def test_a_statistic_can_be_given() -> None:
    x, *weights = layer(20)
    given = search_scale(x, weights, GRIDS[0], stat=x.abs().mean(0))
    assert torch.equal(given.scale, search_scale(x, weights, GRIDS[0]).scale)
    flat = search_scale(x, weights, GRIDS[0], stat=torch.ones(128))
    assert flat.loss == flat.rtn_loss


def test_tied_channels_take_the_mean_and_one_scale() -> None:
    x, *weights = layer(21)
    roots = torch.arange(64).reshape(2, 1, 32).expand(2, 2, 32).flatten()
    found = search_scale(x, weights, GRIDS[0], roots=roots)
    assert found.scale.shape == (64,)
    assert found.ratio > 0
    stat = x.abs().mean(0)
    mean = torch.stack([stat[roots == root].mean() for root in range(64)])
    torch.testing.assert_close(found.scale, scale_at(mean, found.ratio), rtol=1e-6, atol=0)
    spread = found.scale[roots]
    loss = sum(
        float((x @ (fake(w * spread, GRIDS[0]) / spread - w).T).square().mean()) for w in weights
    )
    assert found.loss == pytest.approx(loss, rel=1e-5)


def test_a_statistic_is_aggregated_by_root() -> None:
    stat, roots = torch.tensor([1.0, 5, 3, 8]), torch.tensor([1, 0, 1, 0])
    assert per_root(stat, roots, "mean", 4).tolist() == [6.5, 2]
    assert per_root(stat, roots, "amax", 4).tolist() == [8, 3]
    assert per_root(stat, None, "mean", 4).tolist() == stat.tolist()


def test_a_channel_without_input_is_scaled_by_a_finite_amount() -> None:
    x, *weights = layer(22)
    x[:, 3] = 0
    found = search_scale(x, weights, GRIDS[0])
    assert torch.isfinite(found.scale).all()
    assert (found.scale > 0).all()
    assert found.loss <= found.rtn_loss


@pytest.mark.parametrize("shape", [(50, 8), (8, 8), (5, 8), (3, 40, 8)])
def test_few_rows_stand_for_many_tokens(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    d = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    rows = condense(x)
    assert rows.shape == (*shape[:-2], min(shape[-2:]), 8)
    torch.testing.assert_close((rows @ d).norm(dim=-2), (x @ d).norm(dim=-2), rtol=1e-5, atol=0)


# --- promises of the clip search --------------------------------------------------------------


@all_grids
@pytest.mark.parametrize("tokens", [7, 300, 1300])
def test_clipping_is_never_worse_in_any_block(grid: Grid, tokens: int) -> None:
    x, weight, _ = layer(30, tokens)
    used = min(512, tokens)
    seen = x[[i * tokens // used for i in range(used)]].double()

    def errors(made: Tensor) -> Tensor:
        change = grid.cut(made.float()).double() - grid.cut(weight).double()
        parts = seen.reshape(used, change.shape[1], -1)
        return torch.einsum("tgk,ngk->tng", parts, change).square().mean(0)

    before = errors(fake(weight, grid))
    after = errors(fake(search_clip(x, weight, grid), grid))
    # The choice is made in float32: equal errors may turn around in the last digits.
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.95 * before.sum()


def test_memory_only_cuts_the_work() -> None:
    x, weight, _ = layer(31, tokens=600)
    whole = search_clip(x, weight, GRIDS[0])
    for memory in (1, 4 * 4 * 32 * 5):
        torch.testing.assert_close(search_clip(x, weight, GRIDS[0], memory=memory), whole)


def test_a_clipped_weight_keeps_its_type_and_a_zero_block_its_zeros() -> None:
    x, weight, _ = layer(32)
    weight[:, :32] = 0
    got = search_clip(x, weight.half(), GRIDS[0])
    assert got.dtype == torch.float16
    assert (got[:, :32] == 0).all()


def test_of_equal_errors_the_wider_bound_wins() -> None:
    x, weight, _ = layer(33)
    assert torch.equal(search_clip(torch.zeros_like(x), weight, GRIDS[0]), weight)


# --- refusals ---------------------------------------------------------------------------------


def test_wrong_arguments_are_refused() -> None:
    x, *weights = layer(50)
    broken = x.clone()
    broken[0, 0] = torch.nan
    for inputs, reason in ((broken, "NaN"), (x[:, :64], "do not fit"), (x[:0], "do not fit")):
        with pytest.raises(UsageError, match=reason):
            search_scale(inputs, weights, GRIDS[0])
        with pytest.raises(UsageError, match=reason):
            search_clip(inputs, weights[0], GRIDS[0])
    with pytest.raises(UsageError, match="do not fit"):
        search_scale(x, [], GRIDS[0])
    with pytest.raises(UsageError, match="beyond float32"):
        search_scale(1e30 * x, weights, GRIDS[0])
    with pytest.raises(UsageError, match="no bound to try"):
        search_clip(x, weights[0], GRIDS[0], shrink=0)
    with pytest.raises(UsageError, match="ratios is 0"):
        search_scale(x, weights, GRIDS[0], ratios=0)


@pytest.mark.parametrize("roots", [[0, 0, 2], [0, 1], [0, 1, -1], [0.0, 1, 2]])
def test_roots_that_number_nothing_are_refused(roots: list[float]) -> None:
    with pytest.raises(UsageError, match="do not number"):
        per_root(torch.ones(3), torch.tensor(roots), "mean", 3)


@pytest.mark.parametrize("stat", [[1.0, -1], [1.0, torch.inf], [1.0]])
def test_a_statistic_must_be_magnitudes(stat: list[float]) -> None:
    with pytest.raises(UsageError, match="not 2 finite magnitudes"):
        per_root(torch.tensor(stat), None, "mean", 2)
