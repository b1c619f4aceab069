"""Comparing outputs: in words, what differs; and rows, sizes and outputs of a case."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from tests.oracle.case import Case, Inputs
from tests.oracle.decisions import decisions, row_at
from tests.oracle.interpreter import Recorder

CLOSE = 2e-4
"""Of the largest value: float32 through four blocks; a wrong token shows as 1e-2 or more."""


Faults = list[str]


def differ(got: Sequence[Tensor], want: Sequence[Tensor], close: float) -> Faults:
    found = []
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape:
            found.append(f"{place} has shape {[*a.shape]}, not {[*b.shape]}")
            continue
        if not b.numel():
            continue
        a, b = a.double(), b.double()
        both = b.isfinite()
        if bool((a.isfinite() != both).any()):
            found.append(f"{place} is not finite where it should be")
            continue
        a, b = torch.where(both, a, 0.0), torch.where(both, b, 0.0)
        error, scale = float((a - b).abs().max()), float(b.abs().max())
        if error > close * max(scale, 1e-3):
            found.append(f"{place} differs by {error:.2g} of {scale:.2g}")
    return found


def sizes(case: Case) -> list[tuple[int, int | None]]:
    """Return batches and lengths to try, the captured ones first."""
    found: list[tuple[int, int | None]] = [(2, None), (1, None), (3, None), (5, None)]
    if "batch" not in case.original.ranges:
        found = [(len(case.original.samples[0]), None)]
    if case.free_length:
        low, high = case.original.ranges["length"]
        now = next(
            x.shape[item.shape.index("length")]
            for x, item in zip(case.original.samples, case.original.signature.inputs, strict=True)
            if "length" in item.shape
        )
        wanted = {min(max(now + more, low), high) for more in (-3, -1, 2)} - {now}
        found = found[:3] + [(2 + n % 2, length) for n, length in enumerate(sorted(wanted))]
    return found


def mixes_samples(case: Case) -> bool:
    """Tell whether the model itself reads one sample for another."""
    inputs = case.draw(3, None)
    together = case.original.run(inputs)
    for row in (0, 1):
        alone = case.original.run(one_row(case, inputs, row))
        rows = [row_of(case, out, place, row) for place, out in enumerate(together)]
        if differ(alone, rows, CLOSE):
            return True
    return False


def one_row(case: Case, inputs: Inputs, row: int) -> Inputs:
    specs = case.original.signature.inputs
    return tuple(
        x[row : row + 1] if item.shape[:1] == ("batch",) else x
        for x, item in zip(inputs, specs, strict=True)
    )


def row_of(case: Case, out: Tensor, place: int, row: int) -> Tensor:
    """Return one sample of an output; where the model fixes its batch, that leads."""
    shape = case.original.signature.outputs[place].shape
    if "batch" in shape:
        return out.narrow(shape.index("batch"), row, 1)
    rows = len(case.original.samples[0])
    if "batch" in case.original.ranges or not out.ndim or len(out) % rows:
        return out
    return out.unflatten(0, (rows, len(out) // rows))[row : row + 1].flatten(0, 1)


def output_node(case: Case, place: int) -> Node:
    outputs = case.normal.output().args[0]
    assert isinstance(outputs, tuple)
    node = outputs[place]
    assert isinstance(node, Node)
    return node


def real_tokens(case: Case, run: Recorder, row: int) -> Tensor | None:
    first = decisions(case)[0]
    if first.kind != "merge":
        return None
    size: Tensor = run.values[first.node.args[1].name]  # type: ignore[union-attr]
    return size[row_at(case, run, row, first)] > 0
