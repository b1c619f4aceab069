"""Scales that move activation outliers into weights: by hand, and what holds for all."""

from math import sqrt

import pytest
import torch

from effopt.errors import UsageError
from effopt.passes.rounding import Grid
from effopt.passes.smooth import ALPHAS, search_alpha, smooth_scale


def test_smoothing_by_hand() -> None:
    weight = torch.tensor([[0.11, 0.52, -0.9, 0.7], [-0.06, 0.33, 0.48, -1]])
    got = smooth_scale(torch.tensor([10, 1, 1, 0.2]), [weight], 0.5)
    expected = torch.tensor([9.534626, 1.386750, 1.054093, 0.447214])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 81), (0.25, 54), (0.75, 24), (1.0, 16)])
def test_alpha_is_the_power_of_the_activations(alpha: float, scale: float) -> None:
    got = smooth_scale(torch.tensor([16.0]), [torch.tensor([[1 / 81], [0]])], alpha)
    torch.testing.assert_close(got, torch.tensor([float(scale)]), rtol=1e-6, atol=0)


def test_smoothing_by_half_gives_equal_maxima() -> None:
    draw = torch.Generator().manual_seed(0)
    x_amax = torch.exp(torch.randn(64, generator=draw))
    weights = [torch.randn(rows, 64, generator=draw) for rows in (24, 12)]
    scale = smooth_scale(x_amax, weights, 0.5)
    top = torch.cat(weights).abs().amax(0)
    torch.testing.assert_close(x_amax / scale, top * scale, rtol=1e-5, atol=0)


def test_of_tied_channels_the_largest_counts() -> None:
    x_amax, weight = torch.tensor([1.0, 4, 9, 2]), torch.tensor([[1.0, 1, 0.25, 4]])
    got = smooth_scale(x_amax, [weight], 0.5, torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(got, torch.tensor([sqrt(2 / 4), sqrt(9 / 1)]))


def test_dead_channels_and_weights_have_finite_scales() -> None:
    got = smooth_scale(torch.tensor([0.0, 1]), [torch.tensor([[1.0, 0]])], 0.5)
    torch.testing.assert_close(got, torch.tensor([sqrt(1e-5), sqrt(1e5)]))


def test_wrong_arguments_are_refused() -> None:
    x_amax, weight = torch.ones(8), torch.ones(3, 8)
    with pytest.raises(UsageError, match="alpha is 2"):
        smooth_scale(x_amax, [weight], 2)
    for weights in ([], [weight, weight[:, :4]], [weight[0]]):
        with pytest.raises(UsageError, match="do not fit weights"):
            smooth_scale(x_amax, weights, 0.5)
    for wrong in (x_amax * torch.nan, -x_amax, x_amax[None]):
        with pytest.raises(UsageError, match="finite magnitudes"):
            smooth_scale(wrong, [weight], 0.5)


GRID = Grid(8, 0, symmetric=True)


def outliers(rows: int = 256) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Inputs of which some channels are 40 times as large, and the weights of two layers."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 64, generator=draw)
    x[:, ::16] *= 40
    return x, [torch.randn(32, 64, generator=draw) for _ in range(2)]


def rounded(x: torch.Tensor, weights: list[torch.Tensor], scale: torch.Tensor) -> float:
    """Return the error of outputs with x and weights on 8 bits, written out by hand."""
    total = 0.0
    for weight in weights:
        tall = (weight * scale).abs().amax(1, keepdim=True) / 127
        integers = (weight * scale / tall).round()
        top = (x / scale).abs().amax(1, keepdim=True) / 127
        got = ((x / scale / top).round() * top) @ (integers * tall).T
        total += float((got - x @ weight.T).square().mean())
    return total


def test_the_searched_share_of_outliers_is_the_best_of_all() -> None:
    x, weights = outliers()
    amax = x.abs().amax(0)
    found = search_alpha(x, amax, weights, GRID, "row")
    known, rest = x[::2], x[1::2]
    losses = {
        alpha: rounded(rest, weights, smooth_scale(known.abs().amax(0), weights, alpha))
        for alpha in ALPHAS
    }
    assert found.ratio == min(losses, key=losses.__getitem__)
    # Sums in another order: 2e-7 was measured.
    assert found.loss == pytest.approx(losses[found.ratio], rel=1e-5)
    assert found.rtn_loss == pytest.approx(rounded(rest, weights, torch.ones(64)), rel=1e-5)
    assert found.loss < 0.2 * found.rtn_loss
    torch.testing.assert_close(found.scale, smooth_scale(amax, weights, found.ratio))


@pytest.mark.parametrize("activations", ["row", "tensor", "static"])
def test_without_outliers_no_scale_loses_less_than_none(activations: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=draw).clamp(-2, 2)
    weight = torch.randn(32, 64, generator=draw)
    weight[:, ::16] *= 40  # more of x in these channels would be lost
    found = search_alpha(x, x.abs().amax(0), [weight], GRID, activations)
    assert found.loss <= found.rtn_loss
