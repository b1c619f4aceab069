"""Counts: for how many originals each token stands, and which must stay, at every site."""

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from effopt.edit import Edit
from effopt.kernel import kernel
from effopt.lift import lengths_of
from effopt.program import value
from effopt.state import Reduction, State

aten = torch.ops.aten


class Counts:
    """Sizes [B, N] (0 for padding) and marks [B, N] of the tokens, carried from site to site."""

    def __init__(self, edit: Edit, state: State) -> None:
        self.edit = edit
        self.state = state
        self.known: list[tuple[Node, Node | None]] = []

    def at(self, count: int, x: Node) -> tuple[Node, Node | None]:
        """Return sizes and marks after `count` reductions; x [B, N, C] is the stream before any."""
        if not self.known:
            self.known.append((self._first_size(x), self._first_marks(x)))
        return self.known[count]

    def add(self, reduction: Reduction) -> None:
        """Note what a reduction leaves."""
        size, marked = self.known[-1]
        taken = reduction.size or self._taken(size, reduction)
        self.known.append((taken, None if marked is None else self._taken(marked, reduction)))

    def _taken(self, x: Node, reduction: Reduction) -> Node:
        return self.edit.call(kernel("gather_tokens").op, x, reduction.kept, 1)

    def _first_size(self, x: Node) -> Node:
        """Start with size 1, and 0 for padding."""
        if self.state.padding is None:
            one = self.edit.call(aten.select.int, x, 2, 0)
            return self.edit.call(aten.ones_like.default, one, dtype=torch.float32)
        flat = self.edit.call(aten.select.int, self.state.padding, 1, 0)
        flat = self.edit.call(aten.select.int, flat, 1, 0)
        if value(flat).dtype != torch.bool:
            flat = self.edit.call(aten.ne.Scalar, flat, 0)
        return self.edit.call(aten.to.dtype, flat, torch.float32)

    def _first_marks(self, x: Node) -> Node | None:
        """Mark the tokens that outputs take at places which the inputs say."""
        marked: Node | None = None
        for mark in self.state.axis.marks:
            places = self.edit.call(aten.arange.default, lengths_of(self.edit, x, 1))
            own = self.edit.call(aten.unsqueeze.default, self._again(mark, {}), 1)
            found = self.edit.call(aten.eq.Tensor, places, own)
            if marked is not None:
                found = self.edit.call(aten.logical_or.default, marked, found)
            marked = found
        return marked

    def _again(self, node: Node, made: dict[Node, Node]) -> Node:
        """Compute a value of the inputs here: the model may do it only behind the sites."""
        if node.op != "call_function":
            return node
        if node not in made:
            assert callable(node.target)
            given: Any = map_arg((node.args, node.kwargs), lambda arg: self._again(arg, made))
            args, kwargs = given
            made[node] = self.edit.call(node.target, *args, **kwargs)
        return made[node]
