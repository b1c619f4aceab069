"""Scales: which input channels of which linear layers can be scaled, and who takes that up.

Quantization of a linear layer gains when some input channels are scaled up in the weight and down
in the activation (Lin et al., "AWQ", 2023, arXiv 2306.00978; Xiao et al., "SmoothQuant", 2022,
arXiv 2211.10438). Every element of every value gets a label, and the rewritten graph computes
v / S[label]; operators tie labels (`effopt.scale_rules`), constants take up the rest. So any
positive S leaves the outputs as they are, and only its values are a matter of choice.

Limits: a weight with two readers, or that shares memory with another, is never scaled; writes into
memory must be gone, as they are in a captured program.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from effopt.labelling import Labelling
from effopt.program import Program, module_path, value
from effopt.scale_groups import ScaleGroup, Scales, grouped
from effopt.scale_rules import opaque
from effopt.scale_table import ORIGINS, rule_of

__all__ = ["ScaleGroup", "Scales", "describe", "find_scales"]

BATCH, OTHER = 2, 3
"""Sizes that stand for the batch, and for what only the data says."""


def find_scales(program: Program) -> Scales:
    """Find the scale groups of a program in normal form (an Analysis)."""
    state = Labelling(own=frozenset(_own(program)), sizes=_Sizes(program))
    for node in program.nodes():
        state.order.append(node)
        if node.op == "output":
            opaque(state, node)
        elif node.op == "call_function":
            _visit(state, node)
        elif node.op == "placeholder":
            state.blame[node] = node
    return grouped(state)


def _own(program: Program) -> Iterable[Node]:
    """Yield the floating constants that one place of one node reads, in memory of their own."""
    constants = [node for node in program.nodes() if node.op == "get_attr"]
    tensors = {node: program.weight(node) for node in constants}
    stored = Counter(held.untyped_storage()._cdata for held in tensors.values())
    for node, held in tensors.items():
        alone = stored[held.untyped_storage()._cdata] == 1 and len(node.users) == 1
        if alone and held.is_floating_point() and held.numel():
            reader = next(iter(node.users))
            reads = pytree.tree_leaves((reader.args, reader.kwargs))
            if sum(arg is node for arg in reads) == 1:
                yield node


class _Sizes:
    """Numbers for symbolic sizes: 2 for the batch, and the captured lengths."""

    def __init__(self, program: Program) -> None:
        self.known: dict[Any, sympy.Integer] = {}
        for node, sample in zip(program.inputs(), program.samples, strict=True):
            for size, number in zip(value(node).shape, sample.shape, strict=True):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    batch = program.name_of(size) == "batch"
                    self.known[size.node.expr] = sympy.Integer(BATCH if batch else number)

    def __call__(self, size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        other = {symbol: sympy.Integer(OTHER) for symbol in expression.free_symbols}
        return int(expression.xreplace({**other, **self.known}))


def _visit(state: Labelling, node: Node) -> None:
    """Label the result of a node; one whose labels would follow from free sizes has none."""
    rule = rule_of(node)
    found, val = rule(state, node), value(node)
    several = isinstance(val, (tuple, list))
    pairs = [*zip(found, val, strict=True)] if several and found is not None else [(found, val)]
    if not all(_holds(state, labels, own) for labels, own in pairs):
        opaque(state, node)
        for labels, _ in pairs:
            if labels is not None:
                state.labels.pin(labels, state.cause)
        found, rule = None, opaque
    state.at[node] = found
    if found is None:
        sources = [] if rule in ORIGINS else node.all_input_nodes
        blamed = (state.blame[source] for source in sources if source in state.blame)
        state.blame[node] = next(blamed, node)


def _holds(state: Labelling, labels: Tensor | None, val: Any) -> bool:
    """Tell whether labels are of a floating value, of its shape, the same at all free sizes."""
    if labels is None:
        return True
    if not val.is_floating_point() or labels.shape != tuple(map(state.sizes, val.shape)):
        return False
    free = [dim for dim, size in enumerate(val.shape) if isinstance(size, torch.SymInt)]
    return not any(state.varies(labels, dim) for dim in free)


def describe(scales: Scales) -> list[dict[str, Any]]:
    """Write the groups as rows of JSON: kind, linears, source, width, roots, producers, pinned."""
    return [
        {
            "kind": group.kind,
            "linears": [_place(node) for node in group.linears],
            "source": _place(group.source),
            "width": len(group.roots),
            "roots": group.count,
            "producers": [_place(node) for node in group.producers],
            "pinned": scales.pinned.get(group.source, "") if group.kind == "mul" else "",
        }
        for group in scales.groups
    ]


def _place(node: Node) -> str:
    return module_path(node) or node.name
