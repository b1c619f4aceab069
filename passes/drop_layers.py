"""drop-layers: whole blocks leave, those first without which the outputs change least.

Neighbouring blocks of a deep model do much the same to the residual stream: Fan et al., "Reducing
Transformer Depth on Demand with Structured Dropout" (LayerDrop), 2019 (arXiv 1909.11556), and
Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024 (arXiv 2403.17887).
Here blocks are chosen one by one, by what the outputs lose on data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

from effopt.blocks import OTHERS, Block, drop_blocks, find_blocks, without
from effopt.cuts import beside, find_cuts
from effopt.edit import Edit
from effopt.errors import PreconditionError, UsageError
from effopt.passes.output_change import Trial, change_on_all, unmeasured
from effopt.pipeline import Outcome
from effopt.program import Program, where

_OUT = "leave drop-layers out"


@dataclass(frozen=True)
class _Step:
    """One block that leaves, and what the outputs lose without it and those before; if known."""

    block: Block
    loss: float | None

    def __str__(self) -> str:
        lost = "" if self.loss is None else f": the outputs change by {self.loss:.2g}"
        inside = f" ({self.block.path})" if self.block.path else ""
        return f"block {self.block.number}{inside} leaves{lost}"

    def facts(self) -> dict[str, Any]:
        """Return one row of the report."""
        return {"block": self.block.number, "path": self.block.path, "loss": self.loss}


@dataclass(frozen=True)
class DropLayers:
    """Remove whole blocks: so many, as many as a budget allows, or those that are named."""

    name: ClassVar[str] = "drop-layers"
    exact: ClassVar[bool] = False

    count: int = field(default=0, metadata={"help": "how many blocks leave"})
    max_loss: float = field(
        default=0.0,
        metadata={"help": "drop while outputs change by at most this share of their energy"},
    )
    blocks: tuple[int, ...] = field(
        default=(), metadata={"help": "which blocks leave, counted from 0"}
    )

    def __post_init__(self) -> None:
        if sum(map(bool, (self.count, self.max_loss, self.blocks))) != 1:
            reason = "drop-layers wants one of count, max-loss and blocks"
            raise UsageError(reason, "write drop-layers{count=2}, say")
        if self.count < 0 or not self.max_loss >= 0:
            reason = f"count is {self.count} and max-loss {self.max_loss:g}"
            raise UsageError(reason, "give a count from 1, or a share above 0")
        if len(set(self.blocks)) < len(self.blocks) or min(self.blocks, default=0) < 0:
            raise UsageError(f"blocks is {self.blocks}", "give numbers from 0, each once")

    def check(self, program: Program) -> list[PreconditionError]:
        """Refuse where a block cannot leave, or where no data tells which one should."""
        try:
            self._candidates(program)
        except PreconditionError as refusal:
            return [refusal]
        return []

    def run(self, program: Program) -> Outcome:
        """Drop blocks; the facts list them with what the outputs had lost by then."""
        candidates = self._candidates(program)
        steps, note = self._chosen(program, candidates)
        loss = self._loss(program, steps)
        while steps and self.max_loss and loss is not None and loss > self.max_loss:
            note = f"no block leaves: the outputs change by {loss:.2g} of their energy or more"
            steps = steps[:-1]
            loss = self._loss(program, steps)
        if not steps:
            return Outcome(False, (note,))
        total, edit = len(program.get(find_blocks)) + 1, Edit(program, self.name)
        drop_blocks(edit, [step.block for step in steps])
        edit.close()
        whole = f"{len(steps)} of {total} blocks leave"
        if loss is not None:
            whole += f"; the outputs change by {loss:.2g} of their energy, on all samples"
        facts = {"blocks": total, "dropped": [step.facts() for step in steps], "loss": loss}
        return Outcome(True, (*map(str, steps), whole), facts)

    def _candidates(self, program: Program) -> list[Block]:
        """Return the blocks that are named, or those among which the search chooses."""
        found = program.get(find_blocks)
        if not found:
            reason = "a block lies between two cuts, and there are no two"
            raise PreconditionError("model", reason, _OUT)
        if self.blocks:
            return [_named(program, found, number) for number in sorted(self.blocks)]
        refusals = [_refusal(program, block) for block in found]
        free = [block for block, why in zip(found, refusals, strict=True) if why is None]
        if len(free) < max(self.count, 1):
            reason = f"of {len(found)} blocks behind the first {len(free)} may leave"
            told = [why for why in refusals if why is not None]
            reason += f" ({told[0].reason})" if told else ""
            raise PreconditionError(told[0].node if told else "model", reason, "drop fewer blocks")
        if why := unmeasured(program):
            raise PreconditionError(why.node, why.reason, f"{why.remedy}, or name blocks")
        return free

    def _chosen(self, program: Program, left: list[Block]) -> tuple[list[_Step], str]:
        """Return the blocks that leave, one by one; the note says why none does."""
        if unmeasured(program):
            return [_Step(block, None) for block in left], ""
        trial, steps, most = Trial(program), list[_Step](), self.max_loss or inf
        while left and (not self.count or len(steps) < self.count):
            gone = [step.block for step in steps]
            tried = left[:1] if self.blocks else left
            losses = [trial.change(without(program, [*gone, own], self.name)) for own in tried]
            loss = min(losses)
            block = left.pop(losses.index(loss))
            if loss > most:
                note = f"no block leaves: the outputs change by {loss:.2g} of their energy or more"
                return steps, note
            steps.append(_Step(block, loss))
        return steps, ""

    def _loss(self, program: Program, steps: Sequence[_Step]) -> float | None:
        """Measure what the outputs lose on all of the calibration data, if they can."""
        return change_on_all(program, without(program, [s.block for s in steps], self.name))


def _named(program: Program, found: Sequence[Block], number: int) -> Block:
    """Return a block by its number, or raise why it cannot leave."""
    known = ", ".join(str(block.number) for block in found)
    block = next((block for block in found if block.number == number), None)
    if block is None:
        first = program.get(find_cuts)[0].block
        reason = f"no block ends at attention call {number}: {known} may be named"
        if number <= first:
            reason = f"nothing to read is ahead of block {number}: {known} may be named"
        raise PreconditionError("model", reason, OTHERS)
    if refusal := _refusal(program, block):
        raise refusal
    return block


def _refusal(program: Program, block: Block) -> PreconditionError | None:
    """Say why a block must stay: the model needs it, or the head of an exit is fitted to it."""
    if any(user in program.get(beside) for user in block.after.users):
        reason = f"an exit stands behind block {block.number}, and its head was fitted there"
        remedy = f"{OTHERS}, or put drop-layers ahead of exit-early"
        return PreconditionError(where(block.after), reason, remedy)
    return block.refusal
