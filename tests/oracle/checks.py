"""The checks: each takes a case and returns what is wrong with it, in words."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from effopt.attention import mask_of
from effopt.tokens import Kind, Range
from tests.oracle.case import Case, Inputs
from tests.oracle.compare import (
    CLOSE,
    Faults,
    differ,
    mixes_samples,
    one_row,
    output_node,
    real_tokens,
    row_of,
    sizes,
)
from tests.oracle.decisions import Step, UnknownDecision, alike, choosers, chosen, steps
from tests.oracle.emulate import Emulator, ForcedError, NotEmulated, cut, emulated
from tests.oracle.interpreter import Recorder, outputs_of, record
from tests.oracle.invariants import duplicates, padding, permutation


def faults(case: Case) -> Faults:
    """Run every check."""
    return [f"{name}: {fault}" for name in CHECKS for fault in _found(name, case)]


def _found(name: str, case: Case) -> Faults:
    try:
        return CHECKS[name](case)
    except UnknownDecision as reason:
        return [f"the program cannot be read: {reason}"]


def free_sizes(case: Case) -> Faults:
    """At every size: the shapes and dtypes of the original, finite; no size became fixed."""
    found = []
    for batch, length in sizes(case):
        inputs = case.draw(batch, length)
        want, got = case.original.run(inputs), case.reduced.run(inputs)
        for place, (a, b) in enumerate(zip(got, want, strict=True)):
            if a.shape != b.shape or a.dtype != b.dtype:
                found.append(
                    f"output {place} is {a.dtype} {[*a.shape]}, not {b.dtype} {[*b.shape]}"
                )
            elif bool(b.isfinite().all()) and not bool(a.isfinite().all()):
                found.append(f"output {place} is not finite at batch {batch}, length {length}")
    return found + _fixed_sizes(case)


def _fixed_sizes(case: Case) -> Faults:
    outputs = case.reduced.output().args[0]
    assert isinstance(outputs, tuple)
    found = []
    for node, spec in zip(outputs, case.original.signature.outputs, strict=True):
        assert isinstance(node, Node)
        for size, name in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(name, str) and isinstance(size, int):
                found.append(f"output {spec.name} has {size} where {name} was free")
    return found


def identity(case: Case) -> Faults:
    """The normal form yields what the captured model does."""
    inputs = case.draw(*sizes(case)[0])
    return differ(case.normal.run(inputs), case.original.run(inputs), 2e-5)


def batch_independence(case: Case) -> Faults:
    """A sample alone gives its row: the same scores, and with the same choices the same outputs.

    Choices are compared by their scores, since rounding settles a tie one way or the other.
    """
    if "batch" not in case.original.ranges or mixes_samples(case):
        return []
    inputs = case.draw(3, None)
    together = record(case.reduced, inputs)
    found = []
    for row in range(3):
        same = {node.name: chosen(node, together, row, 3) for node in choosers(case.reduced)}
        changes = {name: lambda _, value=value: value for name, value in same.items()}
        alone = record(case.reduced, one_row(case, inputs, row), changes)
        scores = [node.args[0] for node in choosers(case.reduced)]
        for score in scores:
            pair = alone.values[score.name], chosen(score, together, row, 3)
            found += [f"row {row}: score {fault}" for fault in differ([pair[0]], [pair[1]], CLOSE)]
        want = [row_of(case, out, n, row) for n, out in enumerate(outputs_of(together))]
        found += [f"row {row}: {fault}" for fault in differ(outputs_of(alone), want, CLOSE)]
    return found


def emulation(case: Case) -> Faults:
    """The original at full length, with the same choices, yields the same outputs."""
    found: Faults = []
    if "batch" in case.original.ranges and mixes_samples(case):
        return []
    for batch, length in (sizes(case)[0], *sizes(case)[3:4], *sizes(case)[4:5]):
        inputs = case.draw(batch, length)
        run = record(case.reduced, inputs, alike(case, inputs))
        try:
            for row in range(min(batch, 2)):
                found += _emulated_row(case, inputs, row, run)
        except (UnknownDecision, NotEmulated) as reason:
            return [f"cannot be emulated: {reason}"]
    return found


def _emulated_row(case: Case, inputs: Inputs, row: int, run: Recorder) -> Faults:
    made = steps(case, run, row)
    if not made:
        return ["no reduction is found in the program"]
    found = _protected(case, made)
    valid = real_tokens(case, run, row)
    try:
        emulator, want = emulated(case, run, made, inputs, row, valid)
    except ForcedError:
        return found
    counted = _counted(made, emulator, valid) & _real(case, inputs, row, len(made[0].moved))
    for place, (got, expected) in enumerate(zip(outputs_of(run), want, strict=True)):
        mine = row_of(case, got, place, row)
        if expected.shape != mine.shape:  # all samples were emulated, with the choices of this one
            expected = row_of(case, expected, place, row)
        tokens = case.axis.tokens.on(output_node(case, place))
        for dim, spot in tokens.items():
            if isinstance(spot, Range) and spot.pure:
                some = cut(counted, spot, mine.shape[dim]).nonzero()[:, 0]
                mine, expected = (x.index_select(dim, some) for x in (mine, expected))
        found += [f"row {row}, output {place} {f}" for f in differ([mine], [expected], CLOSE)]
    return found


def _protected(case: Case, made: list[Step]) -> Faults:
    """Protected tokens must be among those that stay, each alone."""
    found = []
    for step in made:
        count = step.weights.shape[1]
        ends = [*range(case.axis.prefix), *range(count - case.axis.suffix, count)]
        for place in ends:
            alone = step.moved[place] >= 0 and int((step.moved == step.moved[place]).sum()) == 1
            if not alone or step.places[step.moved[place]] != place:
                found.append(f"the protected token {place} left at {step.site}")
    return found


def _counted(made: list[Step], emulator: Emulator, valid: Tensor | None) -> Tensor:
    """Return the tokens at which outputs are promised: no padding, none that is not given back."""
    count = made[0].weights.shape[1]
    counted = torch.ones(count, dtype=torch.bool) if valid is None else valid
    if made[0].kind == "prune" and not emulator.thawed:
        counted = counted & (emulator.epochs[-1].moved >= 0)
    return counted


def _real(case: Case, inputs: Inputs, row: int, count: int) -> Tensor:
    """Return the tokens that some query of the normal form attends to: the others are padding."""
    values = record(case.normal, inputs).values
    real = torch.ones(count, dtype=torch.bool)
    for node, effect in case.axis.effects.items():
        mask = mask_of(node) if effect.kind is Kind.ATTEND else None
        if mask is None or values[mask.name].shape[-1] not in (1, count):
            continue
        found = values[mask.name]
        own = found[min(row, len(found) - 1)] if found.ndim == 4 else found
        seen = own if own.dtype == torch.bool else own > HIDDEN
        real &= seen.expand(*own.shape[:-1], count).reshape(-1, count).any(0)
    return real


HIDDEN = -1e3
"""A bias below this hides a token."""


CHECKS: dict[str, Callable[[Case], Faults]] = {
    "identity": identity,
    "free sizes": free_sizes,
    "batch independence": batch_independence,
    "emulation": emulation,
    "duplicates": duplicates,
    "permutation": permutation,
    "padding": padding,
}
"""Each check by its name."""
