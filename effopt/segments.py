"""Segments: a program with exits, cut into one program for each stretch between two exits.

What a segment computes is what its exit needs and no exit before it has needed. A segment reads
inputs of the model and values that earlier ones have computed; sizes it takes of what it reads.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.utils import _pytree as pytree

from effopt.errors import PreconditionError
from effopt.exits import Exits, find_exits
from effopt.program import Program, is_tensor, value, where
from effopt.signature import Signature, TensorSpec

aten = torch.ops.aten

SCORE = "effopt.score"
"""The name of the first output of each segment but the last; no output of a model has it."""

_UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class Segment:
    """One stretch: `program` takes values by name, and returns these, in this order.

    `scored`: SCORE [B] float32, in all but the last segment. `answers`: the model's outputs as
    they are for rows that leave here. `ready`: outputs that no exit changes, in the first segment
    alone. `handed`: values that later segments read.
    """

    program: Program
    scored: bool
    answers: tuple[str, ...]
    ready: tuple[str, ...]
    handed: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of the values that the program takes."""
        return tuple(spec.name for spec in self.program.signature.inputs)


def row_places(parts: Sequence[Segment]) -> dict[str, int]:
    """Return at which dimension each value that segments read counts rows, if it has rows.

    Raises PreconditionError as `batch_size` and `row_place` do.
    """
    batch = batch_size(parts)
    read = {n: x for part in parts for n, x in zip(part.reads, part.program.inputs(), strict=True)}
    places = {name: row_place(node, batch) for name, node in read.items()}
    return {name: place for name, place in places.items() if place is not None}


def batch_size(parts: Sequence[Segment]) -> torch.SymInt:
    """Return the number of rows; PreconditionError where it is fixed, so that none can leave."""
    (outputs,) = parts[0].program.output().args
    score: Any = outputs[0]  # type: ignore[index]
    batch: torch.SymInt | int = value(score).shape[0]
    if isinstance(batch, int):
        reason = "rows cannot leave a batch of fixed size"
        raise PreconditionError(where(score), reason, "leave 'batch' in dynamic, or lower=if")
    return batch


def row_place(node: Node, batch: torch.SymInt) -> int | None:
    """Return at which dimension a value counts rows, None where it is the same for all.

    Raises PreconditionError where rows share a dimension, or have two of them.
    """
    found = [place for place, size in enumerate(value(node).shape) if str(size) == str(batch)]
    sizes = [size for size in value(node).shape if not isinstance(size, int)]
    if sum(batch.node.expr in size.node.expr.free_symbols for size in sizes) > min(len(found), 1):
        reason = f"rows and something else share a dimension of {node.name}, or rows have two"
        raise PreconditionError(where(node), reason, "give lower=if")
    return found[0] if found else None


def known_as(node: Node) -> str:
    """Return the name by which segments hand a value on; those they compute have no output's."""
    return node.name if node.op == "placeholder" else f"effopt.{node.name}"


def segments(program: Program) -> tuple[Segment, ...]:
    """Cut a program at its exits; there is one segment more than exits.

    Raises PreconditionError where a segment needs a size that nothing it reads has.
    """
    exits = program.get(find_exits)
    assert exits is not None, "a program with exits"
    stages = Stages(program, exits)
    known = dict(zip((node.name for node in program.inputs()), program.samples, strict=True))
    found = []
    for place in range(len(exits.exits) + 1):
        made = _Cutter(program, stages, place).segment(known)
        outputs = made.program.run(made.program.samples)
        names = (spec.name for spec in made.program.signature.outputs)
        known |= {n: x for n, x in zip(names, outputs, strict=True) if n in made.handed}
        found.append(made)
    return tuple(found)


class Stages:
    """Which segment computes each value, counted from 0; inputs, weights and sizes have none."""

    def __init__(self, program: Program, exits: Exits) -> None:
        chosen = {spec.name: node for spec, node in _outputs(program)}
        self.ready = {name: node for name, node in chosen.items() if name not in exits.ends}
        self.ready.pop(_index_name(chosen, exits), None)
        self.scores = [found.score for found in exits.exits]
        self.answers = [*(found.answers for found in exits.exits), exits.ends]
        self.of: dict[Node, int] = {}
        for place in range(len(self.answers)):
            self._visit(self.roots(place), place)
        for node in program.nodes():  # one of several results stands where they are made
            if node.target is operator.getitem and (source := node.args[0]) in self.of:
                self.of[node] = self.of[source]  # type: ignore[index]

    def roots(self, place: int) -> list[Node]:
        """Return what a segment is there for."""
        first = list(self.ready.values()) if place == 0 else []
        return [*self.scores[place : place + 1], *self.answers[place].values(), *first]

    def _visit(self, todo: list[Node], place: int) -> None:
        while todo:
            node = todo.pop()
            if node.op == "call_function" and not _is_size(node) and node not in self.of:
                self.of[node] = place
                todo += node.all_input_nodes


def _outputs(program: Program) -> Iterator[tuple[TensorSpec, Node]]:
    (nodes,) = program.output().args
    yield from zip(program.signature.outputs, nodes, strict=True)  # type: ignore[arg-type]


def _index_name(outputs: dict[str, Node], exits: Exits) -> str:
    return next(name for name, node in outputs.items() if node is exits.index)


def _is_size(node: Node) -> bool:
    return isinstance(value(node), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float))


class _Cutter:
    """Copies one segment of a program into a graph of its own."""

    def __init__(self, program: Program, stages: Stages, place: int) -> None:
        self.program, self.stages, self.place = program, stages, place
        self.graph = Graph()
        self.copied: dict[Node, Node] = {}
        self.sizes: dict[str, Any] = {}
        self.own = [node for node in program.nodes() if stages.of.get(node) == place]

    def segment(self, known: dict[str, Tensor]) -> Segment:
        """Copy it; `known` are samples of what it may read, by name."""
        reads = self._reads()
        for node in reads:
            self.copied[node] = self.graph.placeholder(node.name)
            self.copied[node].meta = dict(node.meta)
        for node in self.own:
            made = self.graph.node_copy(node, self._copy)
            made.name, made.meta = node.name, dict(node.meta)
            self.copied[node] = made
        names, nodes = self._gives()
        output = self.graph.output(tuple(self._copy(node) for node in nodes))
        output.meta["val"] = tuple(value(node) for node in nodes)
        samples = tuple(known[known_as(node)] for node in reads)
        return Segment(
            self._program(reads, list(zip(names, nodes, strict=True)), samples),
            scored=self.place < len(self.stages.scores),
            answers=tuple(self.stages.answers[self.place]),
            ready=tuple(self.stages.ready) if self.place == 0 else (),
            handed=tuple(map(known_as, self._handed())),
        )

    def _reads(self) -> list[Node]:
        """Return the inputs and earlier values that are needed here, in execution order."""
        used = {arg for node in self.own for arg in node.all_input_nodes}
        used |= set(self.stages.roots(self.place))
        return [node for node in self.program.nodes() if node in used and self._is_earlier(node)]

    def _is_earlier(self, node: Node) -> bool:
        earlier = self.stages.of.get(node, self.place) < self.place
        return node.op == "placeholder" or earlier

    def _handed(self) -> list[Node]:
        """Return the values of this segment that later ones read."""
        later = set[Node]()
        for node, place in self.stages.of.items():
            later.update(node.all_input_nodes if place > self.place else ())
        for place in range(self.place + 1, len(self.stages.answers)):
            later.update(self.stages.roots(place))
        return [node for node in self.own if node in later]

    def _gives(self) -> tuple[list[str], list[Node]]:
        stages, place = self.stages, self.place
        first = stages.ready if place == 0 else {}
        given = {**stages.answers[place], **first}
        scores = stages.scores[place : place + 1]
        handed = self._handed()
        names = [*(SCORE for _ in scores), *given, *map(known_as, handed)]
        return names, [*scores, *given.values(), *handed]

    def _copy(self, node: Node) -> Any:
        """Return the copy of an argument; weights and sizes are made where they are read."""
        if node in self.copied:
            return self.copied[node]
        if node.op == "get_attr":
            self.copied[node] = self.graph.node_copy(node)
            self.copied[node].meta = dict(node.meta)
            return self.copied[node]
        assert _is_size(node), f"{node.name} is in another segment"
        return self._size(node)

    def _size(self, node: Node) -> Any:
        """Return a size as a number, or take it of a value that is read here."""
        size = value(node)
        if not isinstance(size, torch.SymInt):
            return size if isinstance(size, (int, float)) else self._computed(node)
        if size.node.expr.is_Integer:
            return int(size.node.expr)
        key = str(size)
        if key not in self.sizes:
            self.sizes[key] = self._measured(node, key)
        return self.sizes[key]

    def _measured(self, node: Node, key: str) -> Node:
        for read, copy in self.copied.items():
            if read.op in ("placeholder", "call_function") and is_tensor(read):
                for place, size in enumerate(value(read).shape):
                    if str(size) == key and copy.op == "placeholder":
                        return self._called(aten.sym_size.int, (copy, place), node)
        return self._computed(node)

    def _computed(self, node: Node) -> Node:
        """Repeat arithmetic of sizes; a size of a value that is not here is refused."""
        if any(is_tensor(arg) for arg in node.all_input_nodes):
            reason = "the model behind an exit needs a size that nothing there has"
            remedy = "leave the dimension out of dynamic, or exit at other cuts"
            raise PreconditionError(where(node), reason, remedy)
        args = torch.fx.node.map_arg(node.args, self._copy)
        return self._called(node.target, args, node)

    def _called(self, target: Any, args: Any, like: Node) -> Node:
        made = self.graph.call_function(target, args)
        made.meta = {**like.meta}
        return made

    def _program(
        self, reads: Sequence[Node], gives: Sequence[tuple[str, Node]], samples: tuple[Tensor, ...]
    ) -> Program:
        program = self.program
        names = dict(program.dynamic)
        ranges = dict(program.ranges)
        for node in (*reads, *(node for _, node in gives)):
            for size in value(node).shape:
                if not isinstance(size, int) and str(size) not in names:
                    name = names[str(size)] = f"size{len(names)}"
                    ranges[name] = (1, _UNBOUNDED)
        inputs = tuple(_spec(known_as(node), node, names) for node in reads)
        outputs = tuple(_spec(name, node, names) for name, node in gives)
        flat = tuple(range(len(outputs)))
        return replace(
            program,
            module=LazyGraphModule(program.module, self.graph),
            signature=Signature(inputs, outputs, {"tuple": list(flat)}),
            samples=samples,
            in_spec=pytree.tree_flatten((samples, {}))[1],
            out_spec=pytree.tree_flatten(flat)[1],
            slots=flat,
            dynamic=names,
            ranges=ranges,
            constants={},
            calibration=None,
            _known={},
        )


def _spec(name: str, node: Node, names: dict[str, str]) -> TensorSpec:
    val = value(node)
    shape = tuple(size if isinstance(size, int) else names[str(size)] for size in val.shape)
    return TensorSpec(name, str(val.dtype).removeprefix("torch."), shape, name)
