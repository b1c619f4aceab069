"""What the sizes of a program were found to obey, and whether a pass narrowed them."""

import itertools
from typing import Any

from effopt.program import Program
from tests.oracle.case import Case
from tests.oracle.compare import Faults


def guards(program: Program) -> list[Any]:
    """Return what the sizes of a program were found to obey."""
    mode = getattr(program.inputs()[0].meta["val"], "fake_mode", None)
    known = mode is not None and mode.shape_env is not None
    return [guard.expr for guard in mode.shape_env.guards] if known else []


def narrowed(case: Case, before: int) -> Faults:
    """New facts about sizes must hold at every size that was free."""
    symbols = {name: symbol for symbol, name in case.original.dynamic.items()}
    low = case.original.ranges.get("length", (1, 1))[0]
    found = []
    for fact in guards(case.reduced)[before:]:
        for batch, length in itertools.product((1, 2, 3, 5), (low, low + 1, low + 6, low + 7)):
            given = {symbols.get("batch"): batch, symbols.get("length"): length}
            sizes = {one: given[str(one)] for one in fact.free_symbols if str(one) in given}
            if fact.subs(sizes) == False:  # noqa: E712 - of sympy
                found.append(f"a size is no longer free: {fact} at batch {batch}, length {length}")
                break
    return found
