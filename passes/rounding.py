"""Rounding to few bits: the grid of a weight, its codes and scales, and what they stand for.

Rounding is to the nearest code, half to even, computed in float32. Codes are integers, or floats in
the 8-bit format E4M3 (arXiv 2209.05433).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from effopt.errors import UsageError

SMALLEST = 1e-8
"""The least range of a block, so that a block of zeros has a scale."""

TINY = 1e-30
"""What is all 0 has no error."""

E4M3 = torch.float8_e4m3fn
E4M3_MOST = int(torch.finfo(E4M3).max)
"""448: there is no infinity beyond."""

LEAST_GROUP = 32
"""A group that does not divide the columns is halved down to this size."""


@dataclass(frozen=True)
class Grid:
    """The codes that a weight [N, K] is rounded to: their bits, and the block with one scale.

    `group` is the block size along K, 0 for one block a row. A symmetric grid has codes around
    zero; an asymmetric one has unsigned codes and a zero point. `floating` codes are E4M3, of 8
    bits and symmetric. Raises UsageError.
    """

    bits: int
    group: int
    symmetric: bool
    floating: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits is {self.bits}", "give a whole number from 2 to 8")
        if self.floating and (self.bits != 8 or not self.symmetric):
            raise UsageError("E4M3 codes are of 8 bits and symmetric", "give these, or integers")
        check_group(self.group)

    @property
    def low(self) -> int:
        """The least code."""
        if self.floating:
            return -E4M3_MOST
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        """The largest code."""
        return E4M3_MOST if self.floating else self.low + (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """What codes are stored as."""
        whole = torch.int8 if self.symmetric else torch.uint8
        return E4M3 if self.floating else whole

    def block(self, columns: int) -> int | None:
        """Return the block size for so many columns, or None where no size fits."""
        return block_size(self.group, columns)

    def cut(self, weight: Tensor) -> Tensor:
        """View a weight [N, K] as float32 blocks [N, G, block]; UsageError where none fits."""
        return cut(weight, self.group)


def check_group(group: int) -> None:
    """Raise UsageError unless a group is 0 or a power of two above 1."""
    if group and (group < 2 or group & (group - 1)):
        raise UsageError(f"group is {group}", "give a power of two, or 0 for one block a row")


def block_size(group: int, columns: int) -> int | None:
    """Halve a group down to 32 until it divides the columns; 0 is all columns, None is no fit."""
    while group > LEAST_GROUP and columns % group:
        group //= 2
    size = group or columns
    return size if columns % size == 0 else None


def cut(weight: Tensor, group: int) -> Tensor:
    """View a weight [N, K] as float32 blocks [N, G, block]. Raises UsageError."""
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        shape = f"{weight.dtype} {list(weight.shape)}"
        raise UsageError(f"a weight is {shape}", "give a float matrix [outputs, inputs]")
    block = block_size(group, weight.shape[1])
    if block is None:
        reason = f"no block of {group}, halved down to {LEAST_GROUP}, divides {weight.shape[1]}"
        raise UsageError(f"{reason} columns", "leave this layer in float, or use group 0")
    return weight.float().reshape(len(weight), -1, block)


@dataclass(frozen=True, eq=False)
class Rounded:
    """A rounded weight [N, K] in G blocks a row: `(codes - zero) * scale`.

    `codes` [N, K] is int8 on a symmetric grid, uint8 on an asymmetric one and float8_e4m3fn on a
    floating one, `scale` [N, G] float32, `zero` [N, G] uint8 or None; `group` is the block size
    that was used.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int

    def dequantized(self) -> Tensor:
        """Return the weight that the codes stand for, float32 [N, K]."""
        blocks = self.codes.float().reshape(len(self.codes), -1, self.group)
        if self.zero is not None:
            blocks = blocks - self.zero[..., None]
        return (blocks * self.scale[..., None]).reshape(self.codes.shape)


def round_weight(weight: Tensor, grid: Grid) -> Rounded:
    """Round a float weight [N, K] to the nearest codes of a grid.

    Symmetric: the scale is the largest magnitude of the block over the largest code. Asymmetric:
    the range of the block, with 0 in it, over the number of steps. Real 0 stays 0 in both. Raises
    UsageError if a weight is NaN or infinite, or no block divides K.
    """
    blocks = grid.cut(weight)
    scale, zero = steps(blocks, grid)
    codes = nearest(blocks, scale[..., None], zero[..., None], grid)
    return rounded(codes.reshape(weight.shape), scale, zero, grid)


def fake(weight: Tensor, grid: Grid) -> Tensor:
    """Return `round_weight(weight, grid).dequantized()`, without storing codes on the way."""
    blocks = grid.cut(weight)
    scale, zero = (part[..., None] for part in steps(blocks, grid))
    return real(nearest(blocks, scale, zero, grid), scale, zero, grid).reshape(weight.shape)


def steps(blocks: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scale and zero point [...] of float32 blocks [..., g], both in float32.

    The zero points of a symmetric grid are 0. Raises UsageError for NaN and infinity.
    """
    if grid.symmetric:
        reach = blocks.abs().amax(-1)
        low = torch.zeros_like(reach)
    else:
        low = blocks.amin(-1).clamp(max=0)
        reach = blocks.amax(-1).clamp(min=0) - low
    if not torch.isfinite(reach).all():
        raise UsageError("a weight is NaN, infinite or beyond float32", "repair the checkpoint")
    scale = reach.clamp(min=SMALLEST) / grid.high
    return scale, (-low / scale).round_().clamp_(0, grid.high)


def nearest(values: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Return the codes nearest to float32 values, in a new float32 tensor."""
    codes = values / scale
    if grid.floating:  # clamped first: what a cast makes of more differs
        return codes.clamp_(grid.low, grid.high).to(E4M3).float()
    codes.round_()
    if not grid.symmetric:
        codes.add_(zero)
    return codes.clamp_(grid.low, grid.high)


def real(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Return what codes in float32 stand for, in a new tensor."""
    return codes * scale if grid.symmetric else (codes - zero).mul_(scale)


def rounded(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Rounded:
    """Store float codes [N, K], scales and zero points [N, G] in the types of `Rounded`."""
    group = codes.shape[1] // scale.shape[1]
    points = None if grid.symmetric else zero.to(torch.uint8)
    return Rounded(codes.to(grid.dtype), scale, points, grid.bits, group)


def e4m3_step(reach: float, kind: torch.dtype) -> float:
    """Return the step of E4M3 codes for magnitudes up to `reach`, as the type `kind` holds it.

    The reach 0 has step 1. One that is no number has a step, so that it shows in what is rounded.
    """
    step = max(torch.finfo(kind).tiny, reach / E4M3_MOST) if reach else 1.0
    return float(torch.tensor(step, dtype=kind))


def relative_error(change: Tensor, whole: Tensor) -> float:
    """Return the squared error |change|^2 as a share of |whole|^2."""
    return float(change.square().sum() / whole.square().sum().clamp_min(TINY))
