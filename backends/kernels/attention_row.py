"""attention_row: how much queries attend to each token, without the whole attention map.

One row is the score of Liang et al., "Not All Patches are What You Need" (EViT), 2022 (arXiv
2202.07800); the mean over all rows that of Goyal et al., "PoWER-BERT", 2020 (arXiv 2001.08950).
"""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import arg_dims
from effopt.kernel import Kernel


@torch.library.custom_op("effopt::attention_row", mutates_args=())
def attention_row(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    size: Tensor,
    rows: list[int],
    scale: float,
    causal: bool,
) -> Tensor:
    """Return score [B, N]: softmax(q k^T scale + bias) of the queries `rows`, mean over heads.

    Without rows it is the mean over all queries, weighted by size [B, N], so that padding has no
    say. q [B, H, N, D], k [B, G, N, D] with G dividing H (grouped queries share keys); bias
    broadcasts to [B, H, N, N] and is added, or masks where it is bool and False; `causal` hides
    from each query what comes later. Softmax is in float32.
    """
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("bhqd,bhkd->bhqk", q.float(), keys.float()) * scale
    for mask in (
        bias,
        torch.ones(logits.shape[2:], device=q.device).tril().bool() if causal else None,
    ):
        logits = logits if mask is None else logits + _additive(mask)
    weights = logits.softmax(dim=-1).mean(dim=1)
    if rows:
        return weights[:, rows].mean(dim=1)
    share = size.float() / size.float().sum(dim=1, keepdim=True).clamp_min(1e-6)
    return torch.einsum("bq,bqk->bk", share, weights)


@attention_row.register_fake
def _(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    size: Tensor,
    rows: list[int],
    scale: float,
    causal: bool,
) -> Tensor:
    return k.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)


def lowering(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    size: Tensor,
    rows: list[int],
    scale: float,
    causal: bool,
) -> Tensor:
    """Read only the rows asked for: |rows|·N·C products instead of N²·C."""
    some = torch.stack([q.select(2, row) for row in rows], dim=2) if rows else q
    keys = k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = (some @ keys.transpose(2, 3)).float() * scale
    if bias is not None:
        bias = bias.reshape(*([1] * (4 - bias.ndim)), *bias.shape)
        logits = logits + _additive(
            bias if _is_one(bias.shape[2]) or not rows else bias[:, :, rows]
        )
    if causal:
        logits = logits + _additive(_seen(q, rows))
    weights = logits.softmax(dim=-1).mean(dim=1)
    if rows:
        return weights.mean(dim=1)
    wide = size.float().unsqueeze(2)
    return (weights * wide).sum(dim=1) / wide.sum(dim=1).clamp_min(1e-6)


def _additive(mask: Tensor) -> Tensor:
    low = torch.finfo(torch.float32).min
    return torch.where(mask, 0.0, low) if mask.dtype == torch.bool else mask.float()


def _seen(q: Tensor, rows: list[int]) -> Tensor:
    """Return [rows, N]: which keys come no later than each query."""
    place = torch.arange(q.shape[2], device=q.device)
    own = torch.stack([place[row] for row in rows]) if rows else place
    return place <= own.unsqueeze(1)


def _is_one(size: int) -> bool:
    return isinstance(size, int) and size == 1


def axes(found: AxisMap, node: Node) -> Dims:
    """One score for each key."""
    keys = arg_dims(found, node, 1)
    return keys[0], keys[2]


def samples() -> list[tuple[object, ...]]:
    """One, two and all rows, no bias, an additive and a boolean one, causal, grouped queries."""
    draw = torch.Generator().manual_seed(4)
    q, k = (torch.randn(2, 4, 6, 8, generator=draw) for _ in range(2))
    mask = torch.rand(2, 1, 1, 6, generator=draw) > 0.3
    full = torch.randn(1, 4, 6, 6, generator=draw)
    size = torch.tensor([[1.0, 2, 1, 1, 3, 1], [1, 1, 1, 1, 0, 0]])
    return [
        (q, k, None, size, [0], 0.3, False),
        (q, k, full, size, [0, 1], 0.3, False),
        (q, k[:, :2], mask, size, [0], 1.0, False),
        (q, k, full, size, [], 0.3, False),
        (q, k, None, size, [-1, 2], 0.3, True),
        (q, k, mask, size, [], 0.3, True),
    ]


KERNEL = Kernel(torch.ops.effopt.attention_row.default, lowering, axes, samples, 1e-6)
