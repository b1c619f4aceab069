"""Blocks: what lies between two neighbouring cuts, so that the model also runs without it."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch.fx import Node

from effopt.axes import same_sizes
from effopt.cuts import Cut, beside, content, find_cuts
from effopt.edit import Edit
from effopt.errors import PreconditionError
from effopt.program import Program, is_tensor, module_path, shape, value, where

OTHERS = "name other blocks"


@dataclass(frozen=True)
class Block:
    """One block: it reads the residual stream at `before` and yields it at `after`.

    `number` is that of its last attention call, as in `Cut`. `refusal` says why the model does not
    run without it, or is None. What is ahead of the first cut is no block.
    """

    number: int
    before: Node
    after: Node
    refusal: PreconditionError | None

    @property
    def path(self) -> str:
        """The path of the module at its end."""
        return module_path(self.after)


def find_blocks(program: Program) -> tuple[Block, ...]:
    """Return the blocks in order (an Analysis)."""
    pairs = pairwise(program.get(find_cuts))
    return tuple(_block(program, before, cut) for before, cut in pairs)


def _block(program: Program, before: Cut, cut: Cut) -> Block:
    reason = _why_needed(program, before.node, cut.node)
    refusal = None
    if reason:
        refusal = PreconditionError(where(cut.node), f"block {cut.block} {reason}", OTHERS)
    return Block(cut.block, before.node, cut.node, refusal)


def _why_needed(program: Program, before: Node, after: Node) -> str:
    ends = _size_text(program, before), _size_text(program, after)
    alike = value(before).dtype == value(after).dtype
    if not alike or not same_sizes(shape(before), shape(after)):
        return f"turns {ends[0]} into {ends[1]}: what follows does not fit what is ahead"
    later = _behind(program, after)
    inside = _behind(program, before) - later - program.get(beside)
    inside &= program.get(content) - {after}
    for node in program.nodes():
        if node in inside and is_tensor(node) and any(user in later for user in node.users):
            return f"hands on more than the stream: what follows reads {node.name}, too"
    return ""


def _size_text(program: Program, node: Node) -> str:
    sizes = (size if isinstance(size, int) else program.name_of(size) for size in shape(node))
    dtype = str(value(node).dtype).removeprefix("torch.")
    return f"{dtype}[{', '.join(map(str, sizes))}]"


def _behind(program: Program, start: Node) -> set[Node]:
    """Return the nodes that depend on one, without it."""
    found = {start}
    for node in program.nodes():
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found - {start}


def drop_blocks(edit: Edit, blocks: Iterable[Block]) -> None:
    """Let what follows each block read the stream ahead of it; none may have a refusal.

    What nothing reads any more is erased here: torch counts attention calls as random, and keeps
    those that are dead.
    """
    unread = {node for node in edit.graph.nodes if not node.users}
    for block in sorted(blocks, key=lambda block: -block.number):  # a later one reads an earlier
        edit.replace(block.after, block.before)
    for node in reversed(list(edit.graph.nodes)):
        if node.op == "call_function" and not node.users and node not in unread:
            edit.erase(node)


def without(program: Program, blocks: Iterable[Block], by: str) -> Program:
    """Return a fork without some blocks of a program."""
    fork = program.fork()
    twins = dict(zip(program.nodes(), fork.nodes(), strict=True))
    edit = Edit(fork, by)
    drop_blocks(
        edit,
        [Block(b.number, twins[b.before], twins[b.after], b.refusal) for b in blocks],
    )
    edit.close()
    return fork
