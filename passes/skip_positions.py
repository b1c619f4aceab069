"""skip-positions: the later a token stands, the fewer blocks it runs through.

Del Corro et al., "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient
LLM Inference", 2023 (arXiv 2307.02628), for the tokens of a prompt. The first block and the last
ones run for all tokens; later tokens pass by those that follow the first. As budgets never grow
with the position, every token finds the keys and values of all that it attends to.
"""

from dataclasses import dataclass, field
from math import floor
from typing import Any, ClassVar

from effopt.blocks import find_blocks
from effopt.edit import Edit
from effopt.errors import PreconditionError, UsageError
from effopt.passes.output_change import change_on_all
from effopt.pipeline import Outcome
from effopt.prefix import Span, find_span, shorten
from effopt.program import Program


@dataclass(frozen=True)
class SkipPositions:
    """Give each token a budget of blocks: all for the first, falling linearly to a share."""

    name: ClassVar[str] = "skip-positions"
    exact: ClassVar[bool] = False

    least: float = field(
        default=0.5, metadata={"help": "share of the blocks that the last token runs through"}
    )

    def __post_init__(self) -> None:
        if isinstance(self.least, bool) or not 0 < self.least <= 1:
            raise UsageError(f"least is {self.least}", "give a share above 0, up to 1")

    def check(self, program: Program) -> list[PreconditionError]:
        """Refuse where attention is not causal, the length is free, or a block needs all tokens."""
        try:
            self._plan(program)
        except PreconditionError as refusal:
            return [refusal]
        return []

    def run(self, program: Program) -> Outcome:
        """Let blocks run on a prefix of the tokens; the facts say how many in each."""
        plan = [(span, count) for span, count in self._plan(program) if count < span.size]
        if not plan:
            return Outcome(False, ("every token runs through every block",))
        original, edit = program.fork(), Edit(program, self.name)
        shorten(edit, plan)
        edit.close()
        notes, rows = list[str](), list[dict[str, Any]]()
        for span, count in plan:
            number = span.block.number
            notes.append(f"block {number}: {count} of {span.size} tokens")
            rows.append({"block": number, "path": span.block.path, "ran": count, "of": span.size})
        loss = change_on_all(original, program)
        if loss is not None:
            notes.append(f"the outputs change by {loss:.2g} of their energy, on all samples")
        return Outcome(True, tuple(notes), {"skipped": rows, "loss": loss})

    def _plan(self, program: Program) -> list[tuple[Span, int]]:
        """Return the blocks behind the first with the tokens that run through them."""
        found = program.get(find_blocks)
        if not found:
            reason = "a block lies between two cuts, and there are no two"
            raise PreconditionError("model", reason, "leave skip-positions out")
        spans, total = [find_span(program, block) for block in found], len(found) + 1
        return [(span, self.ran(n, total, span.size)) for n, span in enumerate(spans, 1)]

    def ran(self, block: int, blocks: int, tokens: int) -> int:
        """Return how many tokens run through a block, the first being 0.

        The token at p of N has the budget b = L (1 - (1 - least) p / (N - 1)) of L blocks: the
        first of them, and the last b - 1. So block i runs where L - i <= b - 1.
        """
        if self.least == 1 or block in (0, blocks - 1):
            return tokens
        last = (block - 1) / (blocks * (1 - self.least)) * (tokens - 1)
        return min(tokens, floor(last + 1e-9) + 1)
