"""Statistics of a running program: the calibration data goes through it once, as a stream."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from effopt.collectors import Collector
from effopt.errors import PreconditionError, UsageError
from effopt.masks import find_padding
from effopt.program import Program, is_tensor, shape, value, where
from effopt.sites import find_tokens
from effopt.spool import Spool
from effopt.tokens import Range, Tokens

if TYPE_CHECKING:
    from effopt.calibration import Calibration

Values = dict[Node, Any]
"""What nodes yield for one batch."""

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
    collectors; `gather_in_parts` has few of these at a time. Only what the wanted nodes follow
    from is run.

    Raises UsageError without calibration data; PreconditionError, with the node, for a value
    that is no floating tensor or holds NaN or infinity.
    """
    data, plan = _data(program), _plan(program, wanted, real or {})
    seen = _unseen(data, plan)
    for _ in _run(program, plan, slice(None), _inputs(program, data, plan), wanted, seen):
        pass
    return seen


def gather_in_parts(
    program: Program,
    sizes: Mapping[Node, int],
    start: Callable[[Node], Sequence[Collector]],
    limit: int,
) -> Iterator[dict[Node, Sequence[Collector]]]:
    """Run the calibration data once, a part of the graph at a time; yield each part's collectors.

    `sizes` are the bytes that the collectors of each wanted node come to hold, which `start`
    makes: those of a part hold `limit` bytes together, or are of one node. All batches go through
    a part before the next begins, and a temporary file has the values in between. So what is in
    memory does not grow with the depth of a model, if the caller lets collectors go. The graph
    must stay as it is meanwhile. Otherwise as `gather`.
    """
    data, plan = _data(program), _plan(program, sizes, {})
    states: Iterable[Values] = _inputs(program, data, plan)
    for stretch, nodes in _parts(plan, sizes, limit):
        wanted, seen = {node: start(node) for node in nodes}, _unseen(data, plan)
        left = Spool(_run(program, plan, stretch, states, wanted, seen))
        left.fill()
        states = cast("Iterable[Values]", left)
        yield wanted


def _data(program: Program) -> "Calibration":
    if program.calibration is None:
        raise UsageError(
            "there is no calibration data", "pass calibration=batches, or --calibration FILE"
        )
    return program.calibration


def _unseen(data: "Calibration", plan: "_Plan") -> dict[Node, Seen]:
    notes = {node: rows if isinstance(rows, str) else EXCLUDED for node, rows in plan.real.items()}
    return {node: Seen(data.samples, 0, 0, note) for node, note in notes.items()}


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


def _rows(values: Values, node: Node, real: Real | str) -> tuple[Tensor, int]:
    """Return the rows [T, K] of a value that are no padding, and how many are."""
    found: Tensor = values[node]
    rows = found.reshape(-1, found.shape[-1])
    if isinstance(real, str):
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
    """The nodes to run in order; after which of them a wanted value is complete, and which end.

    Weights are not among them: they are read where they are. `real` says of each wanted value
    which of its rows are no padding.
    """

    order: tuple[Node, ...]
    due: Mapping[Node, list[Node]]
    ends: Mapping[Node, list[Node]]
    real: Mapping[Node, Real | str]


def _plan(program: Program, wanted: Iterable[Node], real: Mapping[Node, Real | str]) -> _Plan:
    """Plan a run of what is wanted: a value is due once its padding mask is there too."""
    known = dict[Node, Real | str]()
    for node in wanted:
        _check_node(node)
        known[node] = real.get(node) or find_real(program, node)
    reads = {n: (n, rows.mask) if isinstance(rows, Real) else (n,) for n, rows in known.items()}
    needed, todo = set[Node](), [node for sources in reads.values() for node in sources]
    asked = set(todo)
    while todo:
        node = todo.pop()
        if node not in needed and (node.op != "get_attr" or node in asked):
            needed.add(node)
            todo += node.all_input_nodes
    order = tuple(node for node in program.nodes() if node in needed)
    place = {node: number for number, node in enumerate(order)}
    last = {node: node for node in order}
    for node in order:
        last.update({source: node for source in node.all_input_nodes if source in needed})
    due: dict[Node, list[Node]] = {}
    for node, sources in reads.items():
        ready = max(sources, key=place.__getitem__)
        due.setdefault(ready, []).append(node)
        for source in sources:
            last[source] = max(last[source], ready, key=place.__getitem__)
    ends: dict[Node, list[Node]] = {}
    for node, reader in last.items():
        ends.setdefault(reader, []).append(node)
    return _Plan(order, due, ends, known)


def _parts(
    plan: _Plan, sizes: Mapping[Node, int], limit: int
) -> Iterator[tuple[slice, list[Node]]]:
    """Cut a plan where the collectors of what is due so far reach the limit."""
    begin, held, nodes = 0, 0, list[Node]()
    for place, node in enumerate(plan.order):
        due = plan.due.get(node, [])
        size = sum(sizes[wanted] for wanted in due)
        if nodes and due and held + size > limit:
            yield slice(begin, place), nodes
            begin, held, nodes = place, 0, []
        nodes, held = [*nodes, *due], held + size
    yield slice(begin, None), nodes


def _inputs(program: Program, data: "Calibration", plan: _Plan) -> Iterator[Values]:
    """Yield the inputs of each batch."""
    needed = set(plan.order)
    for batch in data:
        pairs = zip(program.inputs(), batch, strict=True)
        yield {node: tensor for node, tensor in pairs if node in needed}


def _run(
    program: Program,
    plan: _Plan,
    stretch: slice,
    states: Iterable[Values],
    wanted: Mapping[Node, Sequence[Collector]],
    seen: dict[Node, Seen],
) -> Iterator[Values]:
    """Run a stretch of the plan on each batch, and feed the collectors of what is due in it.

    `states` are what each batch has of values so far; yields what it has of them then. Values go
    after their last use.
    """
    for index, values in enumerate(states):
        for node in plan.order[stretch]:
            if node not in values:
                values[node] = _compute(program, node, values)
            for due in plan.due.get(node, ()):
                rows, dropped = _rows(values, due, plan.real[due])
                _feed(due, rows, wanted[due], index)
                now = seen[due]
                seen[due] = replace(now, rows=now.rows + len(rows), dropped=now.dropped + dropped)
                del rows
            for ended in plan.ends.get(node, ()):
                del values[ended]
        yield values


@torch.no_grad()
def _compute(program: Program, node: Node, values: Values) -> Any:
    if node.op == "get_attr":
        return program.weight(node).detach()
    assert callable(node.target)

    def held(source: Node) -> Any:
        return values[source] if source in values else program.weight(source).detach()

    args, kwargs = map_arg((node.args, node.kwargs), held)
    return node.target(*args, **kwargs)
