"""Rounding a weight to a grid: worked examples by hand, the error bound, and the symmetries."""

from itertools import product

import pytest
import torch
from torch import Tensor

from effopt.errors import UsageError
from effopt.passes.rounding import Grid, Rounded, fake, nearest, round_weight

GRIDS = [
    Grid(bits, group, even)
    for bits, group, even in product((2, 3, 4, 8), (0, 32, 128), (True, False))
]
ids = [f"{g.bits}-{g.group}-{'sym' if g.symmetric else 'asym'}" for g in GRIDS]
all_grids = pytest.mark.parametrize("grid", GRIDS, ids=ids)
symmetric_grids = pytest.mark.parametrize("grid", [g for g in GRIDS if g.symmetric])


def drawn(seed: int, rows: int = 12, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def kinds() -> dict[str, Tensor]:
    """Weights of every kind that a block can be: two rows of two blocks of 128 each."""
    normal = drawn(0, 2)
    outlier = 1e-3 * normal
    outlier[:, 7] = 1000
    return {
        "normal": normal,
        "uniform": torch.rand(2, 256, generator=torch.Generator().manual_seed(1)) - 0.5,
        "heavy": normal / drawn(2, 2).abs().clamp(min=1e-3),
        "zero": torch.zeros(2, 256),
        "outlier": outlier,
        "positive": 5 + normal.abs(),
        "negative": -5 - normal.abs(),
        "tiny": 1e-20 * normal,
        "huge": 1e37 * normal,
    }


def per_column(weight: Tensor, part: Tensor) -> Tensor:
    """Spread one value a block [N, G] over the columns [N, K]."""
    return part.float().repeat_interleave(weight.shape[1] // part.shape[1], dim=1)


# --- worked examples --------------------------------------------------------------------------


def test_symmetric_int4() -> None:
    got = round_weight(
        torch.tensor([[0.7, -0.33, 0.12, -0.04, 0.2, -0.7, 0.62, 0]]), Grid(4, 8, True)
    )
    assert got.codes.tolist() == [[7, -3, 1, 0, 2, -7, 6, 0]]
    assert got.codes.dtype == torch.int8
    assert got.scale.tolist() == [[pytest.approx(0.1, rel=1e-7)]]
    assert got.zero is None
    assert (got.bits, got.group) == (4, 8)


def test_asymmetric_int4() -> None:
    got = round_weight(
        torch.tensor([[-0.3, 0, 0.13, 0.6, 0.9, 1.2, -0.1, 0.42]]), Grid(4, 8, False)
    )
    assert got.codes.tolist() == [[0, 3, 4, 9, 12, 15, 2, 7]]
    assert got.codes.dtype == torch.uint8
    assert got.scale.tolist() == [[pytest.approx(0.1, rel=1e-7)]]
    assert got.zero is not None
    assert got.zero.tolist() == [[3]]
    assert got.zero.dtype == torch.uint8


def test_a_zero_point_is_the_nearest() -> None:
    got = round_weight(torch.tensor([[-0.37, 1.13]]), Grid(4, 2, False))
    assert got.zero is not None
    assert got.zero.tolist() == [[4]]
    assert got.codes.tolist() == [[0, 15]]


def test_two_blocks_of_a_row() -> None:
    weight = torch.tensor([[1, -1.5], [0.4, 4], [-3, 0.2], [1, -0.5]]).T
    got = round_weight(weight, Grid(4, 2, True))
    assert got.codes.tolist() == [[7, 3, -7, 2], [-3, 7, 3, -7]]
    expected = torch.tensor([[1 / 7, 3 / 7], [4 / 7, 0.5 / 7]])
    torch.testing.assert_close(got.scale, expected, rtol=1e-7, atol=0)


def test_halves_go_to_the_even_code() -> None:
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    codes = nearest(halves, torch.tensor(1.0), torch.tensor(0.0), Grid(4, 0, True))
    assert codes.tolist() == [0, 2, 2, 0, -2]
    # Before the zero point is added, too: floor(x + 0.5) or a late rounding gives 43 for 42.5.
    half = torch.tensor([42.5])
    assert nearest(half, torch.tensor(1.0), torch.tensor(85.0), Grid(8, 0, False)) == 127


# --- properties -------------------------------------------------------------------------------


@all_grids
@pytest.mark.parametrize("kind", kinds())
def test_the_error_is_at_most_half_a_step(grid: Grid, kind: str) -> None:
    weight = kinds()[kind]
    got = round_weight(weight, grid)
    step = per_column(weight, got.scale).double()
    error = (got.dequantized().double() - weight.double()).abs()
    # Dividing by the step and multiplying with it each round in float32: half a unit of 2^-23
    # of a code, so together as many of them as the largest code.
    slack = step * 2**grid.bits * 2.0**-23
    # A rounded zero point moves the range by up to half a step, so its ends lose a whole one.
    assert (error <= step * (0.5 if grid.symmetric else 1) + slack).all()
    if not grid.symmetric:
        assert got.zero is not None
        shifted = weight / step + per_column(weight, got.zero)
        inner = (shifted >= 0) & (shifted <= 2**grid.bits - 1)
        assert (error <= step / 2 + slack)[inner].all()


@all_grids
@pytest.mark.parametrize("kind", kinds())
def test_zero_stays_zero(grid: Grid, kind: str) -> None:
    weight = kinds()[kind].clone()
    weight[:, ::5] = 0
    assert (round_weight(weight, grid).dequantized()[:, ::5] == 0).all()


def test_a_block_of_one_sign_keeps_its_values() -> None:
    weight = kinds()["positive"]
    for sign in (1, -1):
        got = round_weight(sign * weight, Grid(8, 128, False)).dequantized()
        # Without 0 in the range, the zero point is cut off and every value becomes wrong by 5.
        assert (got - sign * weight).abs().max() < 0.05


@all_grids
@pytest.mark.parametrize("kind", kinds())
def test_the_fast_path_is_the_same(grid: Grid, kind: str) -> None:
    weight = kinds()[kind]
    assert torch.equal(fake(weight, grid), round_weight(weight, grid).dequantized())


@all_grids
@pytest.mark.parametrize("factor", [2.0**-6, 2.0, 1024.0])
def test_a_power_of_two_scales_the_steps_only(grid: Grid, factor: float) -> None:
    one, other = round_weight(drawn(3), grid), round_weight(factor * drawn(3), grid)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale * factor, other.scale)


@symmetric_grids
def test_a_symmetric_grid_keeps_the_sign(grid: Grid) -> None:
    one, other = round_weight(drawn(4), grid), round_weight(-drawn(4), grid)
    assert torch.equal(one.codes, -other.codes)
    assert torch.equal(one.scale, other.scale)


@symmetric_grids
def test_rounding_twice_is_rounding_once(grid: Grid) -> None:
    once = round_weight(drawn(5), grid)
    twice = round_weight(once.dequantized(), grid)
    assert torch.equal(once.codes, twice.codes)
    # The largest code times the step, divided again: one rounding in float32 each.
    torch.testing.assert_close(once.scale, twice.scale, rtol=2.0**-22, atol=0)


@all_grids
def test_rows_and_columns_of_a_block_can_change_places(grid: Grid) -> None:
    weight, block = drawn(6), grid.block(256)
    assert block is not None
    draw = torch.Generator().manual_seed(7)
    rows = torch.randperm(len(weight), generator=draw)
    columns = torch.arange(256).reshape(-1, block)[:, torch.randperm(block, generator=draw)]
    one = round_weight(weight, grid)
    other = round_weight(weight[rows][:, columns.flatten()], grid)
    assert torch.equal(one.codes[rows][:, columns.flatten()], other.codes)
    assert torch.equal(one.scale[rows], other.scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_error_shrinks_with_the_block_and_with_bits(symmetric: bool) -> None:
    weight = drawn(8, 100)

    def loss(bits: int, group: int) -> float:
        return float((fake(weight, Grid(bits, group, symmetric)) - weight).square().mean())

    by_block = [loss(4, group) for group in (0, 128, 64, 32, 16)]
    assert by_block == sorted(by_block, reverse=True)
    by_bits = [loss(bits, 64) for bits in range(2, 9)]
    assert by_bits == sorted(by_bits, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_round_as_float32(dtype: torch.dtype) -> None:
    weight, grid = drawn(9).to(dtype), Grid(4, 64, False)
    one, other = round_weight(weight, grid), round_weight(weight.float(), grid)
    assert torch.equal(one.codes, other.codes)
    assert one.scale.dtype == one.dequantized().dtype == torch.float32


# --- blocks and refusals ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "columns", "block"),
    [
        *((128, 768, 128), (128, 192, 64), (128, 96, 32), (0, 770, 770), (32, 96, 32)),
        *((64, 32, 32), (128, 48, None), (128, 770, None), (16, 24, None), (16, 48, 16)),
    ],
)
def test_the_block_is_halved_until_it_fits(group: int, columns: int, block: int | None) -> None:
    grid = Grid(4, group, True)
    assert grid.block(columns) == block
    if block is not None:
        got = round_weight(drawn(10, 3, columns), grid)
        assert got.group == block
        assert got.scale.shape == (3, columns // block)


def test_columns_that_no_block_divides_are_refused() -> None:
    with pytest.raises(UsageError, match="no block of 128, halved down to 32, divides 770"):
        round_weight(drawn(11, 3, 770), Grid(4, 128, True))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused(symmetric: bool, value: float) -> None:
    weight = drawn(12)
    weight[3, 100] = value
    for way in (round_weight, fake):
        with pytest.raises(UsageError, match="NaN, infinite or beyond float32"):
            way(weight, Grid(4, 32, symmetric))


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(0, 4), torch.ones(2, 4).int()])
def test_what_is_no_float_matrix_is_refused(weight: Tensor) -> None:
    with pytest.raises(UsageError, match="a weight is"):
        round_weight(weight, Grid(4, 0, True))


@pytest.mark.parametrize(("bits", "group"), [(1, 0), (9, 0), (4, -1), (4, 1), (4, 48)])
def test_a_grid_checks_itself(bits: int, group: int) -> None:
    with pytest.raises(UsageError, match=r"bits is|group is"):
        Grid(bits, group, True)


def test_codes_scale_and_zero_are_all_that_counts() -> None:
    codes = torch.tensor([[0, 15, 3, 4]], dtype=torch.uint8)
    zero = torch.tensor([[1, 4]], dtype=torch.uint8)
    made = Rounded(codes, torch.tensor([[0.5, 2.0]]), zero, 4, 2)
    assert made.dequantized().tolist() == [[-0.5, 7.0, -2.0, 0.0]]
