"""Heads of exits: ridge regression in closed form, from features to what the whole model gives.

The features are standardised, and the penalty is one of a few, by held-out rows. For C answers
and F features: W = (A^T A + lambda n I)^-1 A^T (T - mean T), with A [n, F] and T [n, C]. A tuned
lens (Belrose et al., arXiv 2303.08112) is the same map to the last hidden state, ahead of the
model's own head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from effopt.errors import UsageError

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""What lambda may be, as features of deviation 1 see it."""

_FLAT = 1e-6
"""A feature that deviates by less than this part of its mean says nothing: float32 rounds it."""


def deviation_of(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return the deviation [F] to divide by: infinity where a feature says nothing."""
    return torch.where(deviation <= _FLAT * mean.abs(), torch.inf, deviation)


@dataclass(frozen=True, eq=False)
class Head:
    """A linear layer: `weight` [C, F] and `bias` [C] float64, fitted with the penalty `lam`."""

    weight: Tensor
    bias: Tensor
    lam: float

    def __call__(self, features: Tensor) -> Tensor:
        """Return the answers [n, C] to features [n, F], in float64."""
        return linear(features.double(), self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums of features [F], targets [C], and their products [F, F] and [F, C], in float64.

    Both are counted from those of the first row, `origin`: means may be far above deviations.
    """

    origin: tuple[Tensor, Tensor]
    features: Tensor
    targets: Tensor
    gram: Tensor
    cross: Tensor


@dataclass
class Moments:
    """What ridge regression needs of rows of features [F] and targets [C], as they stream by.

    Memory: 8 * (F^2 + F C) bytes, whatever the number of rows.
    """

    rows: int = 0
    sums: _Sums | None = None

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Take features [n, F] and targets [n, C]; UsageError for NaN and infinity."""
        a, t = features.double(), targets.double()
        if not bool(a.isfinite().all() & t.isfinite().all()):
            raise UsageError("the values hold NaN or infinity", "leave such samples out")
        if not len(a):
            return
        held = self.sums
        origin = (a[0], t[0]) if held is None else held.origin
        a, t = a - origin[0], t - origin[1]
        more = a.sum(0), t.sum(0), a.T @ a, a.T @ t
        if held is not None:
            before = held.features, held.targets, held.gram, held.cross
            more = tuple(map(torch.add, before, more))  # type: ignore[assignment]
        self.sums = _Sums(origin, *more)
        self.rows += len(a)

    def solve(self, penalties: Sequence[float] = PENALTIES) -> Iterator[Head]:
        """Yield a head for each penalty; mean and deviation of the features are folded into it."""
        sums, count = self.sums, self.rows
        assert sums is not None, "rows"
        mean, base = sums.features / count, sums.targets / count
        spread = sums.gram / count - torch.outer(mean, mean)
        wanted = sums.cross / count - torch.outer(mean, base)
        mean, base = mean + sums.origin[0], base + sums.origin[1]
        scale = 1 / deviation_of(mean, spread.diagonal().clamp_min(0).sqrt())
        standard, wanted = spread * torch.outer(scale, scale), wanted * scale[:, None]
        for lam in penalties:
            system = standard + lam * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
            solved = torch.cholesky_solve(wanted, torch.linalg.cholesky(system))
            weight = (solved * scale[:, None]).T.contiguous()
            yield Head(weight, base - weight @ mean, lam)


def split_head(head: Head, widths: Sequence[int]) -> list[Head]:
    """Cut a head of several answers into one for each, of so many columns."""
    pairs = zip(_columns(head.weight, widths), _columns(head.bias, widths), strict=True)
    return [Head(weight, bias, head.lam) for weight, bias in pairs]


def _columns(rows: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    return rows.split_with_sizes(list(widths))


def by_class(logits: Tensor, classes: int) -> Tensor:
    """Lay out [n, C] as rows of so many classes: [n, C / classes, classes]."""
    return logits.reshape(len(logits), -1, classes)


def agreement(answers: Tensor, wanted: Tensor) -> float:
    """Return on what part of rows [..., C] the largest of the C is the same."""
    return float((answers.argmax(-1) == wanted.argmax(-1)).double().mean())


def fitness(head: Head, features: Tensor, wanted: Tensor, classes: int) -> tuple[float, float]:
    """Say how well a head does on features [n, F]: agreement, then the squared error, negated.

    `wanted` [n, C] are scores of classes, `classes` at a time; with 1 there is only the error.
    """
    answers, wanted = head(features), wanted.double()
    error = float((answers - wanted).square().mean())
    return agreement(*(by_class(x, classes) for x in (answers, wanted))), -error
