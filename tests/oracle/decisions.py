"""What a reduced program decided: which tokens left, and into which they merged, at each site.

Only these choices are read from the reduced program; what follows from them is emulated.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effopt.kernel import kernel
from effopt.program import Program
from tests.oracle.case import Case
from tests.oracle.interpreter import Change, Inputs, Recorder

MATCH, MERGE, SELECT, GATHER, FUSE, SCATTER = (
    kernel(f"{name}_tokens").op
    for name in ("match", "merge", "select", "gather", "fuse", "scatter")
)
THROUGH = (torch.ops.aten.permute.default, torch.ops.aten.transpose.int, SCATTER)


class UnknownDecision(Exception):
    """The reduced program has a reduction that this oracle cannot read."""


@dataclass(frozen=True)
class Step:
    """One reduction of one sample: K tokens after, M before it.

    Row k of `weights` [K, M] makes token k; `places` [K] are the tokens whose positions they
    keep; `moved` [M] is where each token went, -1 for one that was dropped. `kind` is merge,
    prune or fuse.
    """

    kind: str
    site: str
    weights: Tensor
    places: Tensor
    moved: Tensor


@dataclass(frozen=True)
class Decision:
    """The nodes of a reduced program that hold one reduction."""

    kind: str
    site: str
    node: Node
    fuse: Node | None = None


def base(node: Node, names: set[str], seen: tuple[Any, ...] = THROUGH) -> str | None:
    """Follow a value back through changes of layout to a node of the original program."""
    while node.name not in names:
        if node.target not in seen:
            return None
        node = node.args[1 if node.target is SCATTER else 0]  # type: ignore
    return node.name


def decisions(case: Case) -> list[Decision]:
    """Find the reductions in the order of the graph."""
    sites = {site.node.name for site in case.axis.sites}
    known = {node.name for node in case.normal.nodes()}
    found = []
    for node in case.reduced.nodes():
        if node.name in known:
            continue
        if node.target is MATCH:
            found.append(_merge(node, sites))
        elif node.target is SELECT:
            made = _prune(node, sites)
            found += [made] if made else []
    return found


def _merge(node: Node, sites: set[str]) -> Decision:
    kept = next(user for user in node.users if user.args[1] == 0)
    readers = [user for user in kept.users if user.target is MERGE]
    for reader in readers:
        if (site := base(reader.args[0], sites)) is not None:  # type: ignore[arg-type]
            return Decision("merge", site, node)
    raise UnknownDecision(f"{node.name}: no merge_tokens at a site reads it")


def _prune(node: Node, sites: set[str]) -> Decision | None:
    readers = [user for user in node.users if user.target is GATHER]
    for reader in readers:
        site = base(reader.args[0], sites) if reader.args[1] is node else None  # type: ignore
        if site is not None:
            return _fused(node, site) or Decision("prune", site, node)
    wider = any(other.target is SELECT for other in node.args[0].users if other is not node)  # type: ignore
    if wider and not any(user.target is FUSE for user in node.users):
        return None  # it names the place of a fused token
    raise UnknownDecision(f"{node.name}: no gather_tokens at a site reads it")


def _fused(node: Node, site: str) -> Decision | None:
    fuses = [user for user in node.users if user.target is FUSE]
    return Decision("fuse", site, node, fuses[0]) if fuses else None


def alike(case: Case, inputs: Inputs) -> dict[str, Change]:
    """Let every row of a sample choose as its first does, where windows are rows of their own.

    So the choices of a sample are one list, which can be emulated.
    """

    def first(score: Tensor) -> Tensor:
        rows = max(len(score) // len(inputs[0]), 1)
        return score[::rows].repeat_interleave(rows, 0)

    return {one.node.args[0].name: first for one in decisions(case)}  # type: ignore[union-attr]


def choosers(program: Program) -> list[Node]:
    """Return all nodes that choose tokens, those of earlier passes too."""
    return [node for node in program.nodes() if node.target in (MATCH, SELECT)]


def chosen(node: Node, run: Recorder, row: int, batch: int) -> Any:
    """Return what a node chose for one sample."""

    def own(value: Tensor) -> Tensor:
        count = len(value) // batch
        return value[row * count : (row + 1) * count]

    value = run.values[node.name]
    return tuple(map(own, value)) if isinstance(value, (tuple, list)) else own(value)


def row_at(case: Case, run: Recorder, row: int, found: Decision) -> int:
    """Return the first row of a sample in what a decision reads."""
    score = run.values[found.node.args[0].name]  # type: ignore[union-attr]
    return row * max(len(score) // len(run.values[case.reduced.inputs()[0].name]), 1)


def steps(case: Case, run: Recorder, row: int) -> list[Step]:
    """Read the reductions of one sample from a run of the reduced program."""
    made: list[Step] = []
    sizes: Tensor | None = None
    for found in decisions(case):
        place = row_at(case, run, row, found)
        if found.kind == "merge":
            kept, source, target = (x[place] for x in run.values[found.node.name])
            if sizes is None:
                sizes = run.values[found.node.args[1].name][place].double()  # type: ignore
            step = _merge_step(found, kept, source, target, sizes)
            sizes = _sum(step, sizes)
        else:
            step = _prune_step(found, run, place)
        made.append(step)
    return made


def _sum(step: Step, sizes: Tensor) -> Tensor:
    return torch.zeros(len(step.places), dtype=sizes.dtype).index_add(0, step.moved, sizes)


def _merge_step(
    found: Decision, kept: Tensor, source: Tensor, target: Tensor, sizes: Tensor
) -> Step:
    count = len(sizes)
    spot = torch.full((count,), -1)
    spot[kept] = torch.arange(len(kept))
    moved = spot.clone()
    moved[source] = spot[target]
    if bool((moved < 0).any()) or len(kept) + len(source) != count:
        raise AssertionError(f"{found.node.name}: kept, source and target do not cover the tokens")
    member = torch.zeros(len(kept), count, dtype=torch.float64)
    member[moved, torch.arange(count)] = sizes.clamp_min(1e-12)
    weights = member / member.sum(1, keepdim=True)
    return Step("merge", found.site, weights, kept, moved)


def _prune_step(found: Decision, run: Recorder, row: int) -> Step:
    kept = run.values[found.node.name][row]
    score = run.values[found.node.args[0].name][row].double()  # type: ignore[union-attr]
    count = len(score)
    if len(set(kept.tolist())) != len(kept) or bool((kept[1:] < kept[:-1]).any()):
        raise AssertionError(f"{found.node.name}: kept is not ascending")
    moved = torch.full((count,), -1)
    moved[kept] = torch.arange(len(kept))
    weights = torch.zeros(len(kept), count, dtype=torch.float64)
    weights[torch.arange(len(kept)), kept] = 1.0
    if found.fuse is None:
        return Step("prune", found.site, weights, kept, moved)
    gone = moved < 0
    best = int(score.masked_fill(~gone, -torch.inf).argmax())
    last = torch.where(gone, score, torch.zeros_like(score))
    if found.fuse.args[3]:
        last = last / last.sum().clamp_min(1e-12)
    moved[gone] = len(kept)
    places = torch.cat([kept, torch.tensor([best])])
    return Step("fuse", found.site, torch.cat([weights, last[None]]), places, moved)
