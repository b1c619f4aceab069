"""Labels: numbers that stand for scales; those that must be equal are united (union-find).

All work is on arrays: an analysis of a large model unites hundreds of thousands of pairs.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
FREE = np.iinfo(np.int64).max
"""The cause of a label that nothing has pinned."""

GIVEN = FREE - 1
"""The cause of label 0."""


class Labels:
    """A partition of labels; a class is free, or pinned by a cause (a number, 0 and up).

    Label 0 is pinned from the start: it stands for the scale 1. Tensors of labels are int64; a
    dimension of stride 0 repeats one label, and is not walked over.
    """

    def __init__(self) -> None:
        self.count = 1
        self._parent: Ints = np.zeros(1024, dtype=np.int64)
        self._cause: Ints = np.full(1024, GIVEN, dtype=np.int64)

    def fresh(self, *shape: int) -> Tensor:
        """Make free labels, another for each element."""
        made = torch.arange(self.count, self.count + int(np.prod(shape))).reshape(shape)
        start, self.count = self.count, self.count + made.numel()
        while self.count > len(self._parent):
            self._parent = np.concatenate((self._parent, np.zeros_like(self._parent)))
            self._cause = np.concatenate((self._cause, np.zeros_like(self._cause)))
        self._parent[start : self.count] = np.arange(start, self.count)
        self._cause[start : self.count] = FREE
        return made

    def roots(self, labels: Tensor) -> Ints:
        """Return one number for each class, 0 for all that are pinned, in the labels' shape."""
        found = self._find(labels.numpy())
        return np.where(self._cause[found] == FREE, found, 0)

    def causes(self, labels: Tensor) -> Ints:
        """Return what pinned each label, FREE where nothing did."""
        return self._cause[self._find(labels.numpy())]

    def pin(self, labels: Tensor, cause: int) -> None:
        """Make labels stand for the scale 1; the first cause of a class is kept."""
        found = self._find(_core(labels)[0].numpy())
        self._cause[found] = np.minimum(self._cause[found], cause)

    def unite(self, left: Tensor, right: Tensor, cause: int) -> None:
        """Make labels equal to others that broadcast to them; pinned ones pin the others."""
        cores = _core(left, right.expand(left.shape))
        pairs = np.stack([self._find(core.numpy()).reshape(-1) for core in cores])
        pairs = np.unique(pairs[:, pairs[0] != pairs[1]], axis=1)
        pinned = self._cause[pairs] != FREE
        self._merge(pairs[:, ~pinned.any(axis=0)])
        joined = self._find(pairs[:, pinned[0] != pinned[1]])
        np.minimum.at(self._cause, joined[self._cause[joined] == FREE], cause)

    def _merge(self, pairs: Ints) -> None:
        """Hang the higher root of each pair below the lower, until no two roots are apart."""
        while pairs.size:
            low, high = pairs.min(axis=0), pairs.max(axis=0)
            np.minimum.at(self._parent, high, low)
            pairs = self._find(pairs)
            pairs = np.unique(pairs[:, pairs[0] != pairs[1]], axis=1)

    def _find(self, labels: Ints) -> Ints:
        found = self._parent[labels]
        while ((beyond := self._parent[found]) != found).any():
            found = beyond
        self._parent[labels] = found
        return found


def _core(*labels: Tensor) -> list[Tensor]:
    """Keep one place of each dimension along which all tensors, of one shape, repeat a label."""
    repeats = [not any(strides) for strides in zip(*(t.stride() for t in labels), strict=True)]
    return [t[tuple(slice(1) if same else slice(None) for same in repeats)] for t in labels]


def spread(labels: Tensor) -> int:
    """Return how many elements a tensor has apart from those that repeat by stride 0."""
    return _core(labels)[0].numel()
