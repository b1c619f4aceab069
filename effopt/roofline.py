"""The roofline of a target: the least time that a program can take on it, an estimate.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", 2009: a
program takes at least the time of its operations at the peak of their types, and at least that of
reading its weights and inputs and writing its outputs at the bandwidth of the memory. Operations
are those of the products of `effopt.cost`. What lies between them is taken to stay on the chip, as
the best engine would have it. Real engines are slower, small batches most.
"""

from collections.abc import Mapping

import torch
from torch.fx import Node

from effopt.axis_rules import argument
from effopt.cost import elements, macs_by_node, symbol_sizes
from effopt.errors import PreconditionError
from effopt.program import Program, value
from effopt.report import Estimate
from effopt.target import Target

BATCHES = (1, 8)
"""Batch sizes that estimates are made for."""

_INTEGERS: Mapping[str, str] = {"static": "int8", "tensor": "int8", "row": "int8", "fp8": "fp8"}
"""Types of products by the `activations` of a quantized linear; others compute in that of x."""


def estimates(before: Program, after: Program, target: Target) -> tuple[Estimate, ...]:
    """Return the least times of two programs on a target, or nothing where figures are missing.

    With a batch that is fixed there is one estimate, for that batch.
    """
    made = []
    dynamic = "batch" in before.dynamic.values()
    for batch in BATCHES if dynamic else (1,):
        sizes = {"batch": batch} if dynamic else {}
        try:
            pair = [least_ms(program, target, sizes) for program in (before, after)]
        except PreconditionError:  # a size that depends on the data: the report says so of the MACs
            return ()
        if pair[0] is None or pair[1] is None:
            return ()
        made.append(Estimate(batch if dynamic else 0, pair[0], pair[1]))
    return tuple(made)


def least_ms(program: Program, target: Target, sizes: Mapping[str, int]) -> float | None:
    """Return the least milliseconds of one run on a target; None without figures for its types.

    `sizes` and the errors are those of `effopt.cost.macs`.
    """
    if target.bandwidth is None:
        return None
    peaks, symbols, computing = dict(target.peak), symbol_sizes(program, sizes), 0.0
    for node, macs in macs_by_node(program, sizes).items():
        peak = peaks.get(_type(node)) if macs else None
        if macs and peak is None:
            return None
        computing += 2 * macs / (peak * 1e12) if peak else 0.0
    moved = sum(_bytes(node, symbols) for node in _moved(program))
    return 1e3 * max(computing, moved / (target.bandwidth * 1e9))


def _moved(program: Program) -> list[Node]:
    """Return what has to be read or written at the least: weights, inputs and outputs."""
    (returned,) = program.output().args
    outputs = [node for node in returned if isinstance(node, Node)]  # type: ignore[union-attr]
    weights = {node.target: node for node in program.nodes() if node.op == "get_attr"}
    return list(dict.fromkeys((*weights.values(), *program.inputs(), *outputs)))


def _type(node: Node) -> str:
    """Name the type that a product is computed in, as the peaks of targets do."""
    own = str(value(node).dtype).removeprefix("torch.")
    return _INTEGERS.get(str(argument(node, "activations")), own) if _quantized(node) else own


def _quantized(node: Node) -> bool:
    return str(node.target).startswith("effopt.quantized_linear")


def _bytes(node: Node, symbols: Mapping[str, int]) -> float:
    """Return the bytes of what a node yields; codes of four bits take half a byte each."""
    packed = any(
        argument(user, "codes") is node and argument(user, "bits") == 4
        for user in filter(_quantized, node.users)
    )
    val = value(node)
    first = val if isinstance(val, torch.Tensor) else val[0]
    return elements(node, symbols) * (0.5 if packed else first.element_size())
