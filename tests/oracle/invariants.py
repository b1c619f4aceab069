"""What a reduction must leave true: copies leave no trace, places and padding do not count."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from effopt.attention import is_causal, mask_of, qkv_of
from effopt.program import Program
from effopt.sites import Site
from effopt.tokens import Range
from tests.oracle.case import Case, Inputs
from tests.oracle.compare import CLOSE, Faults, differ, output_node, real_tokens, sizes
from tests.oracle.decisions import MATCH, SELECT, UnknownDecision, decisions, steps
from tests.oracle.emulate import ForcedError, NotEmulated, emulated
from tests.oracle.interpreter import Change, outputs_of, record


def duplicates(case: Case) -> Faults:
    """Tokens that are exact copies, in pairs, merge without a trace."""
    found = [one for one in decisions(case) if one.kind == "merge"]
    several = len(found) != 1 or _reduced_before(case)
    if several or _reads_positions(case) or not _proportional(case):
        return []
    site = next(s for s in case.axis.sites if s.node.name == found[0].site)
    inputs = case.draw(2, None)
    if case.padding is not None:
        return []
    first, last = _removable(case, inputs, site)
    order = torch.arange(last + case.axis.suffix)
    start = first + first % 2
    order[start + 1 : last : 2] = order[start : last - 1 : 2]
    pairs = (last - start) // 2
    if _removals(case, inputs) > [pairs]:
        return []
    values = record(case.normal, inputs).values
    if _copies(values[qkv_of(site.attention)[1].name][..., start:last:2, :]):
        return []  # a token may find its like in another pair, with another value (one word twice)
    changes = _changes(case, site, order, values)
    return _turned(case, changes, inputs, (case.reduced, case.normal), None)


def permutation(case: Case) -> Faults:
    """Tokens that change places, even with even and odd with odd, change places in the outputs."""
    found = decisions(case)
    if len(found) != 1 or _reduced_before(case):
        return []
    site = next(s for s in case.axis.sites if s.node.name == found[0].site)
    masked = mask_of(site.attention) is not None or is_causal(site.attention)
    if masked or _reads_positions(case):
        return []  # the choice itself reads where tokens are
    inputs = case.draw(2, None)
    if _copies(record(case.normal, inputs).values[qkv_of(site.attention)[1].name]):
        return []  # which of two copies leaves is settled by their places
    first, last = _removable(case, inputs, site)
    order = torch.arange(last + case.axis.suffix)
    draw = torch.Generator().manual_seed(0)
    step = 2 if found[0].kind == "merge" else 1
    for begin in range(first, min(first + step, last)):
        own = torch.arange(begin, last, step)
        order[own] = own[torch.randperm(len(own), generator=draw)]
    changes = _changes(case, site, order, record(case.normal, inputs).values)
    if _turned(case, changes, inputs, (case.normal, case.normal), order):
        return []  # the model itself reads where tokens are
    return _turned(case, changes, inputs, (case.reduced, case.reduced), order)


def _copies(keys: Tensor) -> bool:
    """Tell whether two tokens have the same keys [..., N, D], such as one word twice."""
    apart = torch.cdist(keys, keys) + torch.eye(keys.shape[-2])
    return bool((apart < 1e-4).any())


def _turned(
    case: Case,
    changes: dict[str, Change],
    inputs: Inputs,
    programs: tuple[Program, Program],
    turn: Tensor | None,
) -> Faults:
    """Compare a program with changed values and another: with the same ones, or else turned."""
    first, second = programs
    got = outputs_of(record(first, inputs, changes))
    want = outputs_of(record(second, inputs, None if turn is not None else changes))
    found = []
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        for dim, spot in case.axis.tokens.on(output_node(case, place)).items():
            if turn is not None and isinstance(spot, Range):
                if b.shape[dim] != len(turn):
                    return []
                b = b.index_select(dim, turn)
        found += [f"output {place} {fault}" for fault in differ([a], [b], CLOSE)]
    return found


def _reduced_before(case: Case) -> bool:
    """Tell whether an earlier pass reduced tokens: then they have sizes of their own."""
    return any(node.target in (MATCH, SELECT) for node in case.normal.nodes())


def _changes(
    case: Case, site: Site, order: Tensor, values: Mapping[str, Tensor]
) -> dict[str, Change]:
    """Put tokens in an order at a site: its value, and query and key of its attention."""

    def instead(node: Node, dim: int) -> Change:
        made = values[node.name].index_select(dim, order)
        return lambda _: made

    query, key, _ = qkv_of(site.attention)
    assert {query.name, key.name} <= {node.name for node in case.reduced.nodes()}
    changes = {node.name: instead(node, node.meta["val"].ndim - 2) for node in (query, key)}
    return {**changes, site.node.name: instead(site.node, site.places[1])}


def _removable(case: Case, inputs: Inputs, site: Site) -> tuple[int, int]:
    count = record(case.normal, inputs).values[site.node.name].shape[site.places[1]]
    return case.axis.prefix, count - case.axis.suffix


def _removals(case: Case, inputs: Inputs) -> list[int]:
    """Return how many tokens leave at each site."""
    made = steps(case, record(case.reduced, inputs), 0)
    return [step.weights.shape[1] - len(step.places) for step in made]


def _proportional(case: Case) -> bool:
    return not any("proportional=false" in spec for spec in case.reduced.history)


def _reads_positions(case: Case) -> bool:
    """Tell whether what counts tokens is read after the first site from ahead of it."""
    inputs = case.draw(*sizes(case)[0])
    run = record(case.reduced, inputs)
    try:
        emulator, _ = emulated(case, run, steps(case, run, 0), inputs, 0, real_tokens(case, run, 0))
    except (UnknownDecision, NotEmulated, ForcedError):
        return True
    return emulator.positions


def padding(case: Case) -> Faults:
    """Padded tokens at the end change nothing at real ones, while enough real ones may leave."""
    if case.padding is None or not case.free_length or not _constant(case):
        return []
    specs = case.original.signature.inputs
    high = case.original.ranges["length"][1]
    inputs = case.draw(2, None)
    length = inputs[case.padding].shape[1]
    if length + 2 > high or _few_real(case, inputs):
        return []
    longer = []
    for place, (x, item) in enumerate(zip(inputs, specs, strict=True)):
        if item.shape[1:2] == ("length",):
            tail = torch.zeros_like(x[:, :2]) if place == case.padding else x[:, :2]
            x = torch.cat([x, tail], 1)
        longer.append(x)
    if _few_real(case, tuple(longer)) or _removals(case, inputs) != _removals(case, tuple(longer)):
        return []  # the length itself limits how many merge
    before, after = case.original.run(inputs), case.original.run(tuple(longer))
    short, long = case.reduced.run(inputs), case.reduced.run(tuple(longer))
    real = inputs[case.padding].bool()
    found = []
    for place in range(len(before)):
        if _differ_at(before[place], after[place], real):
            continue  # the original itself reads padding
        found += [f"output {place} {f}" for f in _differ_at(short[place], long[place], real)]
    return found


def _constant(case: Case) -> bool:
    return all(one.kind == "merge" for one in decisions(case))


def _few_real(case: Case, inputs: Inputs) -> bool:
    """Tell whether padding had to leave: then the choice depends on how much there was."""
    run = record(case.reduced, inputs)
    for found in decisions(case):
        size = run.values[found.node.args[1].name]  # type: ignore[union-attr]
        _, source, target = run.values[found.node.name]
        if not bool((size.gather(1, source) > 0).all() & (size.gather(1, target) > 0).all()):
            return True
    return False


def _differ_at(got: Tensor, want: Tensor, real: Tensor) -> Faults:
    """Compare two lengths where both have real tokens."""
    if want.ndim > 1 and got.ndim > 1 and real.shape == got.shape[:2]:
        got, want = got[real], want[:, : real.shape[1]][real]
    return differ([got], [want], CLOSE)
