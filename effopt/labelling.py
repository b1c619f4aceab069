"""Labelling: the scales of every value of a graph while they are found, and who takes them up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from effopt.labels import Labels
from effopt.program import is_tensor, value

LARGEST = 1 << 20
"""Above so many elements, a table has one label for each place of its last dimension."""


@dataclass(frozen=True, eq=False)
class Site:
    """A constant that takes up scales where `reader` reads it: P becomes P * S[times] / S[over].

    Both are labels (int64) that broadcast to the constant's shape, or None for the scale 1.
    """

    reader: Node
    constant: Node
    times: Tensor | None
    over: Tensor | None


@dataclass
class Labelling:
    """The labels of every value while they are found; None stands for all pinned.

    `own` are the constants with one reader, `sizes` gives a number for each symbolic size,
    `blame` the node that a value of no labels is due to, `columns` the labels that each linear
    layer reads, one for each input channel.
    """

    own: frozenset[Node]
    sizes: Callable[[Any], int]
    labels: Labels = field(default_factory=Labels)
    at: dict[Node, Any] = field(default_factory=dict)
    blame: dict[Node, Node] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    columns: dict[Node, Tensor | None] = field(default_factory=dict)
    order: list[Node] = field(default_factory=list)

    @property
    def cause(self) -> int:
        """The number of the node that is being looked at: its place in `order`."""
        return len(self.order) - 1

    def of(self, arg: Any) -> Tensor | None:
        """Return the labels of an operand; None for numbers and for what is pinned."""
        if not is_tensor(arg) or not value(arg).is_floating_point():
            return None
        if arg in self.own and arg not in self.at:
            shape = self.shape(arg)
            short = int(np.prod(shape)) > LARGEST
            self.at[arg] = self.absorb(arg, shape[-1:] if short else shape).expand(shape)
        found: Tensor | None = self.at.get(arg)
        return found

    def absorb(self, constant: Node, shape: Sequence[int], times: Tensor | None = None) -> Tensor:
        """Note that the one reader of a constant divides it by fresh scales, of this shape."""
        over = self.labels.fresh(*shape)
        self.sites.append(Site(next(iter(constant.users)), constant, times, over))
        return over

    def shape(self, node: Node) -> tuple[int, ...]:
        """Return the sizes of a tensor, with numbers for the symbols."""
        return tuple(map(self.sizes, value(node).shape))

    def pin(self, *args: Any) -> None:
        """Give operands the scale 1; a constant that is read here is not touched any more."""
        for arg in args:
            if isinstance(arg, Node) and arg in self.own and arg not in self.at:
                self.at[arg] = None
            found = self.of(arg)
            if found is not None:
                self.labels.pin(found, self.cause)

    def free(self, labels: Tensor | None) -> bool:
        """Tell whether something can still be chosen among labels."""
        return labels is not None and bool(self.labels.roots(labels).any())

    def level(self, labels: Tensor, dims: Sequence[int]) -> Tensor:
        """Make labels equal along dimensions, and return them with those of size 1."""
        head = labels
        for dim in dims:
            head = head.narrow(dim, 0, 1)
        self.labels.unite(labels, head, self.cause)
        return head

    def channels(self, arg: Any) -> Tensor | None:
        """Make the labels of an operand equal along all but the last dimension: [C]."""
        labels = self.of(arg)
        if labels is None:
            return None
        return self.level(labels, range(labels.ndim - 1)).reshape(-1)

    def varies(self, labels: Tensor, dim: int) -> bool:
        """Tell whether labels differ along a dimension."""
        if labels.shape[dim] < 2 or labels.stride(dim) == 0:
            return False
        head = labels.narrow(dim, 0, 1).expand(labels.shape)
        if torch.equal(labels, head):
            return False
        return bool((self.labels.roots(labels) != self.labels.roots(head)).any())
