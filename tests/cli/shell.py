"""Runs command lines in this process, on a small engine and on a stand-in for the optimizer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from effopt.__main__ import main
from effopt.folder import Manifest, write
from effopt.reference import write_reference
from effopt.report import Report
from effopt.signature import Signature, TensorSpec

EVIL = "</script>\x1b[2J[red]"
CONVERT = ("convert", "cli_shop:make", "-o", "out")


def write_engine(path: Path, scale: float = 2.0, batch: int | str = "batch", **more: Any) -> Path:
    """Write an engine folder that doubles its input."""

    def fill(folder: Path) -> Manifest:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])
        y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 4])
        two = helper.make_tensor("two", TensorProto.FLOAT, [], [scale])
        node = helper.make_node("Mul", ["x", "two"], ["logits"])
        graph = helper.make_graph([node], "double", [x], [y], [two])
        opset = [helper.make_opsetid("", 20)]
        onnx.save(
            helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "model.onnx"
        )
        data = np.arange(8, dtype=np.float32).reshape(2, 4)
        write_reference(folder, {"x": data}, {"logits": 2 * data}, {"logits": 2 * data})
        ports = [TensorSpec(name, "float32", (batch, 4), name) for name in ("x", "logits")]
        signature = Signature((ports[0],), (ports[1],), {"dict": {"logits": 0}})
        return Manifest("0.1.0", more.pop("target", "cpu"), "ort", signature, **more)

    return write(path, fill)


class Shell:
    """Runs command lines in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.err = ""

    def __call__(self, *words: object) -> tuple[int, str]:
        """Return the exit code and stdout; stderr is in `err`."""
        code = main([str(word) for word in words])
        out, self.err = self.capsys.readouterr()
        return code, out

    def json(self, *words: object) -> tuple[int, Any]:
        """Run with --json and read the one document."""
        code, out = self(*words, "--json")
        return code, json.loads(out)


class FakeOptimized:
    report = Report(model="Linear", target="cpu", recipe="exact")

    def save(self, path: Path) -> Path:
        print("a library that prints")
        return write_engine(path)
