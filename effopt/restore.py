"""Restore: give an output that names every token its full length back."""

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from effopt.edit import Edit
from effopt.errors import PreconditionError
from effopt.kernel import kernel
from effopt.lift import Lift, covers, edges, gather, layout, to_rows, to_stream
from effopt.program import where
from effopt.state import State
from effopt.tokens import Kind, Range

aten = torch.ops.aten
REMEDY = "merge or fuse the tokens in place of dropping them: then they are copied back"


def restore(edit: Edit, state: State, out: Node) -> Node:
    """Return an output at its original length.

    After merging, every token gets a copy of what it merged into. After dropping, the residual
    stream gets the dropped tokens back with the value that they left with, and the operators
    between it and the output run on all tokens.
    """
    epoch = state.latest(out)
    spots = state.axis.tokens.on(out)
    if any(not isinstance(spot, Range) or not spot.pure for spot in spots.values()):
        reason = "it returns the tokens mixed with another axis"
        raise PreconditionError(where(out), reason, "return [batch, tokens, channels]")
    if not any(isinstance(spot, Range) and covers(spot, state.axis) for spot in spots.values()):
        return state.at(out, epoch)
    if all(reduction.group for reduction in state.reductions[:epoch]):
        return _copied(edit, state, out, epoch)
    return _frozen(edit, state, out, epoch)


def _copied(edit: Edit, state: State, out: Node, epoch: int) -> Node:
    rows, spots = layout(state.axis, out), state.axis.tokens.on(out)
    made = state.at(out, epoch)
    for place, spot in spots.items():
        if not isinstance(spot, Range) or not spot.pure or rows is None:
            reason = "it returns the tokens mixed with another axis"
            raise PreconditionError(where(out), reason, "return [batch, tokens, channels]")
        index = group_map(edit, state, epoch)
        index = Lift(edit, state).part_of(index, spot)
        start, _ = edges(spot, state.axis)
        if start:
            index = edit.call(aten.sub.Tensor, index, start)
        made = gather(edit, made, index, place, rows)
    return made


def group_map(edit: Edit, state: State, epoch: int) -> Node:
    """Compose the maps of the sites: [B, N], the place at the epoch of each original token."""
    index: Node | None = None
    for reduction in state.reductions[:epoch]:
        assert reduction.group is not None
        step = reduction.group(edit)
        index = step if index is None else edit.call(kernel("gather_tokens").op, step, index, 1)
    assert index is not None
    return index


def _frozen(edit: Edit, state: State, out: Node, epoch: int) -> Node:
    """Put the dropped tokens back on the residual stream and run what follows on all of them."""
    chain = _chain(state, out)
    site = state.axis.stream
    tail = _targets(_path(state, site.node, site.join))
    matches = [node.target for node in chain[1 : 1 + len(tail)]] == tail
    if not matches or chain[0] not in _sums(state, tail):
        reason = "it is not a residual value or a function of one, token by token"
        raise PreconditionError(where(out), reason, REMEDY)
    point = chain[len(tail)]
    whole = to_rows(edit, state.at(point, epoch), site.places)
    for reduction in reversed(state.reductions[:epoch]):
        if reduction.group is not None:
            raise PreconditionError(where(out), "it returns tokens that were fused", REMEDY)
        whole = edit.call(kernel("scatter_tokens").op, reduction.frozen, whole, reduction.kept)
    whole = to_stream(edit, whole, site.places)
    for node in chain[len(tail) + 1 :]:
        whole = _rerun(edit, state, node, whole)
    return whole


def _chain(state: State, out: Node) -> list[Node]:
    """Return the nodes from the last sum on the residual stream to the output."""
    chain = [out]
    while True:
        carried = [arg for arg in dict.fromkeys(state.operands(chain[0])) if state.carries(arg)]
        effect = state.axis.effects.get(chain[0])
        if len(carried) != 1 or effect is None or effect.kind is not Kind.MAP:
            return chain
        chain.insert(0, carried[0])


def _sums(state: State, tail: list[object]) -> set[Node]:
    """Find the sums x + f(x) on the residual stream from the sites on."""
    sites = state.axis.usable()
    sums = {site.join for site in sites if site.join.target is aten.add.Tensor}
    stream = {site.node for site in sites}
    for node in state.axis.effects:
        if node.target is not aten.add.Tensor:
            continue
        own = [arg for arg in state.operands(node) if arg in stream]
        branch = [arg for arg in state.operands(node) if arg not in stream]
        if len(own) != 1 or len(branch) != 1 or not _is_branch(state, branch[0], own[0], stream):
            continue
        sums.add(node)
        for target in tail:
            node = next((user for user in node.users if user.target is target), node)
        stream.add(node)
    return sums


def _is_branch(state: State, branch: Node, source: Node, stream: set[Node]) -> bool:
    """Tell whether a value is computed from one value of the residual stream alone."""
    todo = [branch]
    while todo:
        node = todo.pop()
        if node is source:
            continue
        carried = [arg for arg in state.operands(node) if state.carries(arg)]
        if node in stream or not carried:
            return False
        todo += carried
    return True


def _path(state: State, node: Node, join: Node) -> list[Node]:
    """Return the nodes behind the join up to a site's value."""
    found: list[Node] = []
    while node is not join:
        found.insert(0, node)
        node = next(arg for arg in state.operands(node) if state.carries(arg))
    return found


def _targets(nodes: list[Node]) -> list[object]:
    return [node.target for node in nodes]


def _rerun(edit: Edit, state: State, node: Node, x: Node) -> Node:
    """Call a token-wise operator again, with its old arguments, on a value of full length."""
    args, kwargs = state.originals[node]

    def swap(arg: Node) -> Node:
        return x if state.carries(arg) else arg

    assert callable(node.target)
    new_args, new_kwargs = map_arg(args, swap), map_arg(kwargs, swap)
    return edit.call(node.target, *new_args, **new_kwargs)
