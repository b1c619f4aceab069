"""attention_row: how much some queries attend to each token, without the whole attention map.

The score of Liang et al., "Not All Patches are What You Need" (EViT), 2022 (arXiv 2202.07800).
"""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import arg_dims
from effopt.kernel import Kernel


@torch.library.custom_op("effopt::attention_row", mutates_args=())
def attention_row(
    q: Tensor, k: Tensor, bias: Tensor | None, rows: list[int], scale: float
) -> Tensor:
    """Return score [B, N]: softmax(q k^T scale + bias) of the queries `rows`, mean over heads.

    q [B, H, N, D], k [B, G, N, D] with G dividing H (grouped queries share keys); bias broadcasts
    to [B, H, N, N] and is added, or masks where it is bool and False. Softmax is in float32.
    """
    return lowering(q, k, bias, rows, scale)


@attention_row.register_fake
def _(q: Tensor, k: Tensor, bias: Tensor | None, rows: list[int], scale: float) -> Tensor:
    return k.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)


def lowering(q: Tensor, k: Tensor, bias: Tensor | None, rows: list[int], scale: float) -> Tensor:
    """Read only the rows asked for: |rows|·N·C products instead of N²·C."""
    some = torch.stack([q.select(2, row) for row in rows], dim=2)
    keys = k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = (some @ keys.transpose(2, 3)).float() * scale
    if bias is not None:
        bias = bias.reshape(*([1] * (4 - bias.ndim)), *bias.shape)
        own = bias if _is_one(bias.shape[2]) else bias[:, :, rows]
        low = torch.finfo(torch.float32).min
        logits = logits + (torch.where(own, 0.0, low) if own.dtype == torch.bool else own.float())
    return logits.softmax(dim=-1).mean(dim=(1, 2))


def _is_one(size: int) -> bool:
    return isinstance(size, int) and size == 1


def axes(found: AxisMap, node: Node) -> Dims:
    """One score for each key."""
    keys = arg_dims(found, node, 1)
    return keys[0], keys[2]


def samples() -> list[tuple[object, ...]]:
    """One and two rows, no bias, an additive and a boolean one, grouped queries."""
    draw = torch.Generator().manual_seed(4)
    q, k = (torch.randn(2, 4, 6, 8, generator=draw) for _ in range(2))
    mask = torch.rand(2, 1, 1, 6, generator=draw) > 0.3
    full = torch.randn(1, 4, 6, 6, generator=draw)
    return [(q, k, None, [0], 0.3), (q, k, full, [0, 1], 0.3), (q, k[:, :2], mask, [0], 1.0)]


KERNEL = Kernel(torch.ops.effopt.attention_row.default, lowering, axes, samples, 1e-6)
