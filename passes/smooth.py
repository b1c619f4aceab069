"""Scales that move activation outliers into weights, for int8 activations (arXiv 2211.10438)."""

from collections.abc import Sequence
from math import inf, isfinite

import torch
from torch import Tensor

from effopt.errors import UsageError
from effopt.kernel import kernel
from effopt.passes.awq import ScaleChoice, per_root
from effopt.passes.observers import affine
from effopt.passes.rounding import Grid, round_weight

LEAST = 1e-5
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of outliers to try, beside none: what helps one model ruins another."""


def smooth_scale(
    x_amax: Tensor, weights: Sequence[Tensor], alpha: float, roots: Tensor | None = None
) -> Tensor:
    """Return `max|x|^alpha / max|W|^(1 - alpha)` per channel: [R] float32, one per root.

    `x_amax` [K] are the largest magnitudes of the inputs that the linears `weights` ([N_i, K]
    each) share; `roots` [K] int names the scale of each channel, where channels are tied and the
    largest counts. Consumers take `W * scale`, producers give `x / scale`; at alpha 0.5 both then
    have equal maxima per channel. Maxima are at least 1e-5. Raises UsageError.
    """
    columns = x_amax.numel()
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha is {alpha}", "give a share from 0 to 1, such as 0.5")
    shapes = [list(weight.shape) for weight in weights]
    if not shapes or any(len(shape) != 2 or shape[1] != columns for shape in shapes):
        reason = f"maxima of {columns} channels do not fit weights {shapes}"
        raise UsageError(reason, "give weights [N, K] that read those channels")
    w_amax = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    x_top, w_top = (
        per_root(top, roots, "amax", columns).clamp(min=LEAST) for top in (x_amax, w_amax)
    )
    return x_top**alpha / w_top ** (1 - alpha)


def search_alpha(
    x: Tensor,
    x_amax: Tensor,
    weights: Sequence[Tensor],
    grid: Grid,
    activations: str,
    roots: Tensor | None = None,
) -> ScaleChoice:
    """Search the share of outliers that, moved into weights, changes a group's outputs least.

    `x` [T, K] are inputs of the linears, `x_amax` [K] as in `smooth_scale`. The loss is the mean of
    squared changes over tokens and outputs, with inputs rounded as `activations` say ("static":
    over the range of `x`) and weights on `grid`, summed over the linears. No scale at all is tried
    as ratio 0, so the loss is never above that. Raises UsageError.
    """
    wanted = [x @ weight.float().T for weight in weights]

    def loss(scale: Tensor) -> float:
        inputs = x / scale
        step, origin = 1.0, 0
        if activations == "static":
            step, origin = affine(float(inputs.min()), float(inputs.max()))
        total = 0.0
        for weight, want in zip(weights, wanted, strict=True):
            made = round_weight(weight * scale, grid)
            parts = made.codes, made.scale, made.zero, None, made.bits, made.group
            got = kernel("quantized_linear").op(inputs, *parts, activations, step, origin)
            total += float((got - want).square().mean())
        return total

    plain = torch.ones(x_amax.numel() if roots is None else int(roots.max()) + 1)
    tried = [(0.0, plain, loss(torch.ones_like(x_amax)))]
    for alpha in ALPHAS:
        scale = smooth_scale(x_amax, weights, alpha, roots)
        tried.append((alpha, scale, loss(scale if roots is None else scale[roots])))
    ratio, scale, least = min(tried, key=lambda one: one[2] if isfinite(one[2]) else inf)
    return ScaleChoice(ratio, scale, least, tried[0][2])
