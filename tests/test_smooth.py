"""Scales that move activation outliers into weights: by hand, and what holds for all."""

from math import sqrt

import pytest
import torch

from effopt.errors import UsageError
from effopt.passes.smooth import smooth_scale


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
