"""prune-tokens: tokens that get little attention leave.

By the class token's attention: Liang et al., "Not All Patches are What You Need: Expediting Vision
Transformers via Token Reorganizations" (EViT), 2022 (arXiv 2202.07800). By the last token's, where
attention is causal: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2" (FastV), 2024 (arXiv
2403.06764). By that of all tokens, elsewhere: Goyal et al., "PoWER-BERT", 2020 (arXiv 2001.08950).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil
from typing import ClassVar

import torch
from torch.fx import Node

from effopt.causal import looks_back
from effopt.edit import Edit
from effopt.errors import PreconditionError, UsageError, unknown
from effopt.kernel import kernel
from effopt.mend import reduce_tokens
from effopt.passes.schedule import (
    SCHEDULES,
    Plan,
    choose_sites,
    expand_values,
    fixed,
    plan_on_axis,
)
from effopt.pipeline import Outcome
from effopt.program import Program, where
from effopt.sites import Site, TokenAxis
from effopt.state import Point, Reducer, Reduction

aten = torch.ops.aten


@dataclass(frozen=True)
class PruneTokens:
    """Keep the tokens that get most attention, in chosen blocks; drop the others.

    It is the attention of the tokens that outputs pick (the class token); of the last one where
    attention is causal; of all of them where nothing is picked.
    """

    name: ClassVar[str] = "prune-tokens"
    exact: ClassVar[bool] = False

    keep: float | tuple[float, ...] = field(
        metadata={"help": "share of the candidates kept at each site: one number, or one a site"}
    )
    sites: tuple[int | float, ...] = field(
        default=(0.25, 0.5, 0.75), metadata={"help": "blocks from 0, or (below 1) depths"}
    )
    schedule: str = field(
        default="constant", metadata={"help": "constant, or linear: from 1 down to keep"}
    )
    fuse: bool = field(
        default=False, metadata={"help": "one more token stands for those that were dropped"}
    )
    normalize: bool = field(
        default=True,
        metadata={"help": "average the dropped tokens; the paper's sum needs training"},
    )
    axis: str = field(
        default="", metadata={"help": "which tokens, as `effopt inspect` names them: vision.tokens"}
    )

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        rates = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        if any(isinstance(r, bool) or not 0 < r <= 1 for r in rates):
            raise UsageError(f"keep of prune-tokens is {self.keep}", "give shares above 0, up to 1")

    def check(self, program: Program) -> list[PreconditionError]:
        """Refuse where no site is usable, the length is free, or a fused token would be hidden."""
        if self._keeps_all():
            return []
        plan = self._plan(program)
        return [plan] if isinstance(plan, PreconditionError) else []

    def run(self, program: Program) -> Outcome:
        """Rewrite the graph; the notes give the effective counts."""
        if self._keeps_all():
            return Outcome(False, ("keep = 1: nothing to prune",))
        plan = self._plan(program)
        if isinstance(plan, PreconditionError):
            raise plan
        edit = Edit(program, self.name)
        reducers: dict[Site, Reducer] = {
            site: _reducer(self, before - gone)
            for site, before, gone in plan.steps()
            if before is not None and gone
        }
        real = reduce_tokens(edit, plan.axis, reducers)
        return plan.at(real).outcome(edit.close())

    def _keeps_all(self) -> bool:
        rates = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        return all(rate == 1 for rate in rates)

    def _plan(self, program: Program) -> Plan | PreconditionError:
        return plan_on_axis(program, self.axis, lambda axis: self._plan_on(program, axis))

    def _plan_on(self, program: Program, axis: TokenAxis) -> Plan | PreconditionError:
        causal = looks_back(program, axis)
        if causal and not axis.picks and not axis.marks:
            axis = replace(axis, picks=(-1,), suffix=max(axis.suffix, 1))
        tokens = fixed(axis.size)
        if refusal := _refusal(self, axis, tokens, causal):
            return refusal
        assert tokens is not None
        sites = choose_sites(axis, self.sites, 0, -1)
        if isinstance(sites, PreconditionError):
            return sites
        return Plan(axis, self._left(sites, tokens, axis.prefix + axis.suffix), self.fuse)

    def _left(self, sites: list[Site], tokens: int, protected: int) -> dict[Site, int]:
        """Say how many tokens leave at each site."""
        rates = expand_values(self.keep, len(sites), "keep")
        if self.schedule == "linear":
            steps = range(1, len(sites) + 1)
            rates = [1 - (1 - rate) * s / len(sites) for rate, s in zip(rates, steps, strict=True)]
        left, before = dict[Site, int](), tokens
        for site, rate in zip(sites, rates, strict=True):
            kept = protected + ceil(rate * (before - protected) - 1e-9)
            left[site] = before - kept
            before = kept + (self.fuse and kept < before)
        return left


def _refusal(
    options: PruneTokens, axis: TokenAxis, tokens: int | None, causal: bool
) -> PreconditionError | None:
    place = where(axis.sites[0].attention)
    if tokens is None:
        reason = f"the number of {axis.name} is dynamic: a share of it would count padding"
        return PreconditionError(
            place, reason, "leave 'length' out of dynamic, or use merge-tokens"
        )
    if options.fuse and (axis.suffix or causal):
        reason = "a fused token goes last, where " + (
            "causal attention hides it" if causal else "protected tokens stand"
        )
        return PreconditionError(place, reason, "use fuse=false")
    return None


def _reducer(options: PruneTokens, keep: int) -> Reducer:
    """Make the function that scores and drops tokens at one site."""

    def reduce(point: Point) -> Reduction:
        edit = point.edit
        score = edit.call(
            kernel("attention_row").op,
            *(point.query, point.key, point.bias, point.size),
            *(list(point.picks), point.scale, point.causal),
        )
        if point.marked is not None:
            above = edit.call(aten.full_like.default, score, 2.0)  # no attention is more than 1
            score = edit.call(aten.where.self, point.marked, above, score)
        ends = (point.prefix, point.suffix)
        kept = edit.call(kernel("select_tokens").op, score, keep, *ends)
        if not options.fuse:
            return Reduction(kept, None, False, _dropper(kept), None, point.x)
        return _fused(options, point, score, kept, keep)

    return reduce


def _dropper(kept: Node) -> Callable[[Edit, Node], Node]:
    def combine(edit: Edit, x: Node) -> Node:
        return edit.call(kernel("gather_tokens").op, x, kept, 1)

    return combine


def _fused(options: PruneTokens, point: Point, score: Node, kept: Node, keep: int) -> Reduction:
    """Append one token for the dropped ones; in masks the best of them stands for it."""
    edit = point.edit
    ends = (point.prefix, point.suffix)
    more = edit.call(kernel("select_tokens").op, score, keep + 1, *ends)
    sums = [edit.call(aten.sum.dim_IntList, node, [1], True) for node in (more, kept)]
    best = edit.call(aten.sub.Tensor, *sums)
    places = edit.call(aten.cat.default, [kept, best], 1)

    def combine(edit: Edit, x: Node) -> Node:
        held = edit.call(kernel("gather_tokens").op, x, kept, 1)
        fused = edit.call(kernel("fuse_tokens").op, x, score, kept, options.normalize)
        return edit.call(aten.cat.default, [held, fused], 1)

    def group(edit: Edit) -> Node:
        last = edit.call(aten.full_like.default, score, keep, dtype=torch.int64)
        spots = edit.call(aten.arange.default, keep)
        wide = edit.call(aten.expand_as.default, spots, kept)
        return edit.call(aten.scatter.src, last, 1, kept, wide)

    return Reduction(places, None, False, combine, group, point.x)
