"""A small engine with one exit, whose rows say themselves what they are answered, and when."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from effopt.folder import Manifest, write
from effopt.promise import Promise
from effopt.reference import write_reference
from effopt.signature import EXIT_INDEX, TAU, Signature, TensorSpec

Array = NDArray[Any]

PROMISE = Promise(
    rule="ltt",
    epsilon=0.05,
    delta=0.05,
    loss="disagree",
    reference="self",
    unit="sample",
    output="logits",
    position=None,
    samples=300,
    fitted=200,
    rows="ab" * 32,
    engine="ort on cpu",
    graph="cd" * 32,
    tau=(0.5,),
    index=1,
    risk=0.02,
    shares=(0.5, 0.5),
    cost=0.75,
    grid=((float("inf"),), (0.5,)),
    risks=(0.0, 0.02),
    bounds=(0.01, 0.04),
)


def rows(wrong: int, right: int, stay: int) -> Array:
    """Make rows [n, 7]: logits of the end, logits of the exit, and the score.

    `wrong` and `right` ones leave at the exit, with another or the same answer as the end's.
    """
    end, other, high, low = [3.0, 1.0, 2.0], [1.0, 3.0, 2.0], [0.9], [0.1]
    kinds = [([*end, *other, *high], wrong), ([*end, *end, *high], right)]
    kinds.append(([*end, *other, *low], stay))
    made = [row for row, count in kinds for _ in range(count)]
    found = np.array(made, np.float32)
    found[:, (0, 3)] += np.linspace(0, 0.5, len(found), dtype=np.float32)[:, None]  # no two alike
    return found


def write_exit_engine(
    path: Path, promise: Promise | None = PROMISE, tau: Sequence[float] = (0.5,), **more: Any
) -> Path:
    """Write an engine folder of the rows above; `more` are other facts."""

    def fill(folder: Path) -> Manifest:
        onnx.save(_model(), folder / "model.onnx")
        data = rows(1, 1, 2)
        ends = {"logits": data[:, :3], EXIT_INDEX: np.full(len(data), 2)}
        write_reference(folder, {"x": data}, ends, ends)
        facts = {} if promise is None else {"exits": {"promise": promise.to_json()}}
        return Manifest("0.1.0", "cpu", "ort", signature(tau), facts={**facts, **more})

    return write(path, fill)


def signature(tau: Sequence[float]) -> Signature:
    x = TensorSpec("x", "float32", ("batch", 7), "x")
    limits = TensorSpec(TAU, "float32", (1,), TAU, tuple(tau))
    logits = TensorSpec("logits", "float32", ("batch", 3), "logits")
    index = TensorSpec(EXIT_INDEX, "int64", ("batch",), EXIT_INDEX)
    return Signature((x, limits), (logits, index), {"dict": {"logits": 0, EXIT_INDEX: 1}})


def _model() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Split", ["x", "sizes"], ["end", "early", "score"], axis=1),
        helper.make_node("GreaterOrEqual", ["score", TAU], ["leaves"]),
        helper.make_node("Where", ["leaves", "early", "end"], ["logits"]),
        helper.make_node("Where", ["leaves", "one", "two"], ["taken"]),
        helper.make_node("Squeeze", ["taken", "one"], [EXIT_INDEX]),
    ]
    values = {"sizes": [3, 3, 1], "one": [1], "two": [2]}
    constants = [helper.make_tensor(n, TensorProto.INT64, [len(v)], v) for n, v in values.items()]
    ports = {"x": ["batch", 7], TAU: [1], "logits": ["batch", 3], EXIT_INDEX: ["batch"]}
    kinds = dict.fromkeys(ports, TensorProto.FLOAT) | {EXIT_INDEX: TensorProto.INT64}
    made = [helper.make_tensor_value_info(n, kinds[n], shape) for n, shape in ports.items()]
    graph = helper.make_graph(nodes, "exits", made[:2], made[2:], constants)
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


def promised(**changes: Any) -> Promise:
    return replace(PROMISE, **changes)
