"""unify-layers: one ATen form for every spelling of a layer: linear, norm, activation, pooling."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from effopt.edit import Edit
from effopt.errors import PreconditionError
from effopt.match import heads, match
from effopt.passes.layer_patterns import LAYERS
from effopt.passes.layer_products import PRODUCTS
from effopt.passes.layer_views import VIEWS
from effopt.pipeline import Outcome
from effopt.program import Program

ONE_NODE = {**VIEWS, **PRODUCTS}
"""Spellings that one node shows."""


@dataclass(frozen=True)
class UnifyLayers:
    """Bring linear layers, norms, activations, pooling and splits to one ATen form. Exact."""

    name: ClassVar[str] = "unify-layers"
    exact: ClassVar[bool] = True

    def check(self, program: Program) -> list[PreconditionError]:
        """Accept every program."""
        return []

    def run(self, program: Program) -> Outcome:
        """Rewrite in execution order, so that a layer is read from parts in their one form."""
        edit = Edit(program, self.name)
        made = list[Node]()
        for node in list(program.nodes()):
            if node.op != "call_function":
                continue
            new = _unified(edit, node)
            if new is not None:
                made.append(new)
                edit.replace(node, new)
        changed = edit.close()
        left = set(program.nodes())
        return Outcome(changed, (_note(node for node in made if node in left),))


def _note(made: Iterable[Node]) -> str:
    """Count what was made by the name of its operator: "2 layer_norm, 1 silu"."""
    names = Counter(str(node.target.overloadpacket.__name__) for node in made)  # type: ignore[union-attr]
    counts = ", ".join(f"{count} {name}" for name, count in sorted(names.items()))
    return counts or "no other spelling found"


def _unified(edit: Edit, node: Node) -> Node | None:
    """Build the one form of what a node is the last of, ahead of it."""
    if node.target in ONE_NODE:
        with edit.before(node):
            return ONE_NODE[node.target](edit, node)
    for layer in LAYERS:
        found = match(layer.pattern, node) if node.target in heads(layer.pattern) else None
        if found is not None:
            with edit.before(node):
                new = layer.build(edit, node, found)
            if new is not None:
                return new
    return None
