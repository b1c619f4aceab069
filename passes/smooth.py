"""Scales that move activation outliers into weights, for int8 activations (arXiv 2211.10438)."""

from collections.abc import Sequence
from math import inf, isfinite

import torch
from torch import Tensor

from effopt.errors import UsageError
from effopt.kernel import kernel
from effopt.passes.awq import ScaleChoice, in_parts, per_root
from effopt.passes.observers import affine
from effopt.passes.rounding import Grid, round_weight

LEAST = 1e-5
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
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
    squared changes over tokens and outputs, with inputs rounded as `activations` say and weights on
    `grid`, summed over the linears. Scales and static ranges come from every second token and are
    judged on the others, since ranges that just fit what was seen clip what was not. No scale at
    all is tried as ratio 0, so the loss is never above that. Raises UsageError.
    """
    known, rest = (x[::2], x[1::2]) if len(x) > 1 else (x, x)
    amax = known.abs().amax(0)
    trial = _Trial(known, rest, weights, grid, activations)
    one = torch.ones_like(amax)
    tried = [(0.0, trial.loss(one))]
    for alpha in ALPHAS:
        scale = smooth_scale(amax, weights, alpha, roots)
        tried.append((alpha, trial.loss(scale if roots is None else scale[roots])))
    ratio, least = min(tried, key=lambda pair: pair[1] if isfinite(pair[1]) else inf)
    chosen = smooth_scale(x_amax, weights, ratio, roots)
    return ScaleChoice(ratio, chosen if ratio else torch.ones_like(chosen), least, tried[0][1])


class _Trial:
    """What rounding the inputs and weights of linears that share inputs does to their outputs."""

    def __init__(
        self,
        known: Tensor,
        rest: Tensor,
        weights: Sequence[Tensor],
        grid: Grid,
        activations: str,
    ) -> None:
        self.known, self.rest = known, rest
        self.grid, self.activations = grid, activations
        self.parts = [(part, len(part) / len(w)) for w in weights for part in in_parts(w)]
        self.wanted = [rest @ part.float().T for part, _ in self.parts]

    def loss(self, scale: Tensor) -> float:
        """Return the loss of inputs divided by a scale [K], and weights times it."""
        step, origin = 1.0, 0
        if self.activations == "static":
            ends = self.known / scale
            step, origin = affine(float(ends.min()), float(ends.max()))
        total = 0.0
        for (part, share), want in zip(self.parts, self.wanted, strict=True):
            made = round_weight(part * scale, self.grid)
            parts = made.codes, made.scale, made.zero, None, made.bits, made.group
            operator = kernel("quantized_linear").op
            got = operator(self.rest / scale, *parts, self.activations, step, origin)
            total += share * float((got - want).square().mean())
        return total
