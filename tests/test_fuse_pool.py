"""Means weighted by sizes become one kernel where a file is for a GPU, and stay what they were."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import effopt
from effopt.axes import same_sizes
from effopt.backends.fuse_pool import fuse_pool
from effopt.edit import Edit
from effopt.kernel import kernel
from effopt.mend_rules import pool
from effopt.program import Program, value
from tests.check import Check
from tests.zoo import make

OP = kernel("pool_tokens").op
aten = torch.ops.aten


class Mean(nn.Module):
    """A mean over tokens, beside the sizes of these."""

    def __init__(self, keep: bool, kind: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.keep, self.kind = keep, kind

    def forward(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        return x.to(self.kind).mean(1, keepdim=self.keep) + 1, size * 2


def given() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(3, 7, 5, generator=draw), torch.randint(0, 4, (3, 7), generator=draw).float()


def mended(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> Program:
    """Weight the mean of a model as mending does."""
    program = Check(model, dict(zip(("x", "size"), inputs, strict=True))).program
    edit = Edit(program, "test")
    (mean,) = program.module.graph.find_nodes(op="call_function", target=aten.mean.dim)
    with edit.before(mean):
        made = pool(edit, mean, mean.args[0], program.inputs()[1], 1, 0)  # type: ignore[arg-type]
    edit.replace(mean, made)
    assert edit.close()
    return program


def fused(program: Program) -> list[Node]:
    fuse_pool(program.module.graph)
    program.module.graph.lint()
    program.module.recompile()
    return list(program.module.graph.find_nodes(op="call_function", target=OP))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_what_mending_writes_becomes_one_node(keep: bool, kind: torch.dtype) -> None:
    """The kernel has the same sums in float32 and one rounding behind them: nothing differs."""
    program = mended(Mean(keep, kind), given())
    want = program.run(given())
    (node,) = fused(program)
    left = Counter(n.target for n in program.nodes() if n.op == "call_function")
    assert not left.keys() & {aten.div.Tensor, aten.sum.dim_IntList, aten.clamp_min.default}
    x, size = (value(arg) for arg in node.all_input_nodes)
    assert value(node).dtype == x.dtype == kind
    assert same_sizes(value(node).shape, (size.shape[0], x.shape[2]))
    for got, wanted in zip(program.run(given()), want, strict=True):
        assert torch.equal(got, wanted)


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "another floor": lambda x, s: (x * s[:, :, None]).sum(1) / s[:, :, None].sum(1).clamp_min(1e-3),
    "other sizes below": lambda x, s: (
        (x * s[:, :, None]).sum(1) / (s * 2).unsqueeze(2).sum(1).clamp_min(1e-6)
    ),
    "a sum": lambda x, s: (x * s.unsqueeze(2)).sum(1),
    "another dimension": lambda x, s: (
        (x * s.unsqueeze(2)).sum(2) / s.unsqueeze(2).sum(2).clamp_min(1e-6)
    ),
    "rows behind tokens": lambda x, s: (
        (x * s.unsqueeze(2)).sum(0) / s.unsqueeze(2).sum(0).clamp_min(1e-6)
    ),
    "half precision that stays float32": lambda x, s: (
        (x.half() * s.unsqueeze(2)).sum(1) / s.unsqueeze(2).sum(1).clamp_min(1e-6)
    ),
    "sizes in half precision": lambda x, s: (
        (x.half() * s.half().unsqueeze(2)).sum(1) / s.half().unsqueeze(2).sum(1).clamp_min(1e-6)
    ),
}


class Other(nn.Module):
    """Something like a weighted mean."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, size: Tensor) -> Tensor:
        return self.how(x, size)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_something_else_stays(name: str) -> None:
    program = Check(Other(OTHERS[name]), dict(zip(("x", "size"), given(), strict=True))).program
    before = str(program.module.graph)
    assert not fused(program)
    assert str(program.module.graph) == before


def test_models_that_pool_after_a_merge_have_the_node_for_a_gpu(tmp_path: Path) -> None:
    """DINOv2 takes the mean over its patches. In onnxruntime the node is its function (measured:
    differences of 6e-7 of outputs up to 1.9)."""
    model, inputs = make("dinov2")
    made = effopt.optimize(model, inputs, target="a100", recipe="merge-tokens{r=2}")
    made.save(tmp_path / "out")
    file = onnx.load(str(tmp_path / "out" / "model.onnx"))
    assert [node.op_type for node in file.graph.node].count("PoolTokens") == 1
    assert "PoolTokens" in [function.name for function in file.functions]
    got = effopt.load(tmp_path / "out")(**{name: x.numpy() for name, x in inputs.items()})
    want = made.program.run(tuple(inputs.values()))
    for one, other in zip(got.values(), want, strict=True):
        assert np.abs(one - other.numpy()).max() <= 1e-5


def test_sizes_that_all_samples_share_are_no_sizes_of_a_launch() -> None:
    """A kernel reads one row of sizes for each sample, and would read behind a single one."""
    x, size = given()
    shared = nn.Parameter(size[:1])

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size = shared

        def forward(self, x: Tensor) -> Tensor:
            wide = self.size.unsqueeze(2)
            return (x * wide).sum([1]) / wide.sum([1]).clamp_min(1e-6)

    program = Check(Shared(), {"x": x}).program
    assert fused(program) == []
