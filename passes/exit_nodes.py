"""Nodes of exits: what heads read, the heads, the model's own tail again, and scores."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from effopt.edit import Edit
from effopt.kernel import kernel
from effopt.passes.exit_heads import Head
from effopt.passes.exit_plan import Plan
from effopt.passes.exit_reads import Stream
from effopt.program import shape, value

aten = torch.ops.aten


def read_features(edit: Edit, plan: Plan, stream: Stream, norm: bool) -> Node:
    """Make the features of a head behind a block: [B, F], or [B, N, F] for a lens.

    They are float32 where the model computes in a narrower type: scores need it.
    """
    with edit.after(stream.node):
        parts = [
            edit.call(aten.select.int, stream.node, stream.tokens[0], place)
            for place in plan.reads.places
        ]
        if plan.reads.mean:
            parts.append(edit.call(aten.mean.dim, stream.node, list(stream.tokens)))
        found = parts[0] if parts else stream.node
        if len(parts) > 1:
            found = edit.call(aten.cat.default, parts, 1)
        found = _cast(edit, found, torch.promote_types(value(found).dtype, torch.float32))
        if norm:
            found = edit.call(aten.layer_norm.default, found, [shape(found)[-1]])
    return found


def _cast(edit: Edit, node: Node, dtype: torch.dtype) -> Node:
    return node if value(node).dtype == dtype else edit.call(aten.to.dtype, node, dtype)


@dataclass
class Heads:
    """Puts heads into a graph; exits that have one head share its weights."""

    edit: Edit
    plan: Plan
    _weights: dict[int, tuple[Node, Node]] = field(default_factory=dict)

    def logits(self, place: int, features: Node, heads: Sequence[Head]) -> dict[str, Node]:
        """Give the outputs by name, of an exit from 1, in the type that heads compute in."""
        if self.plan.reads.is_lens:
            (head,) = heads
            with self.edit.after(features):
                mapped = self._linear(place, features, head)
            return self._tail(mapped)
        at, found = features, dict[str, Node]()
        for (name, end), head in zip(self.plan.answers.items(), heads, strict=True):
            with self.edit.after(at):
                at = found[name] = self._shaped(self._linear(place, features, head), end)
        return found

    def answers(self, logits: dict[str, Node]) -> dict[str, Node]:
        """Give outputs the type of the model's own."""
        found = dict[str, Node]()
        for name, node in logits.items():
            with self.edit.after(node):
                found[name] = _cast(self.edit, node, value(self.plan.answers[name]).dtype)
        return found

    def _linear(self, place: int, features: Node, head: Head) -> Node:
        weight, bias = self._constants(place, features, head)
        return self.edit.call(aten.linear.default, features, weight, bias)

    def _constants(self, place: int, features: Node, head: Head) -> tuple[Node, Node]:
        if id(head) not in self._weights:
            kind = value(features).dtype
            named = (f"exit{place}_weight", head.weight), (f"exit{place}_bias", head.bias)
            weight, bias = (self.edit.constant(name, held.to(kind)) for name, held in named)
            self._weights[id(head)] = weight, bias
        return self._weights[id(head)]

    def _shaped(self, columns: Node, end: Node) -> Node:
        """Lay out the columns of a head as an output is."""
        sizes = list(shape(end)[1:])
        if len(sizes) == 1:
            return columns
        if not sizes:
            return self.edit.call(aten.squeeze.dim, columns, 1)
        return self.edit.call(aten.unflatten.int, columns, 1, sizes)

    def _tail(self, mapped: Node) -> dict[str, Node]:
        """Copy what follows the last block, behind what it reads: of the mapped value here."""
        last, program = self.plan.last.node, self.edit.program
        own = {last, *self.plan.tail}
        read = {arg for node in self.plan.tail for arg in node.all_input_nodes} - own
        at = next(n for n in reversed(program.module.graph.nodes) if n in read or n is mapped)
        with self.edit.after(at):
            copies = {last: _cast(self.edit, mapped, value(last).dtype)}
            for node in self.plan.tail:
                copies[node] = self._copied(node, copies)
        return {name: copies[end] for name, end in self.plan.answers.items()}

    def _copied(self, node: Node, copies: dict[Node, Node]) -> Node:
        made = self.edit.copy(node)
        args, kwargs = map_arg((node.args, node.kwargs), lambda arg: copies.get(arg, arg))
        self.edit.update(made, *args, **kwargs)
        return made


def score(edit: Edit, kind: str, values: Sequence[Node], position: int | None) -> Node:
    """Make the score of the last of `values`: logits of exits, or features, in their order.

    With `position`, of the last place along that dimension alone.
    """
    order = list(edit.graph.nodes)
    with edit.after(max(values, key=order.index)):
        if position is not None:
            values = [edit.call(aten.select.int, node, position, -1) for node in values]
        return edit.call(kernel("exit_score").op, list(values), kind)
