"""Scales that move activation outliers into weights, for int8 activations (arXiv 2211.10438)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from effopt.errors import UsageError
from effopt.passes.awq import per_root

LEAST = 1e-5


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
