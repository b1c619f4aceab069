"""Scale groups: the linear layers that share scales, out of the labels that they read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from effopt.labelling import Labelling, Site
from effopt.labels import FREE, GIVEN, Ints
from effopt.program import module_path
from effopt.scale_rules import source_of

Kind = Literal["folded", "tied", "mul"]


@dataclass(frozen=True)
class ScaleGroup:
    """Linear layers that must share one scale for each input channel.

    `linears` read the K channels of `source` (the first one's operand; others may read a view).
    Channel k has the scale number `roots[k]`, of 0..R-1. "folded": R = K, and the constants that
    `producers` read take the scale up at no cost. "tied": the same with R < K, as with the heads
    of grouped-query attention. "mul": R = K, and one multiplication of the source is added.
    """

    kind: Kind
    linears: tuple[Node, ...]
    source: Node
    roots: tuple[int, ...]
    producers: tuple[Node, ...] = ()

    @property
    def count(self) -> int:
        """R, how many scales the group has."""
        return max(self.roots) + 1


@dataclass(frozen=True, eq=False)
class Scales:
    """The scale groups of a program in execution order, for the nodes of that program.

    `pinned` says for the source of each "mul" group what keeps it from being scaled. In `sites`
    labels number all scales: those of a group are `first[group]` and up, 0 is the scale 1.
    """

    groups: tuple[ScaleGroup, ...]
    pinned: Mapping[Node, str]
    sites: tuple[Site, ...]
    first: Mapping[ScaleGroup, int]

    def values(self, chosen: Mapping[ScaleGroup, Tensor]) -> Tensor:
        """Return the scale of every label in float64: 1 for groups that were not chosen."""
        total = 1 + sum(group.count for group in self.first)
        scales = torch.ones(total, dtype=torch.float64)
        for group, start in self.first.items():
            if group in chosen:
                scales[start : start + group.count] = chosen[group].to("cpu", torch.float64)
        return scales


def grouped(state: Labelling) -> Scales:
    """Gather linear layers by the scales that they read, and number the scales."""
    roots = {node: _roots(state, node) for node in state.columns}
    fixed = _fixed(roots)
    gathered: dict[Node | bytes, list[Node]] = {}
    for node, own in roots.items():
        key = source_of(node) if node in fixed else own.tobytes()
        gathered.setdefault(key, []).append(node)
    numbers = np.zeros(state.labels.count, dtype=np.int64)
    starts = [
        _number(numbers, roots[nodes[0]]) for nodes in gathered.values() if nodes[0] not in fixed
    ]
    sites = tuple(_numbered(state, numbers, site) for site in state.sites)
    made = _producers(sites, starts)
    groups, first = list[ScaleGroup](), dict[ScaleGroup, int]()
    for nodes in map(tuple, gathered.values()):
        own, source = roots[nodes[0]], source_of(nodes[0])
        if nodes[0] in fixed:
            groups.append(ScaleGroup("mul", nodes, source, (*range(len(own)),)))
            continue
        start = starts[len(first)]
        kept = tuple((numbers[own] - start).tolist())
        kind: Kind = "tied" if max(kept) + 1 < len(kept) else "folded"
        groups.append(ScaleGroup(kind, nodes, source, kept, tuple(made[len(first)])))
        first[groups[-1]] = start
    pinned = {g.source: _reason(state, g.linears[0]) for g in groups if g.kind == "mul"}
    return Scales(tuple(groups), pinned, sites, first)


def _roots(state: Labelling, linear: Node) -> Ints:
    columns = state.columns[linear]
    width = state.shape(source_of(linear))[-1]
    return np.zeros(width, np.int64) if columns is None else state.labels.roots(columns)


def _fixed(roots: Mapping[Node, Ints]) -> set[Node]:
    """Return the layers that need a multiplication: those with a channel that is pinned.

    So do layers that share a scale in another order or in part: each could not choose its own.
    """
    keys = {own.tobytes(): own for own in roots.values()}
    owner, fixed = dict[int, bytes](), set[bytes]()
    for key, own in keys.items():
        if not own.all():
            fixed.add(key)
        for root in np.unique(own[own > 0]).tolist():
            if owner.setdefault(root, key) != key:
                fixed |= {key, owner[root]}
    return {node for node, own in roots.items() if own.tobytes() in fixed}


def _number(numbers: Ints, roots: Ints) -> int:
    """Number the distinct roots of a group in order, behind all others; returns the first."""
    start = int(numbers.max()) + 1
    distinct = roots[np.sort(np.unique(roots, return_index=True)[1])]
    numbers[distinct] = np.arange(start, start + len(distinct))
    return start


def _numbered(state: Labelling, numbers: Ints, site: Site) -> Site:
    def final(labels: Tensor | None) -> Tensor | None:
        return None if labels is None else torch.as_tensor(numbers[state.labels.roots(labels)])

    return Site(site.reader, site.constant, final(site.times), final(site.over))


def _producers(sites: Sequence[Site], starts: Sequence[int]) -> list[dict[Node, None]]:
    """Return for each group the readers of the constants that take its scales up."""
    made: list[dict[Node, None]] = [{} for _ in starts]
    for site in sites:
        over = np.unique(site.over.numpy()) if site.over is not None else np.zeros(0, np.int64)
        for group in set((np.searchsorted(starts, over[over > 0], side="right") - 1).tolist()):
            made[group][site.reader] = None
    return made


def _reason(state: Labelling, linear: Node) -> str:
    """Name the operator that keeps the operand of a linear layer from being scaled."""
    columns, source = state.columns[linear], source_of(linear)
    if columns is None:
        return _named(state.blame.get(source, source))
    cause = int(state.labels.causes(columns).min())
    if cause == FREE:
        return "other layers read its channels in another order"
    return "a part of it cannot be scaled" if cause == GIVEN else _named(state.order[cause])


def _named(node: Node) -> str:
    if node.op != "call_function":
        return {"output": "it is an output"}.get(node.op, "it is an input")
    operator = getattr(node.target, "__name__", str(node.target))
    path = module_path(node)
    return f"{node.name} ({operator})" + (f" in {path}" if path else "")
