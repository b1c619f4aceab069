"""Powers of two and two of four: worked examples by hand, and what every result holds to."""

import numpy as np
import pytest
import torch
from torch import Tensor

from effopt.errors import UsageError
from effopt.passes.rounding import Grid, round_weight
from effopt.passes.weight_formats import exponents, power_of_two, reconstruct, two_of_four


def drawn(seed: int, rows: int = 16, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int, columns: int = 64, tokens: int = 300) -> Tensor:
    """Draw correlated inputs [T, K]."""
    mix = drawn(seed + 1, columns, columns) / columns**0.5
    made: Tensor = drawn(seed, tokens, columns) @ mix
    return made


# --- powers of two ----------------------------------------------------------------------------


def test_powers_of_two_by_hand() -> None:
    got = power_of_two(torch.tensor([[0.9, -0.4, 0.13, 0.02]]), 4, 3)
    assert got.exponents.tolist() == [[0, 1, 3, 5]]
    assert got.exponents.dtype == torch.uint8
    expected = torch.tensor([[0.9, -0.45, 0.1125, 0.028125]])
    torch.testing.assert_close(got.values, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(got.scale, torch.tensor([[0.9]]), rtol=0, atol=0)


@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_each_value_is_a_signed_power_of_two_of_its_scale(group: int, bits: int) -> None:
    weight = drawn(0)
    weight[0], weight[1, :5] = 0, -1e-30
    got = power_of_two(weight, group, bits)
    scale = got.scale.repeat_interleave(128 // got.scale.shape[1], 1)
    share = got.values.abs() / scale
    assert torch.equal(share, 2.0 ** -got.exponents.float())
    assert int(got.exponents.max()) <= 2**bits - 1
    assert torch.equal(got.values < 0, weight < 0)
    blocks = weight.reshape(16, got.scale.shape[1], -1).abs().amax(-1).clamp(min=1e-8)
    assert (got.scale <= blocks).all()
    assert (got.scale >= blocks / 2 * (1 - 1e-6)).all()


@pytest.mark.parametrize("bits", [2, 3])
def test_the_scale_has_the_least_error_of_eleven(bits: int) -> None:
    weight = drawn(1, 8, 64)
    got = power_of_two(weight, 32, bits)
    chosen = set[float]()
    for n in range(8):
        for g in range(2):
            w = weight[n, 32 * g : 32 * g + 32].double().numpy()
            errors = {}
            for step in range(11):
                scale = np.abs(w).max() * (1 - step / 20)
                p = np.clip(np.rint(-np.log2(np.abs(w) / scale)), 0, 2**bits - 1)
                errors[scale] = float(((np.sign(w) * scale * 2.0**-p - w) ** 2).sum())
            best = min(errors, key=lambda scale: errors[scale])
            assert float(got.scale[n, g]) == pytest.approx(best, rel=1e-6)
            chosen.add(round(best / np.abs(w).max(), 2))
    assert len(chosen) > 3, "the weights must ask for different scales"


def test_exponents_are_the_nearest_and_halves_go_to_the_even_one() -> None:
    # 2^-0.5 and 2^-1.5 lie between two powers; float32 has neither, so these are just beside.
    got = exponents(torch.tensor([1.0, 0.71, 0.70, 0.36, 0.35, 0.0]), torch.tensor(1.0), 3)
    assert got.tolist() == [0, 0, 1, 1, 2, 7]


def test_more_exponents_and_smaller_blocks_are_nearer() -> None:
    weight = drawn(2, 64)
    for few, many in (((128, 2), (128, 3)), ((128, 3), (32, 3))):
        losses = [
            (power_of_two(weight, *how).values - weight).square().mean() for how in (few, many)
        ]
        assert losses[1] < losses[0]


def test_powers_of_two_refuse() -> None:
    weight = drawn(3)
    for group, bits, reason in (
        (128, 0, "exponent_bits"),
        (128, 6, "exponent_bits"),
        (3, 3, "group"),
    ):
        with pytest.raises(UsageError, match=reason):
            power_of_two(weight, group, bits)
    with pytest.raises(UsageError, match="divides 100"):
        power_of_two(weight[:, :100], 128, 3)
    weight[2, 2] = torch.nan
    with pytest.raises(UsageError, match="NaN"):
        power_of_two(weight, 128, 3)


# --- two of four ------------------------------------------------------------------------------


def test_two_of_four_by_hand() -> None:
    mask = two_of_four(torch.tensor([[0.1, -0.9, 0.4, -0.3, 0.2, 0.2, -0.5, 0.6]]))
    assert mask[0].nonzero().flatten().tolist() == [1, 2, 6, 7]
    weighted = two_of_four(torch.tensor([[0.1, -0.9, 0.4, -0.3]]), torch.tensor([10.0, 1, 1, 2]))
    assert weighted[0].nonzero().flatten().tolist() == [0, 1]


def test_of_equal_scores_the_lower_places_stay() -> None:
    rows = torch.tensor([[1.0, -1, 1, -1], [0, 0, 0, 0], [1, 2, 1, 1], [0, 3, 3, 3]])
    kept = [row.nonzero().flatten().tolist() for row in two_of_four(rows)]
    assert kept == [[0, 1], [0, 1], [0, 1], [1, 2]]


def test_two_of_each_four_stay_and_they_are_the_largest() -> None:
    weight, rms = drawn(4), drawn(5)[0].abs()
    for score_rms in (None, rms):
        mask = two_of_four(weight, score_rms)
        runs = mask.reshape(16, -1, 4)
        assert (runs.sum(-1) == 2).all()
        score = (weight.abs() * (1 if score_rms is None else score_rms)).reshape(16, -1, 4)
        least = score.masked_fill(~runs, torch.inf).amin(-1)
        assert (least >= score.masked_fill(runs, -1).amax(-1)).all()


def test_codes_of_a_sparse_weight_have_the_pattern() -> None:
    weight = drawn(6)
    mask = two_of_four(weight)
    codes = round_weight(weight * mask, Grid(8, 0, True)).codes
    assert (codes[~mask] == 0).all()


def test_two_of_four_refuses() -> None:
    with pytest.raises(UsageError, match="6 columns are no whole number of runs"):
        two_of_four(drawn(7, 2, 6))
    with pytest.raises(UsageError, match="for 128 columns"):
        two_of_four(drawn(7), torch.ones(64))
    with pytest.raises(UsageError, match="NaN or infinite"):
        two_of_four(drawn(7), torch.full((128,), torch.nan))


# --- reconstruction ---------------------------------------------------------------------------


def test_reconstruction_is_least_squares_on_the_kept_weights() -> None:
    x, weight = inputs(10), drawn(11, 12, 64)
    mask = two_of_four(weight)
    got = reconstruct(weight, mask, 2 / 300 * x.T @ x, damp=0)
    assert (got[~mask] == 0).all()
    for row, kept, made in zip(weight.double(), mask, got.double(), strict=True):
        seen = x.double().numpy()
        best = np.linalg.lstsq(seen[:, kept.numpy()], seen @ row.numpy(), rcond=None)[0]
        # The normal equations square the condition number, 1e2 here, of a float32 Hessian.
        np.testing.assert_allclose(made[kept].numpy(), best, rtol=0, atol=1e-4)


@pytest.mark.parametrize("damp", [0.001, 0.01, 1.0])
@pytest.mark.parametrize("tokens", [20, 300])
def test_reconstruction_is_never_worse_than_the_mask(damp: float, tokens: int) -> None:
    x, weight = inputs(12, tokens=tokens), drawn(13, 12, 64)
    x[:, 9] = 0
    mask = two_of_four(weight, x.square().mean(0).sqrt())
    got = reconstruct(weight, mask, x.T @ x, damp=damp)
    plain, better = ((x @ (made - weight).T).square().sum(0) for made in (weight * mask, got))
    assert (better <= plain).all()
    assert better.sum() < 0.9 * plain.sum()
    assert torch.equal(got[:, 9], (weight * mask)[:, 9]), "no input has used this channel"


def test_a_mask_that_keeps_all_changes_nothing() -> None:
    x, weight = inputs(14), drawn(15, 12, 64).half()
    got = reconstruct(weight, torch.ones_like(weight, dtype=torch.bool), x.T @ x)
    assert got.dtype == torch.float16
    assert torch.equal(got, weight)


def test_reconstruction_refuses() -> None:
    x, weight = inputs(16), drawn(17, 12, 64)
    mask, hessian = two_of_four(weight), x.T @ x
    ragged = mask.clone()
    ragged[0, :8] = True
    for wrong in (ragged, mask[:, :32], mask.float()):
        with pytest.raises(UsageError, match="a mask"):
            reconstruct(weight, wrong, hessian)
    with pytest.raises(UsageError, match="for 64 channels"):
        reconstruct(weight, mask, hessian[:32, :32])
    with pytest.raises(UsageError, match="not positive definite on the kept weights"):
        reconstruct(weight, mask, inputs(16, tokens=8).T @ inputs(16, tokens=8), damp=-0.01)
