"""The state of a reduction walk: versions of values, sizes, and what was done at each site."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node
from torch.utils import _pytree as pytree

from effopt.axes import Size
from effopt.edit import Edit
from effopt.program import is_tensor
from effopt.sites import TokenAxis
from effopt.tokens import Kind

Length = int | Node
"""A number of tokens: fixed, or the node that yields it."""


@dataclass(frozen=True)
class Point:
    """What a pass sees at a site: x [B, N, C], query and key [B, H, N, D] of the same block.

    `bias` is what the attention call adds or masks with, `causal` whether it hides what comes
    later; `size` [B, N] counts the originals that each token stands for (0 for padding). The
    first `prefix` and the last `suffix` tokens stay; `picks` are those that outputs read, and
    `marked` [B, N] is true for those that they read at places which the inputs say. `ordered`:
    survivors must keep their order.
    """

    edit: Edit
    x: Node
    query: Node
    key: Node
    bias: Node | None
    scale: float
    causal: bool
    size: Node
    length: Size
    prefix: int
    suffix: int
    picks: tuple[int, ...]
    marked: Node | None
    ordered: bool


@dataclass(frozen=True)
class Reduction:
    """What a pass decided at a site.

    `kept` [B, K] are the places of the tokens that stand for those after; `size` [B, K] their new
    sizes, None if tokens were dropped; `proportional` says whether attention adds their
    logarithm (for padding it always does). `combine(edit, x [B, N, C])` reduces a value of the
    residual stream. `group(edit)` yields [B, N], the place after of each token before, or is None
    where tokens are gone: then outputs get back the value that `frozen` [B, N, C] had.
    """

    kept: Node
    size: Node | None
    proportional: bool
    combine: Callable[[Edit, Node], Node]
    group: Callable[[Edit], Node] | None
    frozen: Node


Reducer = Callable[[Point], Reduction | None]
"""Chooses tokens at a site; None if none can leave there."""


@dataclass
class State:
    """Versions of every value by epoch, and for each epoch its sizes and length."""

    axis: TokenAxis
    padding: Node | None
    reductions: list[Reduction] = field(default_factory=list)
    places: list[Node] = field(default_factory=list)
    sizes: list[Any] = field(default_factory=lambda: [None])
    lengths: list[Any] = field(default_factory=list)
    epochs: dict[Node, int] = field(default_factory=dict)
    versions: dict[Node, dict[int, Node]] = field(default_factory=dict)
    originals: dict[Node, tuple[Any, Any]] = field(default_factory=dict)
    log_sizes: dict[int, Node] = field(default_factory=dict)

    feeds_attention: set[Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.lengths = [self.axis.size]
        self.feeds_attention = feeding(self.axis)

    def carries(self, node: Node) -> bool:
        """Tell whether a value of the program carries tokens of the axis."""
        return bool(self.axis.tokens.on(node))

    def latest(self, node: Node) -> int:
        """Return the epoch of a value: how many reductions it has been through."""
        return self.epochs.get(node, 0)

    def at(self, node: Node, epoch: int) -> Node:
        """Return a value at an epoch at which it is known."""
        return self.versions.get(node, {0: node})[epoch]

    def put(self, node: Node, epoch: int, made: Node) -> None:
        """Say that a value is at an epoch from now on; mended in place, it has no earlier form."""
        self.epochs[node] = epoch
        earlier = {} if made is node else self.versions.get(node, {0: node})
        self.versions[node] = {**earlier, epoch: made}

    def operands(self, node: Node) -> list[Node]:
        """Return the tensors that a node read before it was mended."""
        args = self.originals.get(node, (node.args, node.kwargs))
        return [arg for arg in pytree.tree_leaves(args) if is_tensor(arg)]

    def epoch_of_operands(self, node: Node) -> int:
        """Return the latest epoch among the operands that carry tokens."""
        carried = [arg for arg in node.all_input_nodes if self.carries(arg)]
        return max((self.latest(arg) for arg in carried), default=0)

    def remember(self, node: Node) -> None:
        """Keep the arguments of a node from before it is mended."""
        self.originals[node] = (node.args, node.kwargs)

    def add(self, reduction: Reduction, length: Length, place: Node) -> None:
        """Begin a new epoch, with a reduction of the value at a place of the residual stream."""
        self.reductions.append(reduction)
        self.places.append(place)
        self.sizes.append(reduction.size)
        self.lengths.append(length)


def feeding(axis: TokenAxis) -> set[Node]:
    """Return all that an attention call over the axis depends on, and the calls themselves."""
    todo = [node for node, found in axis.effects.items() if found.kind is Kind.ATTEND]
    found = set[Node]()
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found
