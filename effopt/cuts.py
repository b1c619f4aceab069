"""Cuts: places behind a block where one value carries all that the rest of the model reads.

A model can end early only there. A value is a *feature* if it comes from what the inputs hold and
from learned weights, through a layer. A cut is a feature that lies on every way from the first
features to the outputs. Masks, positions and biases by position are no features: they are made from
the inputs, from sizes or from weights alone, and are at hand wherever the model ends. Nor are the
heads of exits: the model goes on as if they were not there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.fx import Node

from effopt.attention import SDPA
from effopt.axes import same_size, same_sizes
from effopt.axis_table import family
from effopt.cost import macs_by_node
from effopt.errors import PreconditionError
from effopt.exits import find_exits
from effopt.kernel import kernel
from effopt.masks import ACTIVATIONS
from effopt.program import Program, is_tensor, shape, value

aten = torch.ops.aten

SIZE_ONLY = (
    *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default),
    aten.empty_like.default,
)
"""Operators that read the shape of their operand and not what it holds, as the creating ones do."""

SEEN_THROUGH = ("pointwise", "cast", "view", "permute", "transpose")
"""Families whose operators on one feature leave it what it is, scaled or laid out otherwise."""


@dataclass(frozen=True)
class Cut:
    """The residual stream behind a block: `node` carries all that comes after it.

    `block` is the number of the last attention call ahead of it, as in `Site`. `share` is the part
    of the multiply-accumulates that is done by then, or None where they cannot be counted.
    """

    node: Node
    block: int
    share: float | None


def find_cuts(program: Program) -> tuple[Cut, ...]:
    """Find the last cut of each block on the residual stream, in order (an Analysis)."""
    flow = _flow(program)
    whole = set(_on_every_way(flow))
    sums = [node for node in flow.nodes if node in whole and _is_residual(node, whole, flow)]
    behind = _blocks(program)
    joins: dict[int, list[Node]] = {}
    for node in sums:
        if behind[node] >= 0:
            joins.setdefault(behind[node], []).append(node)
    ends = [_last_alike(found) for found in joins.values()]
    shares = _shares(program)
    settled = zip(joins, _settled(ends, sums, flow), strict=True)
    return tuple(Cut(node, block, shares.get(node)) for block, node in settled)


def _blocks(program: Program) -> dict[Node, int]:
    """Number each node by the last attention call up to it; -1 ahead of the first."""
    counts = accumulate(node.target is SDPA for node in program.nodes())
    return {node: count - 1 for node, count in zip(program.nodes(), counts, strict=True)}


def content(program: Program) -> set[Node]:
    """Return the nodes that come from what the inputs hold, not from sizes alone (an Analysis)."""
    found = set[Node]()
    for node in program.nodes():
        if node.op == "placeholder":
            found.add(node)
        elif family(node) != "create" and node.target not in SIZE_ONLY and _holds_tensors(node):
            found.update([node] if any(arg in found for arg in node.all_input_nodes) else ())
    return found


def beside(program: Program) -> set[Node]:
    """Return what is computed for exits alone: heads, scores, and which exit rows take (Analysis).

    From there no way leads to an output but through an exit.
    """
    exits = program.get(find_exits)
    if exits is None:
        return set()
    choose, ends = kernel("choose_exit").op, set(exits.ends.values())
    found = {exits.index}
    for node in reversed(list(program.nodes())):
        leaves = node not in ends and all(u in found or u.target is choose for u in node.users)
        if node.op == "call_function" and node.users and leaves:
            found.add(node)
    return found


def _holds_tensors(node: Node) -> bool:
    return is_tensor(node) or isinstance(value(node), (tuple, list))


@dataclass(frozen=True)
class _Flow:
    """The features on the way to an output, in execution order; `entries` read no feature.

    `held` are all values that come from what the inputs hold.
    """

    nodes: dict[Node, int]
    entries: tuple[Node, ...]
    held: set[Node]

    def operands(self, node: Node) -> list[Node]:
        """Return the features that a node reads."""
        return [arg for arg in node.all_input_nodes if arg in self.nodes]

    def readers(self, node: Node) -> list[Node]:
        """Return the features that read a node."""
        return [user for user in node.users if user in self.nodes]


def _flow(program: Program) -> _Flow:
    features = _features(program) - program.get(beside)
    useful = set[Node]()
    for node in reversed(list(program.nodes())):
        if node in features and any(u.op == "output" or u in useful for u in node.users):
            useful.add(node)
    ordered = [node for node in program.nodes() if node in useful]
    entries = [n for n in ordered if not any(arg in useful for arg in n.all_input_nodes)]
    places = {node: place for place, node in enumerate(ordered)}
    return _Flow(places, tuple(entries), program.get(content))


def _features(program: Program) -> set[Node]:
    held, learned, features = program.get(content), set[Node](), set[Node]()
    for node in program.nodes():
        sources = node.all_input_nodes
        if node.op == "get_attr":
            learned.update([node] if _is_parameter(program, node) else ())
        elif any(arg in learned for arg in sources):
            learned.add(node)
        starts = family(node) in ACTIVATIONS and node in learned and node in held
        if node.op == "call_function" and (starts or any(arg in features for arg in sources)):
            features.update([node] if node in held and not _only_counts(node) else ())
    return features


def _only_counts(node: Node) -> bool:
    """Tell whether an operator of ours says which tokens stay or how many one stands for."""
    source = node.args[0] if family(node) == "item" else node
    if not isinstance(source, Node) or family(source) != "kernel":
        return False
    if is_tensor(node) and not value(node).is_floating_point():
        return True
    merged = source.target is kernel("merge_tokens").op and node is not source
    return merged and bool(node.args[1] == 1)


def _is_parameter(program: Program, node: Node) -> bool:
    return is_tensor(node) and isinstance(program.weight(node), nn.Parameter)


def _on_every_way(flow: _Flow) -> Iterator[Node]:
    """Yield the features that no edge jumps over: from ahead of them to behind them."""
    end = len(flow.nodes)
    far = max((flow.nodes[node] for node in flow.entries), default=end)
    for node, place in flow.nodes.items():
        if far <= place and is_tensor(node):
            yield node
        if any(user.op == "output" for user in node.users):
            far = end
        far = max([far, *(flow.nodes[user] for user in flow.readers(node))])


def _is_residual(node: Node, whole: set[Node], flow: _Flow) -> bool:
    """Tell whether a node adds a branch to a value that carries everything, or to an input.

    Or puts tokens that passed a block by behind those that did not.
    """
    if node.target is aten.cat.default:
        return any(_is_cut_from(arg, whole, node) for arg in flow.operands(node))
    operands = [arg for arg in node.all_input_nodes if arg in flow.held]
    if node.target is not aten.add.Tensor or len(operands) < 2:
        return False
    return any(arg not in flow.nodes or arg in whole for arg in _terms(node, flow))


def _is_cut_from(part: Node, whole: set[Node], node: Node) -> bool:
    """Tell whether a value is a range of another that carries everything, shaped as a node."""
    source = part.args[0] if part.target is aten.slice.Tensor else None
    if not isinstance(source, Node) or source not in whole:
        return False
    return same_sizes(shape(source), shape(node))


def _terms(node: Node, flow: _Flow) -> set[Node]:
    """Return what a sum is made of: parallel branches are added one after another."""
    found, todo = set[Node](), [node]
    while todo:
        added = (arg for arg in todo.pop().all_input_nodes if arg in flow.held)
        new = {_origin(arg, flow) for arg in added} - found
        todo += [term for term in new if term.target is aten.add.Tensor and term in flow.nodes]
        found |= new
    return found


def _origin(node: Node, flow: _Flow) -> Node:
    """See through scales, masks, casts and views of one feature; a sum is what it is."""
    while family(node) in SEEN_THROUGH and node.target is not aten.add.Tensor:
        operands = flow.operands(node)
        if len(operands) != 1:
            break
        node = operands[0]
    return node


def _last_alike(joins: list[Node]) -> Node:
    """Return the last sum of the rank and width of the first: a head behind the block has others.

    Tokens may leave between the two.
    """
    rank, width = len(shape(joins[0])), shape(joins[0])[-1]
    laid = [_laid_out(join, rank) for join in joins]
    sizes = ((join, shape(join)) for join in laid)
    return [n for n, size in sizes if len(size) == rank and same_size(size[-1], width)][-1]


def _laid_out(node: Node, rank: int) -> Node:
    """Return the view that gives a sum of flattened tokens the rank of the stream, if one does."""
    reader = next(iter(node.users))
    flat = len(node.users) == 1 and len(shape(node)) != rank
    return reader if flat and family(reader) == "view" and len(shape(reader)) == rank else node


def _settled(ends: list[Node], sums: list[Node], flow: _Flow) -> list[Node]:
    """Follow the sum at the end of a block to its norm, where that is what the next one adds to.

    Nothing is added to the last one: there the norm belongs to the block if it does in the others.
    """
    carried = {_origin(arg, flow) for node in sums for arg in flow.operands(node)}
    norms = [_norm_behind(node, flow) for node in ends]
    inside = [norm in carried for norm in norms[:-1]]
    inside += [bool(inside) and all(inside)] if ends else []
    pairs = zip(ends, norms, inside, strict=True)
    return [norm if norm is not None and own else end for end, norm, own in pairs]


def _norm_behind(node: Node, flow: _Flow) -> Node | None:
    """Return the norm that is the one reader of a sum."""
    readers = flow.readers(node)
    return readers[0] if len(node.users) == 1 and readers and family(readers[0]) == "norm" else None


def _shares(program: Program) -> dict[Node, float]:
    """Return the part of the work that is done when each node is."""
    try:
        costs = macs_by_node(program)
    except PreconditionError:
        return {}
    total = sum(costs.values()) or 1
    return {n: done / total for n, done in zip(costs, accumulate(costs.values()), strict=True)}
