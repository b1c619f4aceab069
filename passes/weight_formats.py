"""Weights that are not integers on a grid: signed powers of two, and two of four kept."""

from typing import NamedTuple

import torch
from torch import Tensor

from effopt.errors import UsageError
from effopt.passes.gptq import checked_hessian
from effopt.passes.rounding import SMALLEST, check_group, cut

RUN, KEPT = 4, 2
SHARES = tuple(1 - step / 20 for step in range(11))
"""Scales to try, as shares of a block's largest magnitude: 1.00, 0.95 ... 0.50."""

MEMORY = 256 << 20


class PowersOfTwo(NamedTuple):
    """Weights `±scale * 2^-exponents`: values [N, K], scale [N, G], exponents uint8 [N, K]."""

    values: Tensor
    scale: Tensor
    exponents: Tensor


def power_of_two(weight: Tensor, grid_group: int, exponent_bits: int) -> PowersOfTwo:
    """Take each weight of [N, K] to a signed power of two of its block's scale (arXiv 2208.09708).

    Exponents are 0 to 2^exponent_bits - 1, the nearest in the logarithm; no code is zero, so 0
    becomes the least positive value. Of 11 scales from half the largest magnitude up, each block
    takes that with the least squared error, of equal ones the largest. Raises UsageError.
    """
    if not 1 <= exponent_bits <= 5:
        raise UsageError(f"exponent_bits is {exponent_bits}", "give a whole number from 1 to 5")
    check_group(grid_group)
    blocks = cut(weight, grid_group)
    top = blocks.abs().amax(-1, keepdim=True)
    if not torch.isfinite(top).all():
        raise UsageError("a weight is NaN, infinite or beyond float32", "repair the checkpoint")
    top = top.clamp(min=SMALLEST)
    least, scale = torch.full_like(top, torch.inf), top
    for share in SHARES:
        tried = top * share
        change = _signed(blocks, exponents(blocks, tried, exponent_bits), tried) - blocks
        error = torch.linalg.vector_norm(change, dim=-1, keepdim=True)
        scale = torch.where(error < least, tried, scale)
        least = torch.minimum(error, least)
    chosen = exponents(blocks, scale, exponent_bits)
    made = _signed(blocks, chosen, scale).reshape(weight.shape)
    return PowersOfTwo(made, scale[..., 0], chosen.to(torch.uint8).reshape(weight.shape))


def exponents(weight: Tensor, scale: Tensor, exponent_bits: int) -> Tensor:
    """Return the p, whole numbers in float32, whose scale * 2^-p is nearest in the logarithm."""
    return (-(weight.abs() / scale).log2()).round_().clamp_(0, (1 << exponent_bits) - 1)


def _signed(weight: Tensor, exponent: Tensor, scale: Tensor) -> Tensor:
    return torch.ldexp(torch.where(weight < 0, -scale, scale), -exponent.int())


def two_of_four(weight: Tensor, score_rms: Tensor | None = None) -> Tensor:
    """Return a mask [N, K] bool that keeps two weights in each run of four along K.

    Kept are those with the largest |w|, or |w| * rms(x) if `score_rms` [K] is given (Wanda, arXiv
    2306.11695); of equal ones those at lower places. Raises UsageError.
    """
    score = cut(weight, 0).reshape(weight.shape).abs()
    if weight.shape[1] % RUN:
        reason = f"{weight.shape[1]} columns are no whole number of runs of {RUN}"
        raise UsageError(reason, "leave this layer dense")
    if score_rms is not None:
        if score_rms.shape != weight.shape[1:]:
            reason = f"score_rms is {list(score_rms.shape)} for {weight.shape[1]} columns"
            raise UsageError(reason, "give one value for each channel")
        score = score * score_rms.float()
    if not torch.isfinite(score).all():
        raise UsageError("a weight or its score is NaN or infinite", "repair the checkpoint")
    runs = score.reshape(len(weight), -1, RUN)
    best = runs.sort(dim=-1, descending=True, stable=True).indices[..., :KEPT]
    mask = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, best, True)
    return mask.reshape(weight.shape)


def reconstruct(weight: Tensor, mask: Tensor, hessian: Tensor, *, damp: float = 0.01) -> Tensor:
    """Change the kept weights so that outputs change least; the others become 0.

    Per row of `weight` [N, K], the change d of the kept weights is the least-squares one over the
    inputs x whose sum of x x^T is `hessian` [K, K] (any positive multiple), with `damp` times its
    mean diagonal as the price of d. The outputs are never further from those of `weight` than they
    are with the mask alone. `mask` keeps the same number in each row. Returns [N, K] in the type
    of `weight`. Raises UsageError.
    """
    fits = mask.shape == weight.shape and mask.dtype == torch.bool and mask.dim() == 2
    if not fits or (mask.sum(1) != mask[0].sum()).any():
        reason = f"a mask {mask.dtype} {list(mask.shape)} fits no weight {list(weight.shape)}"
        raise UsageError(reason, "give booleans that keep the same number in each row")
    sound = checked_hessian(hessian, weight.shape[1])
    damped = sound + damp * torch.eye(len(sound), dtype=sound.dtype, device=sound.device)
    count = int(mask[0].sum())
    kept = mask.int().sort(dim=1, descending=True, stable=True).indices[:, :count]
    dense = weight.double()
    # The gradient at d = 0: what the dropped weights would have added to the normal equations.
    pull = (dense * ~mask) @ sound
    rows = max(1, MEMORY // (8 * max(1, count) ** 2))
    parts = [slice(start, start + rows) for start in range(0, len(weight), rows)]
    change = torch.cat([_solved(damped, kept[part], pull[part]) for part in parts])
    return (dense * mask).scatter_add(1, kept, change).to(weight.dtype)


def _solved(damped: Tensor, kept: Tensor, pull: Tensor) -> Tensor:
    """Solve the normal equations of some rows, each on its own kept columns [n, S]."""
    systems = damped[kept[:, :, None], kept[:, None, :]]
    lower, failed = torch.linalg.cholesky_ex(systems)
    if failed.any():
        reason = "a Hessian is not positive definite on the kept weights"
        raise UsageError(reason, "raise damp, or sum x x^T over more inputs")
    solved: Tensor = torch.cholesky_solve(pull.gather(1, kept)[..., None], lower)
    return solved[..., 0]
