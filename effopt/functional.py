"""Functional: writes into memory become new values, also where they are seen through views.

A write makes a new value of what was written. The values that it is a view of are made anew by
putting it back (`write_back`); other views of the same memory are taken again where they are
next read. Which values share memory is not guessed from the operators: the graph is run on fake
tensors, and those with one storage share.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg

from effopt.axes import same_sizes
from effopt.edit import Edit
from effopt.errors import CaptureError, VerificationError
from effopt.program import Program, shape, value, where
from effopt.write_back import put_back, take_again, viewed

aten = torch.ops.aten
REMEDY = "write that step without the in-place operator"


def make_functional(program: Program) -> None:
    """Rewrite each operator in place as its functional twin; a graph without any is not touched.

    What the model writes into an input is not seen by the caller. Raises CaptureError where a
    written buffer is read: its next call would give something else; and where a write has no
    functional form.
    """
    if not any(map(_is_mutable, program.nodes())):
        return
    try:
        writes = _rewritten(Edit(program, "capture"))
    except VerificationError as error:
        raise CaptureError(error.reason, REMEDY) from error
    _check_state(program, writes)


def _rewritten(edit: Edit) -> "_Writes":
    program = edit.program
    for node in program.nodes():
        if _is_mutable(node) and torch.Tag.inplace_view in node.target.tags:  # type: ignore[union-attr]
            edit.retarget(node, _twin(node), *node.args, **node.kwargs)
    writes = _Writes(edit, _storages(program))
    for node in list(program.nodes()):
        writes.visit(node)
    for node in reversed(writes.dead):
        edit.erase(node)
    edit.close()
    return writes


class _Writes:
    """What each value holds while the nodes are visited in order.

    `now` maps a value to the node that holds it and to how often its memory had been written
    then: fewer times than by now, and it must be taken again from what it is a view of.
    """

    def __init__(self, edit: Edit, memory: dict[Node, Any]) -> None:
        self.edit = edit
        self.memory = memory
        self.views = {
            node: source
            for node in memory
            if (source := viewed(node)) is not None and memory.get(source) == memory[node]
        }
        self.count = Counter[Any]()
        self.now: dict[Node, tuple[Node, int]] = {}
        self.lists: dict[Node, int] = {}
        self.writes: set[Node] = set()
        self.dead: list[Node] = []

    def visit(self, node: Node) -> None:
        """Let a node read what its arguments hold by now; a write changes what they hold."""
        target = node.args[0] if _is_mutable(node) else None
        with self.edit.before(node):
            self._read(node)
        first = node.args[0] if node.args else None
        if node in self.memory:
            self.now[node] = (node, self._taken(node, first))
        elif isinstance(first, Node) and first in self.memory:
            self.lists[node] = self.count[self.memory[first]]
        if target is not None:
            self.writes.add(node)
            self._write(node, target)

    def _taken(self, node: Node, first: Any) -> int:
        """Count the writes before a view was taken; an item was taken with its whole list."""
        return self.lists.get(first, self.count[self.memory[node]])

    def _read(self, node: Node) -> None:
        if any(self._stale(arg) for arg in node.all_input_nodes):
            node.args = map_arg(node.args, self._held)
            node.kwargs = map_arg(node.kwargs, self._held)

    def _stale(self, node: Node) -> bool:
        return self.count[self.memory.get(node)] > 0

    def _held(self, node: Node) -> Node:
        """Return the node that has the value of `node` by now."""
        if not self._stale(node) or node not in self.now:
            return node
        held, written = self.now[node]
        count = self.count[self.memory[node]]
        if written == count:
            return held
        source = self._held(self.views[node])
        again = source if node in self.writes else take_again(self.edit, node, source)
        self.now[node] = (again, count)
        return again

    def _write(self, node: Node, target: Any) -> None:
        """Compute what was written, and put it back into all that it is a view of."""
        if not isinstance(target, Node) or target not in self.memory:
            raise CaptureError(f"{where(node)} has no functional form", REMEDY)
        chain = [target]
        while chain[-1] in self.views:
            chain.append(self.views[chain[-1]])
        key = self.memory[target]
        if any(self.memory[a] == key for a in chain[-1].all_input_nodes if a in self.memory):
            raise CaptureError(f"{where(chain[-1])} shares memory that is written", REMEDY)
        with self.edit.before(node):
            held = [self._held(link) for link in chain]
        with self.edit.after(node):
            new = self._result(node)
            self.count[key] += 1
            for link, outer in zip(chain, [*held[1:], None], strict=True):
                self.now[link] = (new, self.count[key])
                if outer is not None and link not in self.writes:
                    new = put_back(self.edit, link, outer, new)
        self.now[node] = self.now[target]

    def _result(self, node: Node) -> Node:
        """Return what an operator in place writes, in the shape and dtype of its target."""
        target = node.args[0]
        assert isinstance(target, Node)
        if node.target in (aten.copy_.default, aten.fill_.Tensor):
            assert isinstance(node.args[1], Node)
            self.dead.append(node)
            return self._conformed(node.args[1], target)
        if node.target in (aten.zero_.default, aten.fill_.Scalar):
            number = 0 if node.target is aten.zero_.default else node.args[1]
            self.edit.retarget(node, aten.full_like.default, target, number)
            return node
        self.edit.retarget(node, _twin(node), *node.args, **node.kwargs)
        return self._conformed(node, target)

    def _conformed(self, node: Node, like: Node) -> Node:
        if value(node).dtype != value(like).dtype:
            node = self.edit.call(aten.to.dtype, node, value(like).dtype)
        if value(node).device != value(like).device:
            raise CaptureError(f"{where(node)} copies between devices", "use one device")
        if not same_sizes(shape(node), shape(like)):
            node = self.edit.call(aten.expand_as.default, node, like)
        return node


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _twin(node: Node) -> OpOverload:
    """Return the functional operator of an in-place one (`add_.Tensor` → `add.Tensor`)."""
    target = node.target
    assert isinstance(target, OpOverload)
    space, _, name = target._schema.name.partition("::")
    packet = getattr(aten, name.removesuffix("_"), None) if space == "aten" else None
    twin = getattr(packet, target._overloadname, None)
    written = [a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments]
    alone = written[0] and not any(written[1:])
    if not isinstance(twin, OpOverload) or twin._schema.is_mutable or not alone:
        raise CaptureError(f"{where(node)}: {target} has no functional form", REMEDY)
    return twin


def _storages(program: Program) -> dict[Node, Any]:
    """Run the graph on fake tensors of the samples' sizes: the storage of each tensor value."""
    samples = iter(program.samples)
    found: dict[Node, Any] = {}
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode, torch.no_grad():
        for node in program.nodes():
            if node.op == "placeholder":
                like = next(samples)  # inputs that the caller lets share memory are apart here
                found[node] = torch.empty_strided(
                    like.shape, like.stride(), dtype=like.dtype, device=like.device
                )
            elif node.op == "get_attr":
                found[node] = mode.from_tensor(program.weight(node), static_shapes=True)
            elif node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), lambda arg: found[arg])
                assert callable(node.target)
                try:
                    found[node] = node.target(*args, **kwargs)
                except RuntimeError as error:
                    reason = f"{where(node)} has sizes that depend on the data"
                    raise CaptureError(reason, "give the model fixed sizes there") from error
    tensors = {node: val for node, val in found.items() if isinstance(val, Tensor)}
    return {node: _Storage(val) for node, val in tensors.items()}


class _Storage:
    """One piece of memory, which is kept alive: its address stays its own."""

    def __init__(self, tensor: Tensor) -> None:
        self.held = tensor.untyped_storage()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Storage) and self.held._cdata == other.held._cdata

    def __hash__(self) -> int:
        return hash(self.held._cdata)


def _check_state(program: Program, writes: _Writes) -> None:
    """Refuse a buffer that is written and read: its value passes from one call to the next."""
    for node in program.nodes():
        if node.op == "get_attr" and node.users and writes.count[writes.memory[node]]:
            raise CaptureError(
                f"forward writes into {node.target!r} and reads it: "
                "its results depend on the calls before",
                "compute what it holds from the inputs, or make it an input and an output",
            )
