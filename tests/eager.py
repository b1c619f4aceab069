"""Token merging and pruning in plain eager torch, written from the papers' maths alone.

The oracle of the passes: it shares nothing with effopt. The blocks of a model (`tests.blocks`)
are called one by one; matching works on one sample at a time, with lists. The papers: Bolya et
al. 2022 (arXiv 2210.09461) for merging, Liang et al. 2022 (arXiv 2202.07800) for pruning.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """One block: what attention reads, what its result joins to, and the rest (the MLP).

    `join(x, attended)` is the value that the MLP and its residual read. `bias` [H, N, N] is a
    table that the model adds to the logits, by place.
    """

    before: Callable[[Tensor], Tensor]
    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    join: Callable[[Tensor, Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    heads: int
    bias: Tensor | None = None


@dataclass
class Tokens:
    """The tokens now: x [B, N, C], the originals that each stands for (0: padding), their places.

    `place` [B, N] is the original place of each token's representative; `undo` gives values of
    the tokens now back to the tokens before, one function a reduction.
    """

    x: Tensor
    size: Tensor
    place: Tensor
    undo: list[Callable[[Tensor], Tensor]] = field(default_factory=list)

    def whole(self) -> Tensor:
        """Give every original token its value back."""
        x = self.x
        for step in reversed(self.undo):
            x = step(x)
        return x

    def mean(self, x: Tensor, start: int = 0) -> Tensor:
        """Average over the originals that the tokens from `start` on stand for."""
        weight = self.size[:, start:, None]
        return (x[:, start:] * weight).sum(1) / weight.sum(1)


Step = Callable[[Tokens, Tensor, Tensor], Tokens]
"""A reduction: (tokens, keys [B, H, N, D], attention probabilities [B, H, N, N]) -> tokens."""


def encode(
    x: Tensor,
    real: Tensor | None,
    blocks: Sequence[Block],
    steps: dict[int, Step],
    proportional: bool = True,
) -> Tokens:
    """Run blocks over x [B, N, C]; `real` [B, N] is False for padding; `steps` is by block."""
    b, n, _ = x.shape
    size = torch.ones(b, n) if real is None else real
    tokens = Tokens(x, size.to(x.dtype), torch.arange(n).expand(b, n))
    for number, block in enumerate(blocks):
        seen = block.before(tokens.x)
        keys = _split(block.key(seen), block.heads)
        weights = _probabilities(_split(block.query(seen), block.heads), keys, tokens, block)
        if not proportional:
            weights = _unproportional(_split(block.query(seen), block.heads), keys, tokens, block)
        attended = (weights @ _split(block.value(seen), block.heads)).transpose(1, 2).flatten(2)
        tokens.x = block.join(tokens.x, attended)
        if number in steps:
            tokens = steps[number](tokens, keys, weights)
        tokens.x = block.mlp(tokens.x)
    return tokens


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _logits(query: Tensor, key: Tensor, tokens: Tokens, block: Block) -> Tensor:
    logits = query @ key.transpose(2, 3) / key.shape[-1] ** 0.5
    if block.bias is None:
        return logits
    rows, columns = tokens.place[:, :, None], tokens.place[:, None, :]
    return logits + block.bias[:, rows, columns].transpose(0, 1)


def _probabilities(query: Tensor, key: Tensor, tokens: Tokens, block: Block) -> Tensor:
    """Softmax of logits + log(size of the key): a token counts as often as it has originals."""
    logits = _logits(query, key, tokens, block)
    return (logits + tokens.size.log()[:, None, None, :]).softmax(-1)


def _unproportional(query: Tensor, key: Tensor, tokens: Tokens, block: Block) -> Tensor:
    """Softmax of the logits; padding is hidden."""
    logits = _logits(query, key, tokens, block)
    return logits.masked_fill(tokens.size[:, None, None, :] == 0, -torch.inf).softmax(-1)


def merge(
    r: int, protected: int = 0, ordered: bool = False, behind: int = 0, least: int = 1
) -> Step:
    """Merge r tokens of even places into odd ones; fewer where half of them is less.

    The first `protected` and the last `behind` tokens take no part; `least` tokens stay.
    """

    def step(tokens: Tokens, keys: Tensor, _: Tensor) -> Tokens:
        n = tokens.x.shape[1]
        free = [place for place in range(protected, n - behind) if place % 2 == 0]
        count = max(0, min(r, (n - protected - behind) // 2, len(free), n - least))
        metric = keys.mean(1)
        groups = [
            groups_of(metric[b], tokens.size[b], count, (protected, behind), ordered)
            for b in range(len(metric))
        ]
        return _merged(tokens, groups)

    return step


def groups_of(
    metric: Tensor, size: Tensor, r: int, protected: tuple[int, int], ordered: bool
) -> list[list[int]]:
    """Match one sample's tokens: lists of places that become one, its representative first.

    Bipartite soft matching: even places offer, odd ones receive; the r best pairs merge. Pairs
    with padding (size 0) score -2; protected tokens neither offer nor receive. Ties: lower place.
    """
    n = len(metric)
    front, behind = range(protected[0]), range(n - protected[1], n)
    unit = metric / metric.norm(dim=1, keepdim=True).clamp_min(1e-12)
    offers: list[tuple[float, int, int]] = []
    for source in range(0, n, 2):
        best = (-torch.inf, -1)
        for target in range(1, n, 2):
            score = float(unit[source] @ unit[target])
            if size[source] == 0 or size[target] == 0:
                score = -2.0
            if any(place in ends for place in (source, target) for ends in (front, behind)):
                score = -torch.inf
            if score > best[0]:
                best = (score, target)
        offers.append((-best[0], source, best[1]))
    groups = {place: [place] for place in range(n)}
    for _, source, target in sorted(offers)[:r]:
        del groups[source]
        groups[target].append(source)
    if ordered:
        return list(groups.values())
    even = [group for place, group in groups.items() if place % 2 == 0]
    odd = [group for place, group in groups.items() if place % 2 == 1]
    inner = [g for g in even + odd if g[0] not in front and g[0] not in behind]
    return [groups[place] for place in front] + inner + [groups[place] for place in behind]


def _merged(tokens: Tokens, groups: list[list[list[int]]]) -> Tokens:
    """Average each group, weighted by size; a group of padding alone keeps its first value."""
    xs, sizes, places, homes = [], [], [], []
    for b, sample in enumerate(groups):
        x, size = tokens.x[b], tokens.size[b]
        sums = [size[group].sum() for group in sample]
        means = [
            (size[group, None] * x[group]).sum(0) / total if total > 0 else x[group[0]]
            for group, total in zip(sample, sums, strict=True)
        ]
        home = torch.zeros(len(x), dtype=torch.int64)
        for spot, group in enumerate(sample):
            home[group] = spot
        xs.append(torch.stack(means))
        sizes.append(torch.stack(sums))
        places.append(tokens.place[b][[group[0] for group in sample]])
        homes.append(home)
    home = torch.stack(homes)
    made = Tokens(torch.stack(xs), torch.stack(sizes), torch.stack(places), [*tokens.undo])
    made.undo.append(lambda x: _rows(x, home))
    return made


def _rows(x: Tensor, places: Tensor) -> Tensor:
    return torch.stack([row[spots] for row, spots in zip(x, places, strict=True)])


def prune(
    keep: float,
    picks: Sequence[int] = (0,),
    protected: int = 1,
    fuse: str = "no",
    behind: int = 0,
) -> Step:
    """Keep the share of tokens that the class token attends to most; `fuse`: no, sum or mean.

    The first `protected` and the last `behind` tokens stay. Without picks the score is the
    attention of all real tokens (Goyal et al. 2020, arXiv 2001.08950).
    """

    def step(tokens: Tokens, _: Tensor, weights: Tensor) -> Tokens:
        b, n, _ = tokens.x.shape
        free = n - protected - behind
        count = ceil(keep * free - 1e-9)
        if count == free:
            return tokens
        if picks:
            score = weights[:, :, list(picks)].mean(dim=(1, 2))
        else:
            real = [row > 0 for row in tokens.size]
            score = torch.stack([w[:, r].mean((0, 1)) for w, r in zip(weights, real, strict=True)])
        kept = torch.stack([_best(score[row], count, protected, behind) for row in range(b)])
        if fuse == "no":
            return _dropped(tokens, kept)
        return _fused(tokens, kept, score, fuse == "mean")

    return step


def _best(score: Tensor, count: int, protected: int, behind: int) -> Tensor:
    """Return the protected places and the `count` best others, ascending; ties: lower place."""
    end = len(score) - behind
    others = sorted(range(protected, end), key=lambda place: (-float(score[place]), place))
    return torch.tensor([*range(protected), *sorted(others[:count]), *range(end, len(score))])


def _dropped(tokens: Tokens, kept: Tensor) -> Tokens:
    before = tokens.x

    def undo(x: Tensor) -> Tensor:
        whole = before.clone()
        for row, places in enumerate(kept):
            whole[row, places] = x[row]
        return whole

    size, place = _rows(tokens.size, kept), _rows(tokens.place, kept)
    return Tokens(_rows(before, kept), size, place, [*tokens.undo, undo])


def _fused(tokens: Tokens, kept: Tensor, score: Tensor, normalize: bool) -> Tokens:
    """Append the sum of the dropped tokens, each times its score; or divided by their scores.

    It hides as padding does where all that it stands for is padding; a table by place is read at
    the best of them.
    """
    made = _dropped(tokens, kept)
    xs, sizes, places, homes = [], [], [], []
    for row, places_kept in enumerate(kept.tolist()):
        gone = [place for place in range(tokens.x.shape[1]) if place not in places_kept]
        weight = score[row, gone, None]
        total = (weight * tokens.x[row, gone]).sum(0, keepdim=True)
        xs.append(total / weight.sum().clamp_min(1e-12) if normalize else total)
        sizes.append((tokens.size[row, gone] > 0).any().to(total.dtype)[None])
        places.append(tokens.place[row, gone][score[row, gone].argmax()][None])
        home = torch.full((tokens.x.shape[1],), len(places_kept))
        home[places_kept] = torch.arange(len(places_kept))
        homes.append(home)
    home = torch.stack(homes)
    made.x = torch.cat([made.x, torch.stack(xs)], 1)
    made.size = torch.cat([made.size, torch.stack(sizes)], 1)
    made.place = torch.cat([made.place, torch.stack(places)], 1)
    made.undo[-1] = lambda x: _rows(x, home)
    return made
