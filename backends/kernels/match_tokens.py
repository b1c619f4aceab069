"""match_tokens: which tokens merge into which (bipartite soft matching).

Bolya et al., "Token Merging: Your ViT But Faster", 2022 (arXiv 2210.09461), section 3.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims, fresh
from effopt.backends.kernels.common import arg_dims, reduced
from effopt.kernel import Kernel
from effopt.program import value

PAD, ONTO_PAD, PROTECTED, WRONG = -2.0, -3.0, -4.0, -6.0
"""Scores below every cosine, in the order in which tokens would have to go: padding, what has only
padding to merge into; never the protected, never the wrong parity."""


@torch.library.custom_op("effopt::match_tokens", mutates_args=())
def match_tokens(
    metric: Tensor, size: Tensor, r: int, keep: int, prefix: int, suffix: int, ordered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose r tokens at even places to merge, each into its most similar token at an odd place.

    metric [B, N, D] is compared by cosine, in float32. size [B, N] is 0 for padding, which goes
    last, and is nobody's target while there is another. `keep` is N - r, given apart so that a
    free length is seen not to be negative. The first `prefix` and the last `suffix` tokens take
    no part. Ties go to the lower place. Returns, all int64 and counted in 0..N-1: kept [B, keep],
    source [B, r], target [B, r].

    kept is ascending if `ordered`; otherwise it is prefix, even places, odd places, suffix, each
    ascending: the published order, which the even/odd split of a next site depends on.
    """
    return _match(metric, size, r, keep, prefix, suffix, ordered, _stable_top)


@match_tokens.register_fake
def _(
    metric: Tensor, size: Tensor, r: int, keep: int, prefix: int, suffix: int, ordered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    b = metric.shape[0]
    kept = size.new_empty((b, keep), dtype=torch.int64)
    source, target = (size.new_empty((b, r), dtype=torch.int64) for _ in range(2))
    return kept, source, target


def lowering(
    metric: Tensor, size: Tensor, r: int, keep: int, prefix: int, suffix: int, ordered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Same, with TopK in place of the stable sort: its ties go to the lower index in ONNX."""
    return _match(metric, size, r, keep, prefix, suffix, ordered, _top)


def _match(
    metric: Tensor,
    size: Tensor,
    r: int,
    keep: int,
    prefix: int,
    suffix: int,
    ordered: bool,
    top: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    n = metric.shape[1]
    place = torch.arange(n, device=metric.device)
    guarded = (place < prefix) | (place >= n - suffix)
    unit = metric.float() / metric.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    pairs = _pairs_of_halves if isinstance(n, int) else _pairs_of_all
    source_floor = torch.where(guarded, PROTECTED, torch.where(size > 0, 1.0, PAD))
    target_floor = torch.where(guarded, PROTECTED, torch.where(size > 0, 1.0, ONTO_PAD))
    best, source_at, partner = pairs(unit, source_floor, target_floor)
    chosen = top(best, r)
    source = chosen * source_at
    target = partner.gather(1, chosen)
    gone = (source.unsqueeze(2) == place).any(dim=1)
    turn = place if ordered else place + n * _group(place, prefix, suffix)
    kept = torch.where(gone, -4.0 * n, -turn.float()).topk(keep, dim=1).indices
    return kept, source, target


def _pairs_of_halves(
    unit: Tensor, source_floor: Tensor, target_floor: Tensor
) -> tuple[Tensor, int, Tensor]:
    """Compare even with odd places: their best scores, places apart, and best partners."""
    even, odd = _halves(unit)
    source, target = _halves(source_floor)[0], _halves(target_floor)[1]
    score = torch.minimum(even @ odd.transpose(1, 2), target.unsqueeze(1))
    best, partner = score.max(dim=-1)
    return torch.where(source < 0, source, best), 2, partner * 2 + 1


def _pairs_of_all(
    unit: Tensor, source_floor: Tensor, target_floor: Tensor
) -> tuple[Tensor, int, Tensor]:
    """Compare all places and rule out the wrong parity: a free N has no half of known size."""
    even = torch.arange(unit.shape[1], device=unit.device) % 2 == 0
    target = torch.where(even, WRONG, target_floor)
    score = torch.minimum(unit @ unit.transpose(1, 2), target.unsqueeze(1))
    best, partner = score.max(dim=-1)
    best = torch.where(source_floor < 0, source_floor, best)
    return torch.where(even, best, WRONG), 1, partner


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cut dimension 1 into even and odd places, contiguous: views would fix the parity of N."""
    keep = torch.contiguous_format
    return x[:, ::2].clone(memory_format=keep), x[:, 1::2].clone(memory_format=keep)


def _group(place: Tensor, prefix: int, suffix: int) -> Tensor:
    """Number the groups of the published order: prefix 0, even 1, odd 2, suffix 3."""
    n = place.shape[0]
    inner = 1 + place % 2
    return torch.where(place < prefix, 0, torch.where(place >= n - suffix, 3, inner))


def _stable_top(best: Tensor, r: int) -> Tensor:
    return best.sort(dim=1, descending=True, stable=True).indices[:, :r]


def _top(best: Tensor, r: int) -> Tensor:
    return best.topk(r, dim=1).indices


def axes(found: AxisMap, node: Node) -> tuple[Dims, ...]:
    """kept is what is left of the tokens; source and target share a new axis."""
    batch, tokens, _ = arg_dims(found, node, 0)
    kept, source, _ = value(node)
    pair = fresh(f"{node.name}.pairs", source.shape[1])
    return (batch, reduced(node, tokens, kept.shape[1])), (batch, pair), (batch, pair)


def samples() -> list[tuple[object, ...]]:
    """Sizes even and odd, all protections, padding, r up to the most that may go."""
    draw = torch.Generator().manual_seed(0)
    cases = [(2, 9, 2, 1, 0, False), (1, 10, 4, 1, 0, True), (3, 8, 3, 2, 0, False)]
    cases += [(2, 7, 2, 1, 1, True), (2, 12, 6, 0, 0, False), (2, 8, 1, 0, 0, True)]
    made: list[tuple[object, ...]] = []
    for b, n, r, prefix, suffix, ordered in cases:
        size = torch.ones(b, n)
        size[0, n - 2 :] = 0.0
        metric = torch.randn(b, n, 8, generator=draw)
        made.append((metric, size, r, n - r, prefix, suffix, ordered))
    return made


KERNEL = Kernel(torch.ops.effopt.match_tokens.default, lowering, axes, samples, 0.0)
