"""Schedules: how many tokens leave at which block, resolved to one number a site."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any

from torch.fx import Node

from effopt.axes import Size
from effopt.errors import PreconditionError, UsageError, unknown
from effopt.kernel import kernel
from effopt.passes.unify_attention import left_alone
from effopt.pipeline import Outcome
from effopt.program import Program, where
from effopt.sites import Site, TokenAxis, find_tokens

SCHEDULES = ("constant", "linear")


def plan_on_axis(
    program: Program, name: str, plan: "Callable[[TokenAxis], Plan | PreconditionError]"
) -> "Plan | PreconditionError":
    """Make a plan for the named token axis; without a name, for the first that can be reduced.

    Axes come by the number of their usable sites. Returns the first refusal if all refuse.
    """
    axes = token_axes(program, name)
    if isinstance(axes, PreconditionError):
        return axes
    plans = [plan(axes[0])]
    for axis in axes[1:]:
        if not isinstance(plans[-1], PreconditionError):
            return plans[-1]
        plans.append(plan(axis))
    return plans[-1] if not isinstance(plans[-1], PreconditionError) else plans[0]


def token_axes(program: Program, name: str = "") -> list[TokenAxis] | PreconditionError:
    """Return the axes with usable sites, those with most first; or why there is none."""
    for node in program.nodes():
        if node.target is kernel("quantized_linear").op:
            reason = "its layers have integer weights already, chosen for the tokens that there are"
            return PreconditionError(where(node), reason, "let tokens leave first: quantize last")
    known = program.get(find_tokens)
    found = [axis for axis in known if name in ("", axis.name)]
    if known and not found:
        raise unknown("token axis", name, [axis.name for axis in known])
    if not found:
        return next(iter(left_alone(program)), None) or PreconditionError(
            "model",
            "no self-attention call was found, so nothing counts tokens",
            "use a transformer, or a recipe without tokens",
        )
    usable = [axis for axis in found if axis.usable()]
    if usable and program.name_of(usable[0].size) == "batch":
        return PreconditionError(
            where(usable[0].sites[0].attention),
            "the first dimension of the inputs, which is named batch, counts the tokens",
            "let the model take [batch, tokens, channels], or capture it with dynamic=()",
        )
    if not usable:
        refusal = found[0].sites[0].refusal
        assert refusal is not None
        return refusal
    return sorted(usable, key=lambda axis: -len(axis.usable()))


def choose_sites(
    axis: TokenAxis, named: Sequence[int | float], first: int, last: int
) -> list[Site] | PreconditionError:
    """Return the sites of the named blocks, or of all usable blocks from first to last.

    A float below 1 names the usable block at that share of the depth. A block named by number
    must be usable: its refusal is returned otherwise.
    """
    by_block = {site.block: site for site in axis.sites}
    blocks = [_at_depth(axis, name) if isinstance(name, float) else name for name in named]
    if not blocks:
        return _from_to(axis, first, last if last >= 0 else max(by_block) + 1 + last)
    for block in blocks:
        if block not in by_block:
            known = ", ".join(map(str, by_block))
            reason = f"there is no block {block} with self-attention over {axis.name}"
            return PreconditionError("model", reason, f"name blocks among {known}")
    if any(isinstance(name, float) for name in named):
        blocks = list(dict.fromkeys(blocks))  # in a shallow model two depths are one block
    if sorted({*blocks}) != blocks:
        listed = ", ".join(map(str, blocks))
        raise UsageError(f"sites names the blocks {listed}", "name each block once, in order")
    refused = (by_block[block].refusal for block in blocks)
    return next((r for r in refused if r), None) or [by_block[block] for block in blocks]


def _from_to(axis: TokenAxis, first: int, last: int) -> list[Site]:
    found = [site for site in axis.usable() if first <= site.block <= last]
    if not found:
        usable = ", ".join(str(site.block) for site in axis.usable())
        raise UsageError(f"no block from {first} to {last} is usable", f"usable are {usable}")
    return found


def _at_depth(axis: TokenAxis, share: float) -> int:
    if not 0 <= share < 1:
        raise UsageError(f"sites names the depth {share}", "give a block, or a share from 0 to 1")
    usable = axis.usable()
    return usable[floor(share * len(usable))].block


def linear(r: int | float, inflect: float, sites: int) -> list[int | float]:
    """Spread r a site from r(1 - inflect) to r(1 + inflect); whole numbers are rounded down.

    The rule of ToMe. Where the line falls below zero, nothing leaves.
    """
    whole = isinstance(r, int)
    low = floor(r * (1 - inflect)) if whole else r * (1 - inflect)
    high = 2 * r - low
    line = [max(low + (high - low) * place / max(sites - 1, 1), 0) for place in range(sites)]
    return [floor(value) for value in line] if whole else [*line]


def removable(n: int, prefix: int, suffix: int) -> int:
    """Return the most tokens that bipartite matching can remove of n: half of the unprotected."""
    even = sum(1 for place in range(prefix, n - suffix) if place % 2 == 0)
    odd = n - suffix - prefix - even
    return max(0, min((n - prefix - suffix) // 2, even)) if odd > 0 else 0


def expand_values(
    value: int | float | tuple[int | float, ...], sites: int, option: str
) -> list[int | float]:
    """Give every site its value: one for all, or a list with one each."""
    if not isinstance(value, tuple):
        return [value] * sites
    if len(value) != sites:
        raise UsageError(
            f"{option} lists {len(value)} values for {sites} sites",
            "give one value, or one for each site; name the sites with sites=[...]",
        )
    return list(value)


def fixed(size: Size) -> int | None:
    """Return a size if it is the same for every input."""
    return size if isinstance(size, int) else None


@dataclass(frozen=True)
class Plan:
    """The axis to reduce, and how many of its tokens leave at each site (`left`).

    `fused` sites keep one token more, which stands for those that left. With a free length the
    counts are clamped when the engine runs.
    """

    axis: TokenAxis
    left: dict[Site, int]
    fused: bool = False

    def at(self, values: Collection[Node]) -> "Plan":
        """Return the plan without the sites at which no token left in the end."""
        left = {site: gone for site, gone in self.left.items() if not gone or site.node in values}
        return replace(self, left=left)

    def steps(self) -> list[tuple[Site, int | None, int]]:
        """List the sites with the tokens before (None for a free length) and those that leave."""
        found, before = list[tuple[Site, int | None, int]](), fixed(self.axis.size)
        for site, gone in self.left.items():
            found.append((site, before, gone))
            if before is not None:
                before += (self.fused and gone > 0) - gone
        return found

    def outcome(self, changed: bool) -> Outcome:
        """Write what was done at each site as notes and facts."""
        rows, notes = list[dict[str, Any]](), list[str]()
        for site, before, gone in self.steps():
            if before is None:
                most = "at most half of what may leave"
                notes.append(f"block {site.block}: {gone} tokens merge, {most}")
                continue
            after = before - gone + (self.fused and gone > 0)
            place = {"path": site.path, "block": site.block}
            rows.append({**place, "before": before, "after": after})
            notes.append(f"block {site.block}: {before} -> {after} tokens")
        facts = {
            "axis": self.axis.name,
            "sites": rows,
            "tokens": fixed(self.axis.size),
            "protected": [self.axis.prefix, self.axis.suffix],
        }
        return Outcome(changed, tuple(notes), facts)
