"""Activation-aware scales and clipping of weights (AWQ, arXiv 2306.00978).

A channel that activations make important is scaled up before rounding and down behind it, so that
its weights lie on a finer grid. Then each block of a row is clipped where that helps its outputs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from effopt.errors import UsageError
from effopt.passes.rounding import Grid, fake

LEAST_SCALE = 1e-4

PART = 1 << 20
"""Elements of a weight that are tried at a time."""


@dataclass(frozen=True, eq=False)
class ScaleChoice:
    """The best scales of a group of linears, and the output error with them and without.

    `scale` [R] float32 has one value per root, geometrically centred: consumers take `W * scale`,
    producers give `x / scale`. `rtn_loss` is that of plain rounding (ratio 0).
    """

    ratio: float
    scale: Tensor
    loss: float
    rtn_loss: float


def search_scale(
    x: Tensor,
    weights: Sequence[Tensor],
    grid: Grid,
    *,
    stat: Tensor | None = None,
    roots: Tensor | None = None,
    ratios: int = 20,
) -> ScaleChoice:
    """Search the power of a channel statistic that, as scale, changes a group's outputs least.

    `x` [T, K] are inputs that the linears `weights` ([N_i, K] each) share, without padding; `stat`
    [K] is their mean magnitude unless given. `roots` [K] int names the scale that each channel
    takes, for tied channels. The loss is the mean of squared changes over tokens and outputs,
    summed over the linears. Ratio 0 is tried, so the loss is never above that of rounding; of
    equal losses the first wins. Raises UsageError.
    """
    x = _inputs(x, weights)
    if ratios < 1:
        raise UsageError(f"ratios is {ratios}", "give how many powers to try, from 1")
    weights = [weight.float() for weight in weights]
    shared = per_root(x.abs().mean(0) if stat is None else stat, roots, "mean", x.shape[1])
    rows = condense(x)
    tried = list[tuple[float, Tensor, float]]()
    for step in range(ratios):
        scale = scale_at(shared, step / ratios)
        spread = scale if roots is None else scale[roots]
        loss = sum(_changed(rows, weight, spread, grid) for weight in weights) / len(x)
        tried.append((step / ratios, scale, loss))
    if not isfinite(tried[0][2]):
        raise UsageError("the outputs are beyond float32", "look for outliers in the calibration")
    ratio, scale, loss = min(tried, key=lambda one: one[2] if isfinite(one[2]) else float("inf"))
    return ScaleChoice(ratio, scale, loss, tried[0][2])


def scale_at(stat: Tensor, ratio: float) -> Tensor:
    """Return the power `ratio` of a statistic [R], centred so that max * min is 1; float32."""
    scale = stat.float().pow(ratio).clamp(min=LEAST_SCALE)
    return scale / (scale.max() * scale.min()).sqrt()


def per_root(
    values: Tensor, roots: Tensor | None, how: Literal["mean", "amax"], columns: int
) -> Tensor:
    """Aggregate a statistic [columns] over tied channels: [R] float32, one value per root.

    Without roots every channel is its own. Raises UsageError if the statistic is negative or not
    finite, or if the roots are not [columns] numbers of which each up to the largest occurs.
    """
    values = values.float()
    if values.shape != (columns,) or not (torch.isfinite(values) & (values >= 0)).all():
        reason = f"a statistic {list(values.shape)} is not {columns} finite magnitudes"
        raise UsageError(reason, "give one for each channel, such as the mean of |x|")
    if roots is None:
        return values
    known = roots.shape == (columns,) and not roots.is_floating_point() and roots.min() >= 0
    if not known or not roots.bincount().all():
        reason = f"roots {list(roots.shape)} do not number the {columns} channels' scales"
        raise UsageError(reason, "give each channel a root, all numbers from 0 up in use")
    empty = values.new_zeros(int(roots.max()) + 1)
    return empty.scatter_reduce(0, roots.long(), values, how, include_self=False)


def in_parts(weight: Tensor) -> Iterator[Tensor]:
    """Cut a weight [N, K] into rows of at most PART elements: what is computed of them is small."""
    count = max(1, PART // weight.shape[1])
    return (weight[start : start + count] for start in range(0, len(weight), count))


def search_clip(
    x: Tensor,
    weight: Tensor,
    grid: Grid,
    *,
    steps: int = 20,
    shrink: float = 0.5,
    tokens: int = 512,
    memory: int = 4 << 20,
) -> Tensor:
    """Clip each block of a weight [N, K] to the bound that changes its own share of y least.

    Bounds are the largest magnitude of the block times 1 - i/steps, for i below shrink * steps; of
    equal errors the wider bound wins. `x` [T, K] are the linear's inputs, as it reads them after
    any scaling, of which at most `tokens` evenly spaced ones are used. At most `memory` bytes hold
    partial sums. Returns the clipped weight [N, K] in its own type. Raises UsageError.
    """
    x = _inputs(x, [weight])
    count = int(shrink * steps)
    if not (0 < shrink <= 1 and count >= 1 and tokens >= 1):
        reason = f"steps={steps}, shrink={shrink}, tokens={tokens} name no bound to try"
        raise UsageError(reason, "use steps=20, shrink=0.5 and tokens=512")
    used = min(tokens, len(x))
    sample = x[torch.arange(used, device=x.device) * len(x) // used]
    groups = grid.cut(weight).shape[1]
    rows = condense(sample.reshape(used, groups, -1).transpose(0, 1))
    factors = [1 - i / steps for i in range(count)]
    chunk = max(1, memory // (4 * rows.shape[0] * rows.shape[1]))
    parts = [weight[start : start + chunk] for start in range(0, len(weight), chunk)]
    return torch.cat([_clipped(rows, part.float(), grid, factors) for part in parts]).to(weight)


def condense(x: Tensor) -> Tensor:
    """Return at most K rows R [..., R, K] for x [..., T, K] with equal norms: |x d| = |R d|.

    The triangle of a QR factorization: the searches need of x only such norms, for many d.
    """
    if x.shape[-2] <= x.shape[-1]:
        return x
    triangle: Tensor = torch.linalg.qr(x, mode="r").R
    return triangle


def _inputs(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Check activations [T, K] against the weights that read them; returns them in float32."""
    shapes = [list(weight.shape) for weight in weights]
    if x.dim() != 2 or not len(x) or not shapes or any(s[1:] != [x.shape[1]] for s in shapes):
        reason = f"inputs {list(x.shape)} do not fit weights {shapes}"
        raise UsageError(reason, "give tokens [T, K] and weights [N, K]")
    if not torch.isfinite(x).all():
        raise UsageError("an activation is NaN or infinite", "look at the calibration data")
    return x.float()


def _changed(rows: Tensor, weight: Tensor, scale: Tensor, grid: Grid) -> float:
    """Return how much rounding a scaled weight changes y: squares, summed over the tokens."""
    squares = 0.0
    for part in in_parts(weight):
        change = fake(part * scale, grid).div_(scale).sub_(part)
        squares += float((rows @ change.T).square_().sum(dtype=torch.float64))
    return squares / len(weight)


def _clipped(rows: Tensor, weight: Tensor, grid: Grid, factors: Sequence[float]) -> Tensor:
    """Clip rows of a weight [n, K]; `rows` [G, R, g] stand for the tokens, block by block."""
    blocks = grid.cut(weight)
    top = blocks.abs().amax(-1, keepdim=True)
    least, bound = torch.full_like(top, torch.inf), top
    for factor in factors:
        limit = top * factor
        change = fake(blocks.clamp(-limit, limit).reshape(weight.shape), grid) - weight
        sums = rows @ change.reshape(blocks.shape).permute(1, 2, 0)
        error = torch.linalg.vector_norm(sums, dim=1).T[..., None]
        bound = torch.where(error < least, limit, bound)
        least = torch.minimum(error, least)
    return blocks.clamp(-bound, bound).reshape(weight.shape)
