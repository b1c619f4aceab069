"""Exits in ONNX: a flat chain of If, over whole batches or over the rows that are left.

Each segment of a program is lowered by itself. The first runs always; each of the others is the
else-branch of an If that asks whether all rows have left. A row keeps the answer of the first exit
that its score reaches, whatever becomes of its neighbours. The form "compact" takes the rows that
are left out of the batch ahead of a segment, and puts their answers back in their places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from effopt.backend import Array
from effopt.backends.onnx_lower import lower
from effopt.backends.onnx_tidy import drop_zero_adds
from effopt.backends.quantized_draft import Draft
from effopt.exits import find_exits
from effopt.program import Program
from effopt.segments import SCORE, Segment, row_places, segments
from effopt.signature import EXIT_INDEX, TAU

_UNPACKED = "DequantizeLinear"
"""onnxruntime looks for the weights of such a node in the branch alone, if it is to join it with
the product behind it; from outside of the branch they make the file one that does not load."""


def lower_exits(program: Program, kind: str, *, plugins: bool = False) -> ir.Model:
    """Translate a program with exits, of the form "if" or "compact"; see `onnx_lower.lower`.

    Behind the inputs of the signature come the thresholds [E], whose values are their default.
    Raises PreconditionError as `lower` does, and for "compact" where rows cannot be told apart.
    """
    exits = program.get(find_exits)
    assert exits is not None, "a program with exits"
    parts = segments(program)
    models = lowered(parts, kind, plugins=plugins)
    main = models[0]
    bodies = [_Body.of(part, model.graph) for part, model in zip(parts, models, strict=True)]
    rows = row_places(parts) if exits.form == "compact" else None
    chain = _Chain(main.graph, bodies, _inputs(program), rows)
    answers = chain.write(exits.thresholds(program).numpy())
    main.graph.outputs.extend(answers[name] for name in exits.outputs)
    NameFixPass()(main)
    return main


def _inputs(program: Program) -> dict[str, ir.Value]:
    """Make the inputs of the graph, by the names that segments read them by."""
    pairs = zip(program.inputs(), program.signature.inputs, strict=True)
    return {
        node.name: ir.Value(
            name=spec.name,
            type=ir.TensorType(ir.DataType.from_numpy(np.dtype(spec.dtype))),
            shape=ir.Shape(spec.shape),
        )
        for node, spec in pairs
    }


def lowered(parts: Sequence[Segment], kind: str, *, plugins: bool = False) -> list[ir.Model]:
    """Lower every segment at one opset, the highest that any of them needs."""
    models = [lower(part.program, kind, plugins=plugins) for part in parts]
    highest = max(model.opset_imports[""] for model in models)
    for place, part in enumerate(parts):
        if models[place].opset_imports[""] < highest:
            models[place] = lower(part.program, kind, highest, plugins=plugins)
        drop_zero_adds(models[place].graph)
        models[0].opset_imports.update(models[place].opset_imports)
    return models


@dataclass(frozen=True)
class _Body:
    """The graph of a segment, its inputs and outputs by name."""

    part: Segment
    graph: ir.Graph
    inputs: Mapping[str, ir.Value]
    outputs: Mapping[str, ir.Value]

    @staticmethod
    def of(part: Segment, graph: ir.Graph) -> "_Body":
        """Name the ends of a graph as its segment does, and take them off the graph."""
        names = [spec.name for spec in part.program.signature.outputs]
        inputs = dict(zip(part.reads, graph.inputs, strict=True))
        outputs = dict(zip(names, graph.outputs, strict=True))
        graph.inputs.clear()
        graph.outputs.clear()
        return _Body(part, graph, inputs, outputs)


@dataclass(frozen=True)
class _State:
    """What one link of the chain hands to the next.

    `answers` [B, ...] by output, with the exit [B] of each row under EXIT_INDEX; `done` of the rows
    that the last segment ran on; `rows`, their places in the batch, where others have been left
    out; `carried`, values of the segments so far that later ones read. Behind the last segment
    there are answers alone.
    """

    answers: Mapping[str, ir.Value]
    done: ir.Value | None = None
    rows: ir.Value | None = None
    carried: Mapping[str, ir.Value] = field(default_factory=dict)

    def values(self) -> list[ir.Value]:
        """Return all values in one order."""
        some = [value for value in (self.done, self.rows) if value is not None]
        return [*self.answers.values(), *some, *self.carried.values()]

    def like(self, values: Sequence[ir.Value]) -> "_State":
        """Return the state that has these values, in that order."""
        left = iter(values)
        answers = {name: next(left) for name in self.answers}
        done, rows = (None if value is None else next(left) for value in (self.done, self.rows))
        return _State(answers, done, rows, {name: next(left) for name in self.carried})


class _Chain:
    """Joins the graphs of all segments in that of the first.

    `inputs` are new inputs of the graph by name. `rows` says at which dimension each value counts
    rows, where those that are done are to leave the batch; None leaves the batch whole.
    """

    def __init__(
        self,
        main: ir.Graph,
        bodies: Sequence[_Body],
        inputs: Mapping[str, ir.Value],
        rows: Mapping[str, int] | None,
    ) -> None:
        self.main, self.bodies, self.rows = main, bodies, rows
        self.outer = dict(inputs)
        self.draft = Draft(main)

    def write(self, thresholds: Array) -> dict[str, ir.Value]:
        """Write the chain and return the outputs by name."""
        first = self.bodies[0]
        tau = self.draft.constant(TAU, thresholds)
        self.main.inputs.extend([*self.outer.values(), tau])
        _bind(first, self.outer)
        self.outer |= {name: first.outputs[name] for name in first.part.handed}
        state = self._first(first, tau)
        for place in range(1, len(self.bodies)):
            state = self._link(place, state, tau)
        return {**{name: first.outputs[name] for name in first.part.ready}, **state.answers}

    def _first(self, body: _Body, tau: ir.Value) -> _State:
        """Take the answers of the first exit for all rows."""
        done = self._reaches(body, tau, 0)
        index = self.draft.op("Where", done, self._number(1), self._number(2))
        index.dtype = ir.DataType.INT64
        answers = {name: body.outputs[name] for name in body.part.answers}
        self.main.extend(self.draft.taken())
        return _State({**answers, EXIT_INDEX: index}, done)

    def _link(self, place: int, state: _State, tau: ir.Value) -> _State:
        """Write one If: where all rows are done nothing runs, else the segment."""
        every = self.draft.op("Cast", state.done, to=ir.DataType.INT32)
        every = self.draft.op("ReduceMin", every, keepdims=0)
        every = self.draft.op("Cast", every, to=ir.DataType.BOOL)
        self.main.extend(self.draft.taken())
        after, run = self._run(place, state, tau)
        branches = {"then_branch": self._skip(state, after), "else_branch": run}
        node = ir.node("If", [every], branches, num_outputs=len(after.values()))
        for made, value in zip(node.outputs, after.values(), strict=True):
            made.type = value.type
        self.main.append(node)
        return after.like(node.outputs)

    def _skip(self, state: _State, after: _State) -> ir.Graph:
        """Hand on answers; what nobody will read is empty."""
        handed = [*state.answers.values(), *([] if after.done is None else [state.done])]
        made = [self._same(value) for value in handed if value is not None]
        made += [self._empty(value) for value in after.values()[len(handed) :]]
        return ir.Graph([], made, nodes=self.draft.taken(), name="leave")

    def _empty(self, value: ir.Value) -> ir.Value:
        """Make a value without elements, of the type and rank of another."""
        assert value.dtype is not None
        sizes = [size if isinstance(size, int) else 0 for size in value.shape or (0,)]
        array = np.zeros(sizes if 0 in sizes else [0, *sizes[1:]], dtype=value.dtype.numpy())
        return self.draft.op("Constant", value=ir.tensor(array))

    def _run(self, place: int, state: _State, tau: ir.Value) -> tuple[_State, ir.Graph]:
        """Run a segment on the rows, and give those that were not done its answers."""
        body, draft, last = self.bodies[place], self.draft, place + 1 == len(self.bodies)
        rows, known = self._left(body, state)
        _bind(body, known)
        ahead, own = draft.taken(), list(body.graph)
        body.graph.remove(own)
        new = {name: body.outputs[name] for name in body.part.answers}
        done = None
        if not last:
            done = reached = self._reaches(body, tau, place)
            new[EXIT_INDEX] = draft.op(
                "Where", reached, self._number(place + 1), self._number(place + 2)
            )
            if rows is None:
                done = draft.op("Or", state.done, reached)
            done.dtype, done.shape = ir.DataType.BOOL, ir.Shape([None])
        answers = {
            name: self._put(state.done, rows, value, new[name])
            if name in new
            else self._same(value)
            for name, value in state.answers.items()
        }
        for name, value in state.answers.items():
            answers[name].type = value.type
        after = _State(answers, done, None if last else rows, self._carried(place, state, known))
        made = self._made_here(after, [*ahead, *own, *draft.nodes])
        graph = ir.Graph([], made, nodes=[*ahead, *own, *draft.taken()], name=f"segment{place + 1}")
        self._move_weights(body.graph, graph, place)
        return after, graph

    def _left(self, body: _Body, state: _State) -> tuple[ir.Value | None, dict[str, ir.Value]]:
        """Return the places of the rows that are left, and what the segment may read of them."""
        if self.rows is None:
            return None, {**self.outer, **state.carried}
        draft = self.draft
        keep = draft.op("NonZero", draft.op("Not", state.done))
        keep = draft.op("Squeeze", keep, self._axes(0))
        rows = keep if state.rows is None else draft.op("Gather", state.rows, keep)
        rows.dtype, rows.shape = ir.DataType.INT64, ir.Shape([None])
        read = {name: value for name, value in self.outer.items() if name in body.inputs}
        known = {name: self._rows_of(name, value, rows) for name, value in read.items()}
        known |= {name: self._rows_of(name, v, keep) for name, v in state.carried.items()}
        return rows, known

    def _rows_of(self, name: str, value: ir.Value, rows: ir.Value) -> ir.Value:
        """Take rows of a value; one that is the same for all rows is as it is."""
        assert self.rows is not None
        if name not in self.rows:
            return value
        taken = self.draft.op("Gather", value, rows, axis=self.rows[name])
        taken.type, taken.shape = value.type, value.shape
        return taken

    def _put(
        self, done: ir.Value | None, rows: ir.Value | None, old: ir.Value, new: ir.Value
    ) -> ir.Value:
        """Give new answers to the rows that were not done."""
        if rows is not None:
            return self.draft.op("ScatterND", old, self._unsqueezed(rows, 1), new)
        rank = 1 if new.shape is None else len(new.shape)
        return self.draft.op("Where", self._unsqueezed(done, rank - 1), old, new)

    def _unsqueezed(self, value: ir.Value | None, more: int) -> ir.Value | None:
        axes = range(1, more + 1)
        return self.draft.op("Unsqueeze", value, self._axes(*axes)) if more else value

    def _carried(
        self, place: int, state: _State, known: Mapping[str, ir.Value]
    ) -> dict[str, ir.Value]:
        """Return what later segments read of this one and of those between it and the first."""
        body = self.bodies[place]
        later = {name for behind in self.bodies[place + 1 :] for name in behind.inputs}
        made = {**{name: known[name] for name in state.carried}}
        made |= {name: body.outputs[name] for name in body.part.handed}
        return {name: value for name, value in made.items() if name in later}

    def _made_here(self, after: _State, nodes: Sequence[ir.Node]) -> list[ir.Value]:
        """Return the outputs of a branch: a value from outside of it needs a node of its own."""
        inside = set(nodes)
        return [
            value if value.producer() in inside else self._same(value) for value in after.values()
        ]

    def _same(self, value: ir.Value) -> ir.Value:
        made = self.draft.op("Identity", value)
        made.type, made.shape = value.type, value.shape
        return made

    def _reaches(self, body: _Body, tau: ir.Value, place: int) -> ir.Value:
        limit = self.draft.op("Gather", tau, self._number(place))
        return self.draft.op("GreaterOrEqual", body.outputs[SCORE], limit)

    def _number(self, number: int) -> ir.Value:
        return self.draft.scalar(number, ir.DataType.INT64)

    def _axes(self, *axes: int) -> ir.Value:
        array = np.array(axes, dtype=np.int64)
        return self.draft.once(axes, lambda: self.draft.constant("axes", array))

    def _move_weights(self, source: ir.Graph, branch: ir.Graph, place: int) -> None:
        """Move the weights of a segment to the graph around, where equal ones are one."""
        for name, value in list(source.initializers.items()):
            del source.initializers[name]
            home = branch if any(n.op_type == _UNPACKED for n, _ in value.uses()) else self.main
            same = home.initializers.get(name)
            if same is not None and _equal(same, value):
                ir.convenience.replace_all_uses_with(value, same)
                continue
            if same is not None:
                value.name = f"{name}.{place}"
            home.register_initializer(value)


def _bind(body: _Body, known: Mapping[str, ir.Value]) -> None:
    """Let a graph read values from outside of it in place of its inputs."""
    for name, value in body.inputs.items():
        ir.convenience.replace_all_uses_with(value, known[name])


def _equal(one: ir.Value, two: ir.Value) -> bool:
    left, right = one.const_value, two.const_value
    if left is None or right is None or (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return left is right or left.tobytes() == right.tobytes()
