"""quantized_linear: a linear layer on 4- or 8-bit weights, with float or 8-bit activations.

The dynamic per-tensor scheme is that of ONNX's DynamicQuantizeLinear, the static ones, on integers
or E4M3 floats (arXiv 2209.05433), those of QuantizeLinear. Engines have special forms for
it (`effopt.backends.quantized`).
"""

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from effopt.axes import AxisMap, Dims, unify
from effopt.axis_rules import align, argument
from effopt.backends.kernels.common import Value, op
from effopt.errors import UsageError
from effopt.kernel import Kernel
from effopt.plugin import Plugin, Port, call

E4M3 = torch.float8_e4m3fn
"""8-bit floats of 4 bits of exponent and 3 of mantissa: up to 448, without infinities."""

TINY = 1e-12
"""Least maximum of a row: a row of zeros has codes 0 whatever it is divided by."""


@torch.library.custom_op("effopt::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    activations: str,
    step: float,
    origin: int,
) -> Tensor:
    """Return x W^T + bias [..., N] in the dtype of x, computed in float32.

    x [..., K]; W = (codes - zero) * scale, one scale for each `group` neighbours along K: codes
    [N, K] int8, or uint8 with a zero [N, G] uint8, or float8_e4m3fn for "fp8"; scale [N, G]
    float32, G = K / group; `bits` is 4 or 8. bias [N] or None. `activations` says how x is rounded
    first:

    - "float": not at all.
    - "tensor": to 0..255 from min(x, 0) to max(x, 0) of the whole tensor, at run time.
    - "row": to rint(127 x / a) in steps of a / 127, a = max |x| over each row's K values.
    - "static": to clamp(rint(x / step) + origin, 0, 255), `step` and `origin` from calibration.
    - "fp8": to the E4M3 float nearest to clamp(x / step, -448, 448), `step` from calibration.

    `step` is 1.0 and `origin` 0 where they have no say. Raises UsageError for arguments that
    contradict each other; activations other than "float" take one scale a row of W: group == K.
    """
    _check(codes, scale, zero, bits, group, activations, step, origin)
    return _meaning(x, codes, scale, zero, bias, group, activations, step, origin)


@quantized_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *rest: Any) -> Tensor:
    _, *scheme = rest
    _check(codes, scale, zero, *scheme)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def lowering(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, *scheme: Any
) -> Tensor:
    """Compute what the operator means; `scheme` are its bits, group, activations, step, origin."""
    _, *rest = scheme
    return _meaning(x, codes, scale, zero, bias, *rest)


def _meaning(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    activations: str,
    step: float,
    origin: int,
) -> Tensor:
    blocks = codes.float().reshape(codes.shape[0], -1, group)
    if zero is not None:
        blocks = blocks - zero.float().unsqueeze(-1)
    weight = (blocks * scale.unsqueeze(-1)).reshape(codes.shape)
    rounded = ROUNDED[activations](x.float(), step, origin)
    return F.linear(rounded, weight, None if bias is None else bias.float()).to(x.dtype)


# --- activations ------------------------------------------------------------------------------


def _float(x: Tensor, step: float, origin: int) -> Tensor:
    return x


def _tensor(x: Tensor, step: float, origin: int) -> Tensor:
    low, high = x.amin().clamp_max(0.0), x.amax().clamp_min(0.0)
    width = torch.where(high == low, 1.0, (high - low) / 255)
    zero = torch.round(-low / width).clamp(0, 255)
    return ((torch.round(x / width) + zero).clamp(0, 255) - zero) * width


def _row(x: Tensor, step: float, origin: int) -> Tensor:
    most = x.abs().amax(dim=-1, keepdim=True).clamp_min(TINY)
    return torch.round(127 * x / most) * (most / 127)


def _static(x: Tensor, step: float, origin: int) -> Tensor:
    return ((torch.round(x / step) + origin).clamp(0, 255) - origin) * step


def _fp8(x: Tensor, step: float, origin: int) -> Tensor:
    most = torch.finfo(E4M3).max  # what a cast makes of more than that differs
    return (x / step).clamp(-most, most).to(E4M3).float() * step


ROUNDED = MappingProxyType(
    {"float": _float, "tensor": _tensor, "row": _row, "static": _static, "fp8": _fp8}
)
"""Activation schemes by name: x in float32 as its 8-bit codes stand for it."""

_KINDS = "int8, or uint8 with a zero, or float8_e4m3fn for 'fp8'"


def _check(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    activations: str,
    step: float,
    origin: int,
) -> None:
    inner = codes.shape[1]
    whole = group > 0 and inner % group == 0
    blocks = (codes.shape[0], inner // group) if whole else ()
    floats = activations == "fp8"
    fixed = activations == "static" or (origin == 0 and (floats or step == 1.0))
    kind = E4M3 if floats else torch.int8 if zero is None else torch.uint8
    rules = (
        (bits in (4, 8), f"bits is {bits}, not 4 or 8"),
        (not floats or (bits == 8 and zero is None), "'fp8' needs 8 bits, and no zero"),
        (whole, f"groups of {group} do not divide the {inner} inputs"),
        (tuple(scale.shape) == blocks, f"scale is {list(scale.shape)}, not {list(blocks)}"),
        (zero is None or zero.shape == scale.shape, "zero has not the shape of scale"),
        (codes.dtype == kind, f"codes are {codes.dtype}: {_KINDS}"),
        (activations in ROUNDED, f"activations {activations!r} is none of {', '.join(ROUNDED)}"),
        (activations == "float" or group == inner, f"{activations!r} needs group == {inner}"),
        (step > 0 and 0 <= origin <= 255, f"step {step} or origin {origin} is out of range"),
        (fixed, f"{'origin has' if floats else 'step and origin have'} no say in {activations!r}"),
    )
    for holds, reason in rules:
        if not holds:
            raise UsageError(f"quantized_linear: {reason}", "correct the arguments of the operator")


def axes(found: AxisMap, node: Node) -> Dims:
    """As a linear layer's: `x [..., in]`, `codes [out, in]`, `bias [out]`."""
    x, codes, bias = (argument(node, name) for name in ("x", "codes", "bias"))
    (*outer, inner), (*out, into) = found.of(x), found.of(codes)
    unify(inner, into)
    if bias is not None:
        align([tuple(out), found.of(bias)], 1)
    return (*outer, *out)


def samples() -> list[tuple[object, ...]]:
    """Blocks and whole rows, each kind of codes and activations, with and without zero and bias.

    4-bit ones of 1 to 11 rows, of several blocks and of more inputs than a block's threads take.
    """
    draw = torch.Generator().manual_seed(7)
    x, bias = torch.randn(2, 3, 64, generator=draw), torch.randn(5, generator=draw)
    wide = torch.randint(-128, 128, (5, 64), generator=draw, dtype=torch.int8)
    narrow = torch.randint(-8, 8, (5, 64), generator=draw, dtype=torch.int8)
    blocks, rows = (torch.rand(5, n, generator=draw) * 0.01 + 0.01 for n in (2, 1))
    zero = torch.randint(0, 16, (5, 2), generator=draw, dtype=torch.uint8)
    positive = (narrow + 8).to(torch.uint8)
    floats = (100 * torch.randn(5, 64, generator=draw)).to(E4M3)
    many = torch.randn(11, 2176, generator=draw)
    codes = torch.randint(-8, 8, (19, 2176), generator=draw, dtype=torch.int8)
    scale = torch.rand(19, 34, generator=draw) * 0.002 + 0.001
    return [
        (x, narrow, blocks, None, bias, 4, 32, "float", 1.0, 0),
        (x[0], positive, blocks, zero, None, 4, 32, "float", 1.0, 0),
        *((many[:m], codes, scale, None, None, 4, 64, "float", 1.0, 0) for m in (1, 2, 4, 11)),
        (x.half(), wide, rows, None, bias, 8, 64, "float", 1.0, 0),
        (x, wide, rows, None, bias, 8, 64, "tensor", 1.0, 0),
        (x[0], wide, rows, None, None, 8, 64, "row", 1.0, 0),
        (x, wide, rows, None, bias, 8, 64, "static", 0.02, 120),
        (x, floats, rows, None, bias, 8, 64, "fp8", 0.005, 0),
    ]


# --- on a GPU ---------------------------------------------------------------------------------

CHUNK = 32
"""Codes that a thread reads at once: blocks are a multiple of it."""


def packed(codes: Tensor) -> Tensor:
    """Put 8 neighbours c_0 ... of 4-bit codes [N, K] into one: [N, K / 8] int32.

    It is the sum of (c_i + 8) 16^i, less 2^31: arithmetic takes it apart in a function.
    """
    digits = codes.reshape(codes.shape[0], -1, 8).to(torch.int64) + 8
    places = torch.tensor([16**i for i in range(8)], device=codes.device)
    return ((digits * places).sum(dim=2) - 2**31).to(torch.int32)


def body(x: Value, codes: Value, scale: Value, bias: Value) -> Value:
    """Take the codes apart, scale them, multiply and add in float32.

    Halves of 16 bits are whole numbers in float32, these are cut in two, and in two again. 8-bit
    constants would be no way: TensorRT has no use for them but a DequantizeLinear, and refuses
    the second of those in a function.
    """
    low = op.Mod(codes, 65536)
    high = op.Add(op.Div(op.Sub(codes, low), 65536), 32768)
    halves = op.Concat(op.Unsqueeze(low, [2]), op.Unsqueeze(high, [2]), axis=2)
    words = op.Unsqueeze(op.Cast(halves, to=1), [3])
    upper = op.Floor(op.Div(words, 256.0))
    octets = op.Unsqueeze(op.Concat(op.Sub(words, op.Mul(upper, 256.0)), upper, axis=3), [4])
    above = op.Floor(op.Div(octets, 16.0))
    digits = op.Concat(op.Sub(octets, op.Mul(above, 16.0)), above, axis=4)
    blocks = op.Reshape(digits, op.Concat(op.Shape(scale), [-1], axis=0))
    scaled = op.Mul(op.Sub(blocks, 8.0), op.Unsqueeze(scale, [2]))
    weight = op.Reshape(scaled, op.Concat(op.Shape(codes, start=0, end=1), [-1], axis=0))
    product = op.MatMul(op.Cast(x, to=1), op.Transpose(weight, perm=[1, 0]))
    return op.CastLike(op.Add(product, op.Cast(bias, to=1)), x)


def adapt(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    activations: str,
    step: float,
    origin: int,
) -> Tensor:
    """Launch for symmetric 4-bit weights and float activations, as rows.

    Files have the weights packed already, see `effopt.backends.quantized_forms.launched`.
    """
    if bits != 4 or zero is not None or activations != "float" or group % CHUNK:
        return lowering(x, codes, scale, zero, bias, bits, group, activations, step, origin)
    added = x.new_zeros(codes.shape[0]) if bias is None else bias.to(x.dtype)
    (y,) = call(PLUGIN, (x.reshape(-1, codes.shape[1]), packed(codes), scale, added))
    return y.reshape(*x.shape[:-1], codes.shape[0])


PLUGIN = Plugin(
    name="Int4Linear",
    stem="quantized_linear",
    inputs=(
        Port("x", "T", ("M", "K")),
        Port("codes", "int32", ("N", "W")),
        Port("scale", "float32", ("N", "G")),
        Port("bias", "T", ("N",)),
    ),
    outputs=(Port("y", "T", ("M", "N")),),
    scalars=("M", "N", "K", "G"),
    grid=("cdiv(M, 8)", "cdiv(N, 8)", "1"),
    block=128,
    shared="8448",
    body=body,
    adapt=adapt,
)
"""Weights are read once for 8 rows. x and codes begin at a multiple of 16 bytes, as memory of
engines does."""

KERNEL = Kernel(torch.ops.effopt.quantized_linear.default, lowering, axes, samples, 1e-6, PLUGIN)
