"""Exits of a program: places where a row may leave with an answer of its own.

Until a backend lowers it, a program with exits is one straight graph that computes every answer:
`effopt::exit_score` says how sure each exit is, `effopt::exit_index` at which a row leaves, and
`effopt::choose_exit` takes its answers. What has to run ahead of an exit is what its score and
answers need; nothing else marks the place, so that passes rewrite the graph as any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from effopt.edit import Edit
from effopt.errors import UsageError
from effopt.kernel import kernel
from effopt.program import Program
from effopt.signature import EXIT_INDEX, TAU, Signature, TensorSpec

NEVER = float("inf")
"""The threshold that no score reaches."""


@dataclass(frozen=True)
class Exit:
    """One exit: the node of its score [B], and its answers by the name of the output."""

    score: Node
    answers: dict[str, Node]


@dataclass(frozen=True)
class Exits:
    """All exits in order; `ends` are the whole model's own answers, and `form` how to lower.

    `outputs` names what the program returns, in order: answers, EXIT_INDEX, and what no exit
    changes. `index` is the node of the exit that each row takes, `tau` reads the thresholds [E].
    """

    exits: tuple[Exit, ...]
    ends: dict[str, Node]
    outputs: tuple[str, ...]
    index: Node
    tau: Node
    form: str

    def thresholds(self, program: Program) -> Tensor:
        """Return the thresholds [E] float32."""
        return program.weight(self.tau)


def find_exits(program: Program) -> Exits | None:
    """Return the exits of a program, None where it has none (an Analysis)."""
    operator = kernel("exit_index").op
    found = (node for node in program.nodes() if node.target is operator)
    index = next((node for node in found if _is_constant(node.args[1])), None)
    if index is None:
        return None
    scores, tau, form = index.args
    answers = _answers(program, index)
    exits = tuple(
        Exit(score, {name: nodes[place] for name, nodes in answers.items()})
        for place, score in enumerate(scores)  # type: ignore[arg-type]
    )
    ends = {name: nodes[-1] for name, nodes in answers.items()}
    outputs = tuple(spec.name for spec in program.signature.outputs)
    return Exits(exits, ends, outputs, index, tau, str(form))  # type: ignore[arg-type]


def _is_constant(thresholds: object) -> bool:
    return isinstance(thresholds, Node) and thresholds.op == "get_attr"


def _answers(program: Program, index: Node) -> dict[str, list[Node]]:
    """Return the answers of all exits and the end by the outputs that choose among them."""
    operator, found = kernel("choose_exit").op, dict[str, list[Node]]()
    (outputs,) = program.output().args
    for spec, node in zip(program.signature.outputs, outputs, strict=True):  # type: ignore[arg-type]
        if isinstance(node, Node) and node.target is operator and node.args[1] is index:
            found[spec.name] = list(node.args[0])  # type: ignore[arg-type]
    return found


def insert_exits(
    edit: Edit,
    scores: Sequence[Node],
    answers: dict[str, Sequence[Node]],
    form: str,
) -> None:
    """Let each row leave at the first exit whose score reaches its threshold; none does yet.

    `scores` are nodes [B] in the order of the exits, `answers` for each output that exits give,
    by name, one node an exit. All must stand ahead of the output node already. The program gets
    the output EXIT_INDEX, and thresholds of infinity. Raises UsageError where the program has
    exits or an output of that name.
    """
    program, output = edit.program, edit.program.output()
    names = [spec.name for spec in program.signature.outputs]
    if EXIT_INDEX in names:
        reason = f"the model has an output {EXIT_INDEX!r} already"
        raise UsageError(reason, "insert exits once, and rename an output of that name")
    tau = edit.constant(TAU, torch.full((len(scores),), NEVER))
    (outputs,) = output.args
    assert isinstance(outputs, (tuple, list))
    with edit.before(output):
        index = edit.call(kernel("exit_index").op, list(scores), tau, form, name=EXIT_INDEX)
        chosen = [
            edit.call(kernel("choose_exit").op, [*answers[name], node], index)
            if name in answers
            else node
            for name, node in zip(names, outputs, strict=True)
        ]
    batch = program.signature.outputs[names.index(next(iter(answers)))].shape[0]
    spec = TensorSpec(EXIT_INDEX, "int64", (batch,), EXIT_INDEX)
    edit.outputs([*chosen, index], program.signature.extended([spec]))


def set_thresholds(program: Program, values: Sequence[float]) -> None:
    """Give the exits of a program other thresholds; the graph stays as it is."""
    found = program.get(find_exits)
    assert found is not None, "a program with exits"
    held = found.thresholds(program)
    if len(values) != len(held):
        reason = f"{len(values)} thresholds for {len(held)} exits"
        raise UsageError(reason, f"give {len(held)}, infinity where no row may leave")
    owner, _, leaf = str(found.tau.target).rpartition(".")
    module = program.module.get_submodule(owner)
    module.register_buffer(leaf, torch.tensor(list(values), dtype=torch.float32), persistent=False)


def probe(program: Program, output: str) -> Program:
    """Return a program of the scores [B] of all exits, then of all answers to one output.

    It computes what the program does, by the same operators, and never leaves early: the answers
    are those of the exits in order, and that of the end.
    """
    fork = program.fork()
    found = fork.get(find_exits)
    assert found is not None, "a program with exits"
    spec = next(spec for spec in fork.signature.outputs if spec.name == output)
    count = len(found.exits)
    names = [*(f"score{n}" for n in range(count)), *(f"answer{n}" for n in range(count + 1))]
    nodes = [exit_.score for exit_ in found.exits]
    nodes += [*(exit_.answers[output] for exit_ in found.exits), found.ends[output]]
    specs = [TensorSpec(name, "float32", spec.shape[:1], name) for name in names[:count]]
    specs += [replace(spec, name=name, port=name) for name in names[count:]]
    edit = Edit(fork, "probe")
    edit.outputs(
        nodes,
        Signature(fork.signature.inputs, tuple(specs), {"tuple": list(range(len(specs)))}),
    )
    edit.close()
    fork.compile()
    return fork


def without_exits(program: Program) -> Program:
    """Return a fork whose rows all go to the end; the program itself where it has no exits."""
    found = program.get(find_exits)
    if found is None:
        return program
    fork = program.fork()
    set_thresholds(fork, [NEVER] * len(found.exits))
    fork.compile()
    return fork


def with_thresholds(program: Program) -> Signature:
    """Return the signature of a program's engine: with exits, TAU is an input that may be left out.

    Raises UsageError where the model has an input of that name.
    """
    signature, found = program.signature, program.get(find_exits)
    if found is None:
        return signature
    if any(spec.name == TAU for spec in signature.inputs):
        reason = f"the model has an input {TAU!r}, which is the name of the thresholds"
        raise UsageError(reason, "rename the argument of the model's forward")
    held = found.thresholds(program)
    spec = TensorSpec(TAU, "float32", tuple(held.shape), TAU, tuple(held.tolist()))
    return replace(signature, inputs=(*signature.inputs, spec))
