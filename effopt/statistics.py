"""Statistics of a running program: the calibration data goes through it once, as a stream."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from effopt.collectors import Collector
from effopt.errors import PreconditionError, UsageError
from effopt.masks import find_padding
from effopt.program import Program, is_tensor, shape, value, where
from effopt.sites import find_tokens
from effopt.tokens import Range, Tokens

EXCLUDED = "excluded"
NO_TOKENS = "none: it holds no tokens"
NO_MASK = "none: no padding mask was found"


@dataclass(frozen=True)
class Real:
    """Which rows of a value are real tokens, and not padding.

    `mask` is a node whose value [B, ..., N] is non-zero at real tokens; `places` are the
    dimensions of batch and tokens in the value, or the one that is the product of the two.
    """

    mask: Node
    places: tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    """What a node's collectors were given: rows of `samples` samples, without `dropped` rows.

    `padding` says whether rows of padding were left out, and if not, why.
    """

    samples: int
    rows: int
    dropped: int
    padding: str


def gather(
    program: Program,
    wanted: Mapping[Node, Sequence[Collector]],
    real: Mapping[Node, Real | str] | None = None,
) -> dict[Node, Seen]:
    """Run the calibration data through a program once, and feed the values of nodes to collectors.

    A value [..., K] is fed as rows [T, K], without rows of padding: by `real` where that has the
    node (a string says why there is none), else as `find_real` finds.

    Memory: one batch of inputs, the values of that batch that are still to be read, and the
    collectors. Only what the wanted nodes follow from is run. So a large model fits if it is
    gathered a group of layers at a time, by calls with few nodes each: n calls run the graph
    about n / 2 times, and what the collectors of one call hold is all that adds to the model.

    Raises UsageError without calibration data; PreconditionError, with the node, for a value
    that is no floating tensor or holds NaN or infinity.
    """
    data = program.calibration
    if data is None:
        raise UsageError(
            "there is no calibration data", "pass calibration=batches, or --calibration FILE"
        )
    for node in wanted:
        _check_node(node)
    found = {node: (real or {}).get(node) or find_real(program, node) for node in wanted}
    seen = {
        node: Seen(data.samples, 0, 0, known if isinstance(known, str) else EXCLUDED)
        for node, known in found.items()
    }
    masks = {node: known for node, known in found.items() if isinstance(known, Real)}
    plan = _plan(program, {n: (n, masks[n].mask) if n in masks else (n,) for n in wanted})
    for index, batch in enumerate(data):
        for node, values in _run(program, plan, batch):
            rows, dropped = _rows(values, node, masks.get(node))
            _feed(node, rows, wanted[node], index)
            now = seen[node]
            seen[node] = replace(now, rows=now.rows + len(rows), dropped=now.dropped + dropped)
    return seen


def _check_node(node: Node) -> None:
    if not is_tensor(node) or not value(node).is_floating_point() or not shape(node):
        raise PreconditionError(
            where(node), "its value is no floating tensor with channels", "leave it out"
        )


def _feed(node: Node, rows: Tensor, collectors: Sequence[Collector], batch: int) -> None:
    for collector in collectors if len(rows) else ():
        try:
            collector.update(rows)
        except UsageError as error:
            reason = f"{error.reason} in calibration batch {batch}"
            raise PreconditionError(where(node), reason, error.remedy) from error


# --- padding


def find_real(program: Program, node: Node) -> Real | str:
    """Find which rows of a node's value are real tokens; a string says why none can be left out.

    The padding mask is the one that attention over the node's tokens reads (`find_padding`).
    """
    for axis in program.get(find_tokens):
        if spots := axis.tokens.on(node):
            padding = find_padding(axis)
            if padding.refusal is not None:
                return f"not excluded: {padding.refusal.reason}"
            if padding.mask is None:
                return NO_MASK
            places = _places(node, axis.tokens, spots)
            odd = "not excluded: it does not hold all tokens, each with channels"
            return Real(padding.mask, places) if places else odd
    return NO_TOKENS


def _places(node: Node, tokens: Tokens, spots: Mapping[int, Range | str]) -> tuple[int, ...]:
    """Return the dimensions of batch and tokens, or of their product; () for another layout."""
    dims = tokens.axes.of(node)[:-1]
    if len(spots) == 1 and tokens.batch:
        for place in (place for place, dim in enumerate(dims) if dim == tokens.batch + tokens.dim):
            return (place,)
        (place, spot), rows = next(iter(spots.items())), list(dims)
        whole = place < len(dims) and dims[place] == tokens.dim and isinstance(spot, Range)
        if whole and rows.count(tokens.batch) == 1:
            return rows.index(tokens.batch), place
    return ()


def _rows(values: Mapping[Node, Any], node: Node, real: Real | None) -> tuple[Tensor, int]:
    """Return the rows [T, K] of a value that are no padding, and how many are."""
    found: Tensor = values[node]
    rows = found.reshape(-1, found.shape[-1])
    if real is None:
        return rows, 0
    mask: Tensor = values[real.mask]
    kept = (mask != 0).reshape(mask.shape[0], mask.shape[-1])
    front = found.movedim(real.places, tuple(range(len(real.places))))
    tokens = front[kept if len(real.places) > 1 else kept.reshape(-1)]
    inside = tokens.reshape(-1, found.shape[-1])
    return inside, len(rows) - len(inside)


# --- running


@dataclass(frozen=True)
class _Plan:
    """The nodes to run in order; after which of them a wanted value is complete, and which end."""

    order: tuple[Node, ...]
    due: Mapping[Node, list[Node]]
    ends: Mapping[Node, list[Node]]


def _plan(program: Program, reads: Mapping[Node, tuple[Node, ...]]) -> _Plan:
    """Plan a run of what is read; a node of `reads` is due once all of its sources are there."""
    needed, todo = set[Node](), [node for sources in reads.values() for node in sources]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    order = tuple(node for node in program.nodes() if node in needed)
    place = {node: number for number, node in enumerate(order)}
    last = {node: node for node in order}
    for node in order:
        last.update(dict.fromkeys(node.all_input_nodes, node))
    due: dict[Node, list[Node]] = {}
    for node, sources in reads.items():
        ready = max(sources, key=place.__getitem__)
        due.setdefault(ready, []).append(node)
        for source in sources:
            last[source] = max(last[source], ready, key=place.__getitem__)
    ends: dict[Node, list[Node]] = {}
    for node, reader in last.items():
        ends.setdefault(reader, []).append(node)
    return _Plan(order, due, ends)


def _run(
    program: Program, plan: _Plan, batch: Sequence[Tensor]
) -> Iterator[tuple[Node, Mapping[Node, Any]]]:
    """Run one batch; yield each wanted node when its values are there. Values go after last use."""
    inputs = dict(zip(program.inputs(), batch, strict=True))
    values: dict[Node, Any] = {}
    for node in plan.order:
        values[node] = inputs[node] if node in inputs else _compute(program, node, values)
        for wanted in plan.due.get(node, ()):
            yield wanted, values
        for ended in plan.ends.get(node, ()):
            del values[ended]


@torch.no_grad()
def _compute(program: Program, node: Node, values: Mapping[Node, Any]) -> Any:
    if node.op == "get_attr":
        return program.weight(node).detach()
    assert callable(node.target)
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)
