"""merge-tokens: tokens that are alike become one (bipartite soft matching on keys).

Bolya et al., "Token Merging: Your ViT But Faster", 2022 (arXiv 2210.09461).
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import floor
from typing import ClassVar

import torch
from torch.fx import Node

from effopt.edit import Edit
from effopt.errors import PreconditionError, UsageError, unknown
from effopt.kernel import kernel
from effopt.masks import find_padding
from effopt.mend import reduce_tokens
from effopt.passes.schedule import (
    SCHEDULES,
    Plan,
    choose_sites,
    expand_values,
    fixed,
    linear,
    plan_on_axis,
    removable,
)
from effopt.pipeline import Outcome
from effopt.program import Program, where
from effopt.sites import Site, TokenAxis
from effopt.spec import show
from effopt.state import Point, Reducer, Reduction

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeTokens:
    """Merge r tokens into their most similar ones in chosen blocks, between attention and MLP.

    Merged tokens are averages weighted by how many originals they stand for; attention adds the
    logarithm of that number (proportional attention). Protected tokens stay.
    """

    name: ClassVar[str] = "merge-tokens"
    exact: ClassVar[bool] = False

    r: int | float | tuple[int | float, ...] = field(
        metadata={"help": "tokens that leave at each site, or (below 1) their share; or a list"}
    )
    sites: tuple[int | float, ...] = field(
        default=(), metadata={"help": "blocks from 0, or (below 1) depths; empty: first to last"}
    )
    first: int = field(default=0, metadata={"help": "first block"})
    last: int = field(default=-1, metadata={"help": "last block, negative from the end"})
    schedule: str = field(default="constant", metadata={"help": "constant or linear"})
    inflect: float = field(
        default=1.0, metadata={"help": "slope of linear: from r(1-inflect) to r(1+inflect)"}
    )
    proportional: bool = field(
        default=True, metadata={"help": "add log(size) of merged tokens to the attention logits"}
    )
    axis: str = field(
        default="", metadata={"help": "which tokens, as `effopt inspect` names them: vision.tokens"}
    )

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        wrong = [r for r in self._listed() if r < 0 or (isinstance(r, float) and r >= 1)]
        if wrong:
            reason = f"r of merge-tokens is {show(wrong[0])}"
            raise UsageError(
                reason, "give a whole number from 0 on, or a share below 1 such as 0.3"
            )

    def check(self, program: Program) -> list[PreconditionError]:
        """Refuse where no token axis, no site or no padding mask that sizes can stand for."""
        if not any(self._listed()):
            return []
        plan = self._plan(program)
        return [plan] if isinstance(plan, PreconditionError) else []

    def run(self, program: Program) -> Outcome:
        """Rewrite the graph; the notes give the effective counts."""
        if not any(self._listed()):
            return Outcome(False, ("r = 0: nothing to merge",))
        plan = self._plan(program)
        if isinstance(plan, PreconditionError):
            raise plan
        edit = Edit(program, self.name)
        reducers: Mapping[Site, Reducer] = {
            site: _reducer(self, r) for site, r in plan.left.items() if r
        }
        real = reduce_tokens(edit, plan.axis, reducers)
        return plan.at(real).outcome(edit.close())

    def _listed(self) -> tuple[int | float, ...]:
        return self.r if isinstance(self.r, tuple) else (self.r,)

    def _plan(self, program: Program) -> Plan | PreconditionError:
        return plan_on_axis(program, self.axis, self._plan_on)

    def _plan_on(self, axis: TokenAxis) -> Plan | PreconditionError:
        if refusal := find_padding(axis).refusal:
            return refusal
        sites = choose_sites(axis, self.sites, self.first, self.last)
        if isinstance(sites, PreconditionError):
            return sites
        wanted = self._wanted(len(sites))
        tokens = fixed(axis.size)
        if tokens is None:
            return _free_length(axis, sites, wanted)
        if sites and 2 * _count(wanted[0], tokens) > tokens:
            raise UsageError(
                f"r = {show(wanted[0])} is more than half of the {tokens} tokens at the first site",
                f"at most {removable(tokens, axis.prefix, axis.suffix)} can merge there",
            )
        return Plan(axis, _effective(axis, dict(zip(sites, wanted, strict=True)), tokens))

    def _wanted(self, sites: int) -> list[int | float]:
        if self.schedule == "linear" and not isinstance(self.r, tuple):
            return linear(self.r, self.inflect, sites)
        return expand_values(self.r, sites, "r")


def _count(r: int | float, tokens: int) -> int:
    """Resolve a share of the tokens to a number."""
    return floor(r * tokens) if isinstance(r, float) else r


def _effective(axis: TokenAxis, wanted: dict[Site, int | float], tokens: int) -> dict[Site, int]:
    """Clamp each count to half of what may leave there."""
    effective = {}
    for site, r in wanted.items():
        most = removable(tokens, axis.prefix, axis.suffix)
        effective[site] = min(_count(r, tokens), most)
        tokens -= effective[site]
    return effective


def _free_length(
    axis: TokenAxis, sites: list[Site], wanted: list[int | float]
) -> Plan | PreconditionError:
    """Take whole numbers as they are: they are clamped when the engine runs."""
    shares = [r for r in wanted if isinstance(r, float)]
    if shares:
        reason = f"the number of {axis.name} is dynamic, and a share of it would count padding"
        remedy = "give r as a whole number, or leave 'length' out of dynamic"
        return PreconditionError(where(sites[0].attention), reason, remedy)
    return Plan(axis, {site: int(r) for site, r in zip(sites, wanted, strict=True)})


def _reducer(options: MergeTokens, r: int) -> Reducer:
    """Make the function that chooses and merges tokens at one site."""

    def reduce(point: Point) -> Reduction:
        edit = point.edit
        count, keep = _counts(point, r)
        metric = edit.call(aten.mean.dim, point.key, [1])
        match = edit.call(
            kernel("match_tokens").op,
            *(metric, point.size, count, keep, point.prefix, point.suffix, point.ordered),
        )
        kept, source, target = (edit.item(match, place) for place in range(3))
        merge = kernel("merge_tokens").op
        merged = edit.call(merge, point.x, point.size, kept, source, target)
        size = edit.item(merged, 1)

        def combine(edit: Edit, x: Node) -> Node:
            if x is point.x:
                return edit.item(merged, 0)
            return edit.item(edit.call(merge, x, point.size, kept, source, target), 0)

        def group(edit: Edit) -> Node:
            return edit.call(kernel("group_tokens").op, point.x, kept, source, target)

        return Reduction(kept, size, options.proportional, combine, group, point.x)

    return reduce


def _counts(point: Point, r: int) -> tuple[int | Node, int | Node]:
    """Return how many tokens leave and stay; a free length is clamped when the engine runs.

    Of N tokens, p protected, min(r, (N-p)//2, N-2) leave and max(N-r, (N+p+1)//2, 2) stay: so
    written, both are known not to be negative. (Of less than two, nothing could be chosen.)
    """
    if isinstance(point.length, int):
        return r, point.length - r
    edit, protected = point.edit, point.prefix + point.suffix
    length = edit.call(aten.sym_size.int, point.x, 1)
    free = edit.call(operator.sub, length, protected)
    most = edit.call(operator.floordiv, free, 2)
    least = edit.call(operator.add, length, protected + 1)
    least = edit.call(operator.floordiv, least, 2)
    rest = edit.call(operator.sub, length, r)
    most = edit.call(torch.sym_min, most, edit.call(operator.sub, length, 2))
    least = edit.call(torch.sym_max, least, 2)
    return edit.call(torch.sym_min, r, most), edit.call(torch.sym_max, rest, least)
