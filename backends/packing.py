"""4-bit codes in bytes, in the two orders that engines read; free of torch.

ONNX (TensorRT as well) pairs neighbours of the flat tensor; `com.microsoft.MatMulNBits` pairs
neighbours along K inside a block. Both put the first of a pair into the low half of a byte.
"""

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8] | NDArray[np.uint8]


def pack_pairs(codes: Codes) -> Bytes:
    """Pack 4-bit codes, int8 in -8..7 or uint8 in 0..15, of any shape: [ceil(size / 2)] bytes.

    The order is row-major; an odd count leaves the last high half 0 (ONNX INT4 and UINT4).
    """
    flat = codes.reshape(-1).astype(np.uint8) & 15
    flat = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    return np.asarray(flat[0::2] | (flat[1::2] << 4), dtype=np.uint8)


def unpack_pairs(packed: Bytes, shape: tuple[int, ...], *, signed: bool) -> Codes:
    """Read what `pack_pairs` wrote: int8 in -8..7 if `signed`, else uint8 in 0..15."""
    flat = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: int(np.prod(shape))]
    codes = flat.reshape(shape)
    return ((codes ^ 8).astype(np.int8) - np.int8(8)) if signed else codes


def pack_blocks(codes: NDArray[np.uint8], block: int, bits: int) -> Bytes:
    """Pack unsigned codes [N, K] for MatMulNBits: [N, ceil(K / block), block * bits / 8] bytes.

    A ragged last block is filled with code 0, which meets no activation.
    """
    rows, inner = codes.shape
    padded = np.pad(codes, ((0, 0), (0, -inner % block)))
    packed = padded if bits == 8 else pack_pairs(padded)
    return packed.reshape(rows, -1, block * bits // 8)


def unpack_blocks(packed: Bytes, inner: int, bits: int) -> NDArray[np.uint8]:
    """Read what `pack_blocks` wrote, without the filling: [N, inner]."""
    flat = packed.reshape(packed.shape[0], -1)
    if bits == 4:
        flat = np.stack([flat & 15, flat >> 4], axis=-1).reshape(packed.shape[0], -1)
    return flat[:, :inner]


def pack_zeros(zero: NDArray[np.uint8], bits: int) -> Bytes:
    """Pack zero points [N, G] for MatMulNBits, each row apart: [N, ceil(G * bits / 8)] bytes."""
    return zero if bits == 8 else np.stack([pack_pairs(row) for row in zero])
