"""The ONNX forms of a quantized linear: node layouts that engines run on integer kernels.

Ratios are to float32 MatMul in onnxruntime 1.31, one thread, x86 with AVX512-VNNI, medians of
interleaved runs, at [197, 768] x [768, 3072] and at [8, 4096] x [4096, 4096]. The limits of
`effopt.products` are those of onnxruntime's MatMulNBits and its integer products, as read from the
graphs that it optimises, and those of TensorRT's documentation of quantized types.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import DataType

from effopt.backend import Array
from effopt.backends.kernels.quantized_linear import PLUGIN, packed
from effopt.backends.packing import pack_blocks, pack_pairs, pack_zeros
from effopt.backends.quantized_draft import MICROSOFT, Draft, Linear
from effopt.errors import PreconditionError
from effopt.plugin import DOMAIN
from effopt.products import CPU_BLOCKS, GPU_BLOCKS

_RAGGED = 32
"""Block for rows that no block divides: the last one is short, and little is filled up."""
_INT8_COMPUTE = 4
"""MatMulNBits' accuracy level that multiplies integers: it rounds activations block by block."""
_MIDDLE = 128
"""Unsigned code of zero: onnxruntime's kernels are fast for unsigned activations alone."""


# --- weights alone ----------------------------------------------------------------------------


def nbits(draft: Draft, linear: Linear) -> ir.Value:
    """Write one MatMulNBits at accuracy level 4; the other levels are half as fast or far worse."""
    bits, inner = linear.bits, linear.inner
    block = next((size for size in CPU_BLOCKS if linear.group % size == 0), _RAGGED)
    shift = 0 if linear.zero is not None else 1 << (bits - 1)

    def codes() -> Array:
        return pack_blocks((linear.codes.astype(np.int16) + shift).astype(np.uint8), block, bits)

    parts: list[ir.Value | None] = [linear.x, draft.weight(linear, "codes", codes)]
    parts.append(draft.weight(linear, "scale", lambda: _spread(linear.scale, linear, block)))
    zero = linear.zero
    if zero is not None:
        packed = draft.weight(
            linear, "zero", lambda: pack_zeros(_spread(zero, linear, block), bits)
        )
        parts.append(packed)
    words = {"K": inner, "N": linear.outputs, "bits": bits, "block_size": block}
    words["accuracy_level"] = _INT8_COMPUTE
    product = draft.op("MatMulNBits", *parts, name=linear.name, domain=MICROSOFT, **words)
    return _add_bias(draft, linear, product)


def dequantized(draft: Draft, linear: Linear) -> ir.Value:
    """Write DequantizeLinear of weights [K, N], one for each reader, and MatMul.

    onnxruntime makes one MatMulNBits of both where the weights lie in this order, and no other.
    Of whole rows it makes blocks of 32 (4 bits: 1.18, written in blocks of 256: 1.67); 8-bit ones
    stay whole (1.31), as blocks would raise the opset.
    """
    block = next((size for size in CPU_BLOCKS if linear.group % size == 0), linear.group)
    unblocked = linear.whole and (linear.bits == 8 or block == linear.group)
    return _dequantized(draft, linear, 0 if unblocked else block)


def dequantized_blocks(draft: Draft, linear: Linear) -> ir.Value:
    """Write the same in blocks of a size that TensorRT takes."""
    block = next(size for size in GPU_BLOCKS if linear.group % size == 0)
    return _dequantized(draft, linear, block)


def _dequantized(draft: Draft, linear: Linear, block: int) -> ir.Value:
    real = _real(linear)
    parts = [draft.weight(linear, "codes", lambda: _codes(linear))]

    def by_block(array: Array) -> Array:
        return _spread(array, linear, block).T if block else array[:, 0]

    parts.append(draft.weight(linear, "scale", lambda: by_block(_scale(linear, real))))
    zero = linear.zero
    if zero is not None:
        parts.append(
            draft.weight(linear, "zero", lambda: _tensor(by_block(zero), linear.bits, False))
        )
    words: dict[str, Any] = {"axis": 0, "block_size": block} if block else {"axis": 1}
    weight = draft.op("DequantizeLinear", *parts, name=f"{linear.name}.weight", **words)
    return _add_bias(draft, linear, draft.op("MatMul", linear.x, weight, name=linear.name))


def launched(draft: Draft, linear: Linear) -> ir.Value:
    """Write the node of our plugin, on rows [M, K]."""
    x, inner, outputs = linear.x, linear.inner, linear.outputs
    assert x.shape is not None
    zeros = np.zeros(outputs, _real(linear).numpy())
    read = (
        draft.weight(linear, "codes", lambda: _launched_codes(linear.codes)),
        draft.weight(linear, "scale", lambda: linear.scale),
        draft.weight(linear, "bias", lambda: zeros) if linear.bias is None else linear.bias,
    )
    if len(x.shape) == 2:
        return draft.op(PLUGIN.name, x, *read, name=linear.name, domain=DOMAIN)
    rows = draft.op("Reshape", x, _sizes(draft, -1, inner))
    product = draft.op(PLUGIN.name, rows, *read, name=linear.name, domain=DOMAIN)
    fixed = [int(size) for size in x.shape[1:-1]]  # type: ignore[arg-type]
    return draft.op("Reshape", product, _sizes(draft, -1, *fixed, outputs))


def _launched_codes(codes: Array) -> Array:
    return np.asarray(packed(torch.from_numpy(np.array(codes))).numpy())


def _sizes(draft: Draft, *sizes: int) -> ir.Value:
    return draft.once(("sizes", sizes), lambda: draft.constant("sizes", np.array(sizes)))


# --- activations rounded at run time ----------------------------------------------------------


def dynamic(draft: Draft, linear: Linear) -> ir.Value:
    """Write DynamicQuantizeLinear, one for all readers of x, and an integer product.

    onnxruntime makes MatMulIntegerToFloat of the product, or DynamicQuantizeMatMul of all.
    """
    x = linear.x
    codes, step, zero = draft.once(
        ("tensor", linear.home, x), lambda: draft.ops("DynamicQuantizeLinear", x, count=3)
    )
    scale = draft.op("Mul", step, draft.weight(linear, "scale", lambda: linear.scale[:, 0]))
    product = _integer(draft, linear, codes, zero, scale)
    return _add_bias(draft, linear, product)


def rows(draft: Draft, linear: Linear) -> ir.Value:
    """Write each row of x divided by its maximum, on one fixed grid, and an integer product."""
    codes, most = _row_codes(draft, linear)
    scale = draft.weight(linear, "scale", lambda: linear.scale[:, 0] / np.float32(127))
    middle = draft.scalar(_MIDDLE, DataType.UINT8)
    product = draft.op("Mul", _integer(draft, linear, codes, middle, scale), most)
    return _add_bias(draft, linear, product)


def rows_fused(draft: Draft, linear: Linear) -> ir.Value:
    """Write the same on onnxruntime's own product; it does not find it in the standard form."""
    codes, most = _row_codes(draft, linear)
    middle = draft.scalar(_MIDDLE, DataType.UINT8)
    fused = _fused(draft, linear, codes, _grid(draft), middle, bias=None)
    return _add_bias(draft, linear, draft.op("Mul", fused, most))


def _row_codes(draft: Draft, linear: Linear) -> tuple[ir.Value, ir.Value]:
    """Return uint8 codes around 128, and the largest magnitude of each row: [..., 1]."""
    x = linear.x

    def make() -> tuple[ir.Value, ir.Value]:
        last = draft.once("last axis", lambda: draft.constant("axis.last", np.array([-1])))
        most = draft.op("ReduceMax", draft.op("Abs", x), last, keepdims=1)
        most = draft.op("Max", most, draft.scalar(1e-12, DataType.FLOAT))
        middle = draft.scalar(_MIDDLE, DataType.UINT8)
        return draft.op("QuantizeLinear", draft.op("Div", x, most), _grid(draft), middle), most

    return draft.once(("row", linear.home, x), make)


def _grid(draft: Draft) -> ir.Value:
    return draft.scalar(1 / 127, DataType.FLOAT)


def _integer(
    draft: Draft, linear: Linear, codes: ir.Value, zero: ir.Value, scale: ir.Value
) -> ir.Value:
    """Write the sum of (codes - zero) * weights in int32, times the scale."""
    weight = draft.weight(linear, "codes", lambda: _codes(linear))
    total = draft.op("MatMulInteger", codes, weight, zero, name=linear.name)
    return draft.op("Mul", draft.op("Cast", total, to=DataType.FLOAT), scale)


# --- activations rounded by calibration -------------------------------------------------------


def static_fused(draft: Draft, linear: Linear) -> ir.Value:
    """Write QuantizeLinear, one for all readers, and onnxruntime's product with the bias inside.

    Of quantize-dequantize pairs onnxruntime makes the same, but not for every rank; see `static`.
    """
    step = draft.scalar(linear.step, DataType.FLOAT)
    zero = draft.scalar(linear.origin, DataType.UINT8)
    codes = _static_codes(draft, linear, step, zero)
    return _fused(draft, linear, codes, step, zero, bias=linear.bias)


def static(draft: Draft, linear: Linear) -> ir.Value:
    """Write quantize-dequantize pairs around MatMul, activations in unsigned codes.

    For x of rank 2 and a bias onnxruntime makes Gemm of product and addition before it sees the
    pairs, and dequantizes weights at each run (0.54): there it is an integer product (2.48).
    """
    assert linear.x.shape is not None
    if linear.bias is None or len(linear.x.shape) != 2:
        return _pairs(draft, linear, linear.origin, DataType.UINT8)
    step = draft.scalar(linear.step, DataType.FLOAT)
    origin = draft.scalar(linear.origin, DataType.UINT8)
    scale = draft.op("Mul", step, draft.weight(linear, "scale", lambda: linear.scale[:, 0]))
    codes = _static_codes(draft, linear, step, origin)
    return _add_bias(draft, linear, _integer(draft, linear, codes, origin, scale))


def static_signed(draft: Draft, linear: Linear) -> ir.Value:
    """Write the same in signed codes around 0, for origin 128: all that TensorRT takes."""
    return _pairs(draft, linear, 0, DataType.INT8)


def static_floats(draft: Draft, linear: Linear) -> ir.Value:
    """Write the same on E4M3 floats; onnxruntime runs it under session.disable_quant_qdq alone."""
    return _pairs(draft, linear, 0, DataType.FLOAT8E4M3FN)


def _pairs(draft: Draft, linear: Linear, origin: int, kind: DataType) -> ir.Value:
    real = _real(linear)
    step = draft.scalar(linear.step, real)
    codes = _static_codes(draft, linear, step, draft.scalar(origin, kind))
    x = draft.op("DequantizeLinear", codes, step, draft.scalar(origin, kind))
    weight = draft.op(
        "DequantizeLinear",
        draft.weight(linear, "codes", lambda: _codes(linear)),
        draft.weight(linear, "scale", lambda: _scale(linear, real)[:, 0]),
        axis=1,
        name=f"{linear.name}.weight",
    )
    return _add_bias(draft, linear, draft.op("MatMul", x, weight, name=linear.name))


def _static_codes(draft: Draft, linear: Linear, step: ir.Value, zero: ir.Value) -> ir.Value:
    key = ("static", linear.home, linear.x, step, zero)
    return draft.once(key, lambda: draft.op("QuantizeLinear", linear.x, step, zero))


# --- shared -----------------------------------------------------------------------------------


def _fused(
    draft: Draft,
    linear: Linear,
    codes: ir.Value,
    step: ir.Value,
    zero: ir.Value,
    bias: ir.Value | None,
) -> ir.Value:
    """Write onnxruntime's (codes - zero) * step times (weights * scale), and the bias if any."""
    parts = [
        codes,
        draft.weight(linear, "codes", lambda: _codes(linear)),
        step,
        draft.weight(linear, "scale", lambda: linear.scale[:, 0]),
        zero,
        *((None, bias) if bias is not None else ()),
    ]
    return draft.op("MatMulIntegerToFloat", *parts, name=linear.name, domain=MICROSOFT)


def _codes(linear: Linear) -> Array | ir.TensorProtocol:
    """Return the codes as [K, N], the order of ONNX."""
    return _tensor(linear.codes.T, linear.bits, linear.zero is None)


def _tensor(codes: Array, bits: int, signed: bool) -> Array | ir.TensorProtocol:
    if bits == 8:
        return codes
    kind = DataType.INT4 if signed else DataType.UINT4
    return ir.PackedTensor(pack_pairs(codes), kind, shape=codes.shape)


def _spread(by_group: Array, linear: Linear, block: int) -> Array:
    """Repeat what stands for a group for each of its blocks: [N, ceil(K / block)]."""
    return np.repeat(by_group, -(-linear.group // block), axis=1)


def _scale(linear: Linear, kind: DataType) -> Array:
    """Return the scales [N, G] in the type of x; PreconditionError where it cannot hold one."""
    least = 2.0**-14 if kind == DataType.FLOAT16 else 0.0  # the least number of full precision
    if bool((linear.scale < least).any()):
        reason = "a scale of its weights is too small for float16"
        raise PreconditionError(linear.name, reason, "convert the model to bfloat16 or float32")
    return linear.scale.astype(kind.numpy())


def _real(linear: Linear) -> DataType:
    assert linear.x.dtype is not None
    return linear.x.dtype


def _add_bias(draft: Draft, linear: Linear, product: ir.Value) -> ir.Value:
    return product if linear.bias is None else draft.op("Add", product, linear.bias)
