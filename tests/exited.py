"""Programs with exits that tests share: heads with random weights, behind chosen nodes."""

import functools
import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from effopt.backend import Array, Runner, as_array, backend
from effopt.capture import capture
from effopt.cuts import find_cuts
from effopt.edit import Edit
from effopt.exits import find_exits, insert_exits, probe, set_thresholds, with_thresholds
from effopt.folder import Manifest, write
from effopt.kernel import kernel
from effopt.pipeline import Pipeline
from effopt.program import Program, value
from effopt.recipe import steps_of
from effopt.target import target
from tests import zoo

aten = torch.ops.aten


class Net(nn.Module):
    """Rows at dimension 0 and 1, a value without rows, and outputs named like other values.

    Two exits are meant: behind tanh and behind the sum. The names are those that a segment could
    give its score, an input and the value that it hands on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Take x [B, 4, 64] and scale [64]."""
        first, second, third = self.layers
        h = torch.tanh(first(x) * scale)
        turned = h.transpose(0, 1)
        wide = second(turned).relu() + turned
        end = (third(wide).relu() * scale).mean(0)
        return {
            "score": self.head(end),
            "x": h * 2,
            "add": turned * 3,
            "scaled": scale * 4,
        }


def net(form: str = "split", dynamic: Sequence[str] = ("batch",)) -> Program:
    """Return the program of `Net`, with exits."""
    torch.manual_seed(0)
    inputs = {"x": torch.randn(3, 4, 64), "scale": torch.rand(64) + 0.5}
    program = capture(Net().eval(), inputs, dynamic=dynamic)
    nodes = {node.target: node for node in program.nodes()}
    with_heads(program, {nodes[aten.tanh.default]: 1, nodes[aten.add.Tensor]: 0}, "score", form)
    return program


class Pairs(nn.Module):
    """Compares rows with each other, or lays rows and tokens in one dimension."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat, self.head = flat, nn.Linear(64, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Take x [B, 4, 64]; what both of the last steps read is [B, B], or [4 * B, 64]."""
        h = torch.tanh(x)
        if self.flat:
            both = h.reshape(-1, 64).relu()
            wide = h + both.reshape(-1, 4, 64)
            end = both.reshape(-1, 4, 64) * wide
        else:
            both = h.mean(1) @ h.mean(1).T
            wide = h + (both @ h.mean(1))[:, None]
            end = (both @ wide.mean(1))[:, None]
        return {"score": self.head(end.mean(1))}


def pairs(flat: bool) -> Program:
    """Return the program of `Pairs`, with exits behind tanh and the sum."""
    program = capture(Pairs(flat).eval(), {"x": torch.randn(3, 4, 64)})
    nodes = {node.target: node for node in program.nodes()}
    with_heads(program, {nodes[aten.tanh.default]: 1, nodes[aten.add.Tensor]: 1}, "score", "split")
    return program


def of_zoo(
    name: str, recipe: str = "", dynamic: Sequence[str] = ("batch",), exits: int = 2
) -> Program:
    """Return a model of the zoo with exits behind its first blocks, put through a recipe."""
    model, inputs = zoo.make(name)
    program, _ = Pipeline(steps_of("exact")).run(capture(model, inputs, dynamic=dynamic))
    cuts = [cut.node for cut in program.get(find_cuts)[:exits]]
    with_heads(program, dict.fromkeys(cuts, 1), program.signature.outputs[0].name, "split")
    return Pipeline(steps_of(recipe)).run(program)[0] if recipe else program


def with_heads(program: Program, ends: dict[Node, int], output: str, form: str) -> None:
    """Add exits that read the mean over one dimension; both share one head."""
    names = [spec.name for spec in program.signature.outputs]
    (outputs,) = program.output().args
    classes = value(outputs[names.index(output)]).shape[-1]  # type: ignore[index,arg-type]
    channels = value(next(iter(ends))).shape[-1]
    edit, answers, scores = Edit(program, "exits"), list[Node](), list[Node]()
    draw = torch.Generator().manual_seed(1)
    weight = edit.constant("exit_weight", torch.randn(classes, channels, generator=draw))
    for node, dim in ends.items():
        with edit.after(node):
            mean = edit.call(aten.mean.dim, node, [dim])
            answers.append(edit.call(aten.linear.default, mean, weight))
            scores.append(edit.call(kernel("exit_score").op, answers[-1:], "margin"))
    insert_exits(edit, scores, {output: answers}, form)
    edit.close()


def built(program: Program, folder: Path, name: str = "cpu") -> Runner:
    """Write a program for a target and open it, by what a manifest would keep."""
    found = target(name)
    vendor = backend(found.backend)
    artifact = vendor.build(program, found, folder)
    facts = json.loads(json.dumps(dict(artifact.facts)))
    return vendor.load(folder, with_thresholds(program).with_ports(artifact.ports), facts)


@functools.cache
def _probe(program: Program) -> Program:
    exits = program.get(find_exits)
    assert exits is not None
    return probe(program, next(iter(exits.ends)))


def thresholds(program: Program, inputs: Sequence[Tensor], most: int) -> list[tuple[float, ...]]:
    """Return thresholds that give every mixture of exits, or `most` different ones of each exit.

    They lie in the middle between two scores, far apart, so that rounding changes no exit.
    """
    with torch.no_grad():
        found = _probe(program).run(inputs)
    scores = [part.sort().values.double() for part in found[: len(found) // 2]]
    limits = []
    for score in scores:
        widest = score.diff().argsort(descending=True)[: most - 2]
        middle = ((score[1:] + score[:-1]) / 2)[widest].sort().values
        limits.append([-np.inf, *middle.tolist(), np.inf])
    return list(product(*limits))


def eager(program: Program, inputs: Sequence[Tensor], tau: Sequence[float]) -> list[Array]:
    """Run the straight graph in torch."""
    set_thresholds(program, tau)
    with torch.no_grad():
        return [as_array(output) for output in program.run(inputs)]


def compare(
    program: Program,
    run: Callable[[list[Array]], list[Array]],
    inputs: Sequence[Tensor],
    most: int = 5,
) -> tuple[float, set[int]]:
    """Compare with the straight graph over mixtures of exits, which must be the same ones.

    Returns the largest difference of an output, and all exits that rows took.
    """
    worst, seen = 0.0, set[int]()
    for tau in thresholds(program, inputs, most):
        want = eager(program, inputs, tau)
        got = run([*map(as_array, inputs), np.array(tau, np.float32)])
        names = [spec.name for spec in program.signature.outputs]
        for name, one, other in zip(names, got, want, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype), name
            if name == "exit_index":
                assert one.tolist() == other.tolist(), tau
                seen.update(one.tolist())
            else:
                worst = max(worst, float(np.abs(one - other).max()))
    return worst, seen


def saved(program: Program, path: Path) -> Path:
    """Write an engine folder for the CPU, without what `Optimized.save` adds to it."""
    found = target("cpu")

    def fill(fresh: Path) -> Manifest:
        artifact = backend(found.backend).build(program, found, fresh)
        signature = with_thresholds(program).with_ports(artifact.ports)
        return Manifest("0", "cpu", found.backend, signature, facts=dict(artifact.facts))

    return write(path, fill)
