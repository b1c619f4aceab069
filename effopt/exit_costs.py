"""What it costs to leave at an exit."""

from itertools import accumulate

from torch.fx import Node

from effopt.cost import macs_by_node
from effopt.exits import find_exits
from effopt.program import Program
from effopt.segments import Stages


def costs(program: Program) -> tuple[float, ...]:
    """Return what it costs to leave at each exit, and at the end, over the model without exits.

    In multiply-accumulates; the last is above 1 by the heads. Raises PreconditionError where a
    size depends on data.
    """
    exits = program.get(find_exits)
    assert exits is not None, "a program with exits"
    stages, counts = Stages(program, exits), macs_by_node(program)
    own, todo = set[Node](), list(exits.ends.values())
    while todo:
        node = todo.pop()
        todo += [] if node in own else node.all_input_nodes
        own.add(node)
    whole = sum(counts[node] for node in own) or 1
    sums = [0] * (len(exits.exits) + 1)
    for node, place in stages.of.items():
        sums[place] += counts[node]
    return tuple(total / whole for total in accumulate(sums))
