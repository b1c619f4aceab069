"""attention_row: how much queries attend to each token, without the whole attention map.

One row is the score of Liang et al., "Not All Patches are What You Need" (EViT), 2022 (arXiv
2202.07800); the mean over all rows that of Goyal et al., "PoWER-BERT", 2020 (arXiv 2001.08950).
"""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import Value, arg_dims, op
from effopt.kernel import Kernel
from effopt.plugin import Plugin, Port, call


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
    keys = k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = (_asked(q, rows) @ keys.transpose(2, 3)).float() * scale
    for added in _added(q, bias, rows, causal):
        logits = logits + added
    weights = logits.softmax(dim=-1).mean(dim=1)
    if rows:
        return weights.mean(dim=1)
    wide = size.float().unsqueeze(2)
    return (weights * wide).sum(dim=1) / wide.sum(dim=1).clamp_min(1e-6)


def _asked(q: Tensor, rows: list[int]) -> Tensor:
    """Take the rows asked for: [B, H, R, D]."""
    return torch.stack([q.select(2, row) for row in rows], dim=2) if rows else q


def _added(q: Tensor, bias: Tensor | None, rows: list[int], causal: bool) -> list[Tensor]:
    """Return what is added to the logits of the rows asked for, each of rank 4, in float32."""
    found = []
    if bias is not None:
        bias = bias.reshape(*([1] * (4 - bias.ndim)), *bias.shape)
        found.append(_additive(bias if _is_one(bias.shape[2]) or not rows else bias[:, :, rows]))
    if causal:
        found.append(_additive(_seen(q, rows))[None, None])
    return found


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
    """One, two, most and all rows, every kind of bias, causal, grouped queries; many keys."""
    draw = torch.Generator().manual_seed(4)
    q, k = (torch.randn(2, 4, 6, 8, generator=draw) for _ in range(2))
    mask = torch.rand(2, 1, 1, 6, generator=draw) > 0.3
    full = torch.randn(1, 4, 6, 6, generator=draw)
    size = torch.tensor([[1.0, 2, 1, 1, 3, 1], [1, 1, 1, 1, 0, 0]])
    large, keys = (torch.randn(1, 2, 50, 7, generator=draw) for _ in range(2))
    long, longer = (torch.randn(1, 1, 1200, 24, generator=draw) for _ in range(2))
    return [
        (q, k, None, size, [0], 0.3, False),
        (q, k, full, size, [0, 1], 0.3, False),
        (q, k[:, :2], mask, size, [0], 1.0, False),
        (q, k, full, size, [], 0.3, False),
        (q, k, None, size, [-1, 2], 0.3, True),
        (q, k, mask, size, [], 0.3, True),
        (q, k, size.log()[:, None, None], size, [0], 0.3, False),
        (large, keys, None, torch.rand(1, 50, generator=draw), [], 0.4, True),
        (
            long,
            longer,
            torch.randn(1, 1, generator=draw),
            torch.ones(1, 1200),
            [0, 5, 9],
            0.2,
            False,
        ),
    ]


# --- on a GPU ---------------------------------------------------------------------------------

CHUNK = 32
"""Query rows of one block."""

LIMITS = (5000, 512)
"""Keys, and channels of a head, up to which a block holds rows of logits in 40 KB."""


def body(q: Value, k: Value, bias: Value, weight: Value, scale: float) -> Value:
    """Products of grouped queries with their keys, softmax, and sums over chunks of 32 rows."""
    places = op.Concat(op.Shape(k, start=0, end=2), [-1], op.Shape(q, start=3, end=4), axis=0)
    grouped = op.MatMul(op.Reshape(q, places), op.Transpose(k, perm=[0, 1, 3, 2]))
    wanted = op.Concat(op.Shape(q, start=0, end=3), op.Shape(k, start=2, end=3), axis=0)
    logits = op.Mul(op.Cast(op.Reshape(grouped, wanted), to=1), scale)
    attention = op.Softmax(op.Add(logits, bias), axis=-1)
    row = op.Range(0, op.Squeeze(op.Shape(q, start=2, end=3)), 1)
    last = op.Div(op.Sub(op.Shape(q, start=2, end=3), 1), CHUNK)
    chunks = op.Range(0, op.Squeeze(op.Add(last, 1)), 1)
    inside = op.Equal(op.Unsqueeze(chunks, [1]), op.Unsqueeze(op.Div(row, CHUNK), [0]))
    share = op.Mul(op.Cast(inside, to=1), op.Unsqueeze(weight, [1, 2]))
    heads = op.Cast(op.Shape(q, start=1, end=2), to=1)
    return op.Div(op.MatMul(share, attention), heads)


def adapt(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    size: Tensor,
    rows: list[int],
    scale: float,
    causal: bool,
) -> Tensor:
    """Launch on the rows asked for, with all masks in one bias that broadcasts and is added.

    Lengths that are dynamic, or of more than LIMITS, go without.
    """
    lengths = (k.shape[2], k.shape[3])
    if not all(isinstance(n, int) and n <= m for n, m in zip(lengths, LIMITS, strict=True)):
        return lowering(q, k, bias, size, rows, scale, causal)
    asked, added = _asked(q, rows), _added(q, bias, rows, causal)
    total = sum(added[1:], added[0]) if added else q.new_zeros((1, 1, 1, 1), dtype=torch.float32)
    if rows:
        share = size.new_full((q.shape[0], len(rows)), 1 / len(rows), dtype=torch.float32)
    else:
        share = size.float() / size.float().sum(dim=1, keepdim=True).clamp_min(1e-6)
    (parts,) = call(PLUGIN, (asked, k, total, share), scale=scale)
    return parts.sum(dim=(1, 2))


PLUGIN = Plugin(
    name="AttentionRow",
    stem="attention_row",
    inputs=(
        Port("q", "T", ("B", "H", "R", "D")),
        Port("k", "T", ("B", "G", "N", "D")),
        Port("bias", "float32", ("Bb", "Hb", "Rb", "Nb")),
        Port("weight", "float32", ("B", "R")),
    ),
    outputs=(Port("parts", "float32", ("B", "H", f"cdiv(R, {CHUNK})", "N")),),
    attributes={"scale": float},
    scalars=("H", "R", "D", "G", "N", "Bb", "Hb", "Rb", "Nb", "bits(scale)"),
    grid=("B", "H", f"cdiv(R, {CHUNK})"),
    shared="40960",
    body=body,
    adapt=adapt,
)
"""Parts of the score, whose sum over heads and chunks of rows it is: blocks know nothing of each
other within a launch, and one block for all heads would leave most of a GPU idle at small batch."""

KERNEL = Kernel(torch.ops.effopt.attention_row.default, lowering, axes, samples, 1e-6, PLUGIN)
