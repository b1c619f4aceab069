"""4-bit codes in bytes: the worked examples, and what holds for every tensor."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.numpy_helper import to_array

from effopt.backends.packing import (
    Codes,
    pack_blocks,
    pack_pairs,
    pack_zeros,
    unpack_blocks,
    unpack_pairs,
)

TABLE = np.array([[7, -3], [3, 7], [-7, 3], [2, -7]], dtype=np.int8)
"""Codes of W [K=4, N=2] in blocks of 2."""


def text(packed: NDArray[np.uint8]) -> str:
    return packed.tobytes().hex(" ")


def unsigned(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    return (codes.astype(np.int16) + 8).astype(np.uint8)


def test_one_block_in_both_orders() -> None:
    codes = np.array([7, -3, 1, 0, 2, -7, 6, 0], dtype=np.int8)
    assert text(pack_pairs(codes)) == "d7 01 92 06"
    assert text(pack_blocks(unsigned(codes)[None], 8, 4)) == "5f 89 1a 8e"


def test_two_layouts_of_one_matrix() -> None:
    assert text(pack_pairs(TABLE)) == "d7 73 39 92"
    packed = pack_blocks(unsigned(TABLE.T), 2, 4)
    assert packed.shape == (2, 2, 1)
    assert text(packed) == "bf a1 f5 1b"


def test_an_odd_count_leaves_the_last_high_half_empty() -> None:
    packed = pack_pairs(np.array([1, 2, -1], dtype=np.int8))
    assert text(packed) == "21 0f"
    assert unpack_pairs(packed, (3,), signed=True).tolist() == [1, 2, -1]


def test_zero_points_are_packed_row_by_row() -> None:
    zero = np.array([[1, 2, 3], [4, 5, 15]], dtype=np.uint8)
    assert pack_zeros(zero, 4).shape == (2, 2)
    assert text(pack_zeros(zero, 4)) == "21 03 54 0f"
    assert np.array_equal(pack_zeros(zero, 8), zero)


def test_a_ragged_block_is_filled_up() -> None:
    codes = np.full((1, 20), 15, dtype=np.uint8)
    assert text(pack_blocks(codes, 16, 4)[0, 1]) == "ff ff 00 00 00 00 00 00"
    assert pack_blocks(codes, 16, 8).shape == (1, 2, 16)


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 9), signed=st.booleans(), seed=st.integers(0, 99)
)
def test_pairs_are_read_back_by_us_and_by_onnx(
    rows: int, columns: int, signed: bool, seed: int
) -> None:
    low, kind = (-8, np.int8) if signed else (0, np.uint8)
    codes: Codes = np.random.default_rng(seed).integers(low, low + 16, (rows, columns)).astype(kind)
    packed = pack_pairs(codes)
    assert packed.size == -(-codes.size // 2)
    back = unpack_pairs(packed, codes.shape, signed=signed)
    assert back.dtype == kind
    assert np.array_equal(back, codes)
    element = onnx.TensorProto.INT4 if signed else onnx.TensorProto.UINT4
    tensor = onnx.TensorProto(data_type=element, dims=codes.shape, raw_data=packed.tobytes())
    assert np.array_equal(to_array(tensor).astype(kind), codes)


@given(
    rows=st.integers(1, 4), inner=st.integers(1, 70), block=st.sampled_from([16, 32]),
    bits=st.sampled_from([4, 8]), seed=st.integers(0, 99),
)  # fmt: skip
def test_blocks_are_read_back(rows: int, inner: int, block: int, bits: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, inner)).astype(np.uint8)
    packed = pack_blocks(codes, block, bits)
    assert packed.shape == (rows, -(-inner // block), block * bits // 8)
    assert np.array_equal(unpack_blocks(packed, inner, bits), codes)


@pytest.mark.parametrize("code", range(16))
def test_one_code_has_two_spellings(code: int) -> None:
    """The same order of elements differs by the top bit of each half: every byte ^ 0x88."""
    signed = np.array([code - 8, code - 8], dtype=np.int8)
    both = pack_pairs(signed), pack_blocks(unsigned(signed)[None], 2, 4).reshape(-1)
    assert np.array_equal(both[0] ^ 0x88, both[1])
