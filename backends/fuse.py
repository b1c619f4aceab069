"""Fusing kernels of a graph: two of them that one launch does together become one.

A launch costs a GPU microseconds, more than the work of choosing tokens. What does not fit a
pattern stays as it is, in kernels of its own.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from effopt.kernel import kernel


@dataclass(frozen=True)
class Fusion:
    """One call in place of others: its operator, arguments, and values as `meta["val"]` has them.

    `stands` tells for each node that is read which result takes its place; `drops` are the nodes
    that go with these, readers first.
    """

    target: Any
    args: tuple[Any, ...]
    values: tuple[Any, ...]
    stands: Mapping[Node, int]
    drops: tuple[Node, ...]


def fuse(graph: Graph) -> None:
    """Fuse what the patterns know, in place; new nodes have their values, order stays legal."""
    known = {kernel(name).op: pattern for name, pattern in PATTERNS.items()}
    for node in list(graph.nodes):
        pattern = known.get(node.target)
        found = pattern(node) if pattern else None
        if found is not None:
            _put(graph, node, found)


def _put(graph: Graph, root: Node, fusion: Fusion) -> None:
    """Call where the first node stood, or behind the last argument where all readers are later."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    own = {*fusion.stands, *fusion.drops}
    last = max((arg for arg in fusion.args if isinstance(arg, Node)), key=order.__getitem__)
    readers = [reader for node in own for reader in node.users if reader not in own]
    if any(order[reader] <= order[last] for reader in readers):
        return
    with graph.inserting_before(root if order[last] < order[root] else last.next):
        made = graph.call_function(fusion.target, fusion.args)
        made.meta = {**root.meta, "val": fusion.values}
        for node, place in fusion.stands.items():
            item = graph.call_function(operator.getitem, (made, place))
            item.meta = {**node.meta, "val": fusion.values[place]}
            node.replace_all_uses_with(item, lambda reader: reader not in own)
    for node in sorted(own, key=order.__getitem__, reverse=True):
        graph.erase_node(node)


# --- the patterns -----------------------------------------------------------------------------


def _match_and_merge(match: Node) -> Fusion | None:
    """A match of which one value is merged, by the sizes that were matched."""
    parts, merges = list(match.users), set[Node]()
    for part in parts:
        merges |= {user for user in part.users if user.target is kernel("merge_tokens").op}
    if len(merges) != 1:
        return None
    (merge,) = merges
    metric, size, *options = match.args
    x, weights, *pairs = merge.args
    taken = [(pair.target, pair.args) for pair in pairs if isinstance(pair, Node)]
    if weights is not size or taken != [(operator.getitem, (match, n)) for n in range(3)]:
        return None
    stands = {part: 2 + _place(part) for part in parts}
    stands |= {part: _place(part) for part in merge.users}
    values = (*merge.meta["val"], *match.meta["val"])
    args = (metric, x, size, *options)
    return Fusion(kernel("match_merge").op, args, values, stands, (merge, match))


def _place(item: Node) -> int:
    """Return which result a node takes; results of several are read by getitem alone."""
    place = item.args[1]
    assert item.target is operator.getitem
    assert isinstance(place, int)
    return place


def _select_and_gather(select: Node) -> Fusion | None:
    """A selection by which rows of hidden states are taken, and perhaps a number of each row."""
    gathers = [user for user in select.users if user.target is kernel("gather_tokens").op]
    taken = [node for node in gathers if node.args[1:] == (select, 1)]
    rows = [node for node in taken if _is_rows(node.args[0])]
    if not rows:
        return None
    numbers = [node for node in taken if _is_numbers(node.args[0])]
    score, *options = select.args
    along = numbers[0].args[0] if numbers else score
    chosen = select.meta["val"]
    values = (rows[0].meta["val"], chosen.to(torch.float32), chosen)
    stands = {rows[0]: 0, select: 2} | {node: 1 for node in numbers[:1]}
    args = (rows[0].args[0], score, along, *options)
    return Fusion(kernel("prune_tokens").op, args, values, stands, ())


def _is_rows(x: Any) -> bool:
    """Tell whether a value is [B, N, C] of floats, with a batch of its own."""
    val = x.meta["val"]
    return bool(val.ndim == 3 and val.is_floating_point() and not _is_shared(val))


def _is_numbers(x: Any) -> bool:
    """Tell whether a value is [B, N] in float32, with a batch of its own."""
    val = x.meta["val"]
    return bool(val.ndim == 2 and val.dtype == torch.float32 and not _is_shared(val))


def _is_shared(val: Any) -> bool:
    """Tell whether a value is one for all samples, which a launch would read as one each."""
    return isinstance(val.shape[0], int) and val.shape[0] == 1


PATTERNS: Mapping[str, Callable[[Node], Fusion | None]] = {
    "match_tokens": _match_and_merge,
    "select_tokens": _select_and_gather,
}
"""By the kernel that a fusion begins with."""
