"""The portable file: the model's names, its numbers, and what is refused and why."""

import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from effopt.backend import Runner, as_array, backend
from effopt.backends import onnx_file
from effopt.backends.kernels import TABLE as KERNELS
from effopt.backends.onnx import write
from effopt.capture import capture
from effopt.errors import MissingError, PreconditionError, UsageError
from effopt.kernel import kernel
from effopt.program import Program
from effopt.target import target
from tests.thin import thin

ULPS = 64
"""Bound on |file - eager| / max|eager| in units of float32's epsilon (7.6e-6): an order above
the most that the models here showed (5e-7), four below a wrong weight."""


def images(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def tokens(rows: int = 2, length: int = 6) -> Tensor:
    return torch.randn(rows, length, 8, generator=torch.Generator().manual_seed(1))


class Attend(nn.Module):
    """Self-attention with two heads over [B, N, 8]; `how` gives the keywords of the operator."""

    def __init__(self, how: Callable[[Tensor], dict[str, Any]] = lambda x: {}, few: int = 2):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.kv = nn.Linear(8, 8 * few)
        self.few, self.how = few, how

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 2, 4).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, self.few, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, **self.how(x))
        return self.out(y.transpose(1, 2).reshape(b, n, 8))


def padding(x: Tensor) -> Tensor:
    """[B, 1, 1, N]: True where the first channel allows; the first token always."""
    first = torch.arange(x.shape[1]) == 0
    return ((x[:, :, 0] > 0) | first)[:, None, None, :]


def opened(program: Program, folder: Path, name: str = "cpu") -> Runner:
    """Build for a target and load what was built, as an engine folder does."""
    made = backend(target(name).backend)
    artifact = made.build(program, target(name), folder)
    outputs = tuple(
        replace(s, port=artifact.ports.get(s.name, s.port)) for s in program.signature.outputs
    )
    return made.load(folder, replace(program.signature, outputs=outputs), artifact.facts)


def same(runner: Runner, program: Program, inputs: tuple[Tensor, ...]) -> None:
    got = runner.run([as_array(x) for x in inputs])
    want = [as_array(y) for y in program.run(inputs)]
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        bound = ULPS * np.finfo(np.float32).eps * np.abs(other).max()
        assert np.abs(one.astype(np.float64) - other).max() <= bound


def operators(folder: Path) -> Counter[str]:
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


# --- numbers and form -------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_attention_is_four_operators_and_right_at_any_batch(tmp_path: Path, rows: int) -> None:
    program = capture(Attend(), {"x": tokens()})
    runner = opened(program, tmp_path)
    same(runner, program, (tokens(rows),))
    assert operators(tmp_path) == {
        "Reshape": 3, "Add": 3, "Transpose": 4, "Slice": 2, "Squeeze": 2, "MatMul": 5, "Mul": 1,
        "Softmax": 1,
    }  # fmt: skip


def test_wide_linears_become_one_gemm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effopt.backends.onnx_lower.NARROW", 0)
    program = capture(Attend(), {"x": tokens()})
    same(opened(program, tmp_path), program, (tokens(2),))
    assert operators(tmp_path) == {
        "Reshape": 5, "Gemm": 3, "Transpose": 4, "Slice": 2, "Squeeze": 2, "MatMul": 2, "Mul": 1,
        "Softmax": 1,
    }  # fmt: skip


HOW: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "scale": lambda x: {"scale": 0.3},
    "causal": lambda x: {"is_causal": True},
    "bool": lambda x: {"attn_mask": padding(x)},
    "bool expanded": lambda x: {"attn_mask": padding(x).expand(-1, 1, x.shape[1], x.shape[1])},
    "additive": lambda x: {"attn_mask": x[:, None, None, :, 0] * 2},
}


@pytest.mark.parametrize("how", thin(HOW))
def test_masks_and_scale(tmp_path: Path, how: str) -> None:
    program = capture(Attend(HOW[how]), {"x": tokens()})
    runner = opened(program, tmp_path)
    same(runner, program, (tokens(3),))
    found = operators(tmp_path)
    assert not {"IsNaN", "CastLike", "Trilu", "Sqrt", "Div"} & set(found)
    assert found["Where"] == (1 if "bool" in how else 0)


def test_a_mask_is_made_additive_once_and_stays_small(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Attend(), Attend()])

        def forward(self, x: Tensor) -> Tensor:
            mask = padding(x).expand(-1, -1, x.shape[1], -1)
            for block in self.blocks:
                block.how = lambda _: {"attn_mask": mask}  # type: ignore[assignment]
                x = block(x)
            return x

    program = capture(Two(), {"x": tokens()})
    same(opened(program, tmp_path), program, (tokens(3),))
    assert operators(tmp_path)["Where"] == 1
    assert operators(tmp_path)["Expand"] == 0


def test_a_mask_of_nothing_leaves_no_addition(tmp_path: Path) -> None:
    allow = {"attn_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}
    program = capture(Attend(lambda x: allow), {"x": tokens()})
    same(opened(program, tmp_path), program, (tokens(3),))
    assert operators(tmp_path)["Add"] == 3, "the biases of the linears alone"


def test_grouped_heads(tmp_path: Path) -> None:
    program = capture(Attend(lambda x: {"enable_gqa": True}, few=1), {"x": tokens()})
    same(opened(program, tmp_path), program, (tokens(3),))


def test_dropout_in_attention_is_refused(tmp_path: Path) -> None:
    program = capture(Attend(lambda x: {"dropout_p": 0.5}), {"x": tokens()})
    with pytest.raises(PreconditionError) as caught:
        write(program, tmp_path)
    assert caught.value.node.startswith("scaled_dot_product_attention (")
    assert "drops at random\n  remedy: capture in eval mode" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [3, 6, 9])
def test_dynamic_length(tmp_path: Path, length: int) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.attend = nn.Embedding(10, 8), Attend(HOW["causal"])

        def forward(self, ids: Tensor) -> Tensor:
            return self.attend(self.table(ids))

    ids = torch.arange(12).reshape(2, 6) % 10
    program = capture(Text(), {"ids": ids}, dynamic=("batch", "length"))
    same(opened(program, tmp_path), program, (torch.arange(3 * length).reshape(3, -1) % 10,))


def test_kernels_become_standard_operators(tmp_path: Path) -> None:
    class Keep(nn.Module):
        def forward(self, x: Tensor, kept: Tensor) -> Tensor:
            return kernel("gather_tokens").op(x, kept, 1) * 2

    kept = torch.tensor([[0, 2, 5], [1, 2, 3]])
    program = capture(Keep(), {"x": tokens(), "kept": kept})
    same(opened(program, tmp_path), program, (tokens(), kept))
    model = onnx.load(str(tmp_path / "model.onnx"))
    assert {node.domain for node in model.graph.node} == {""}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert not model.functions


# --- names ------------------------------------------------------------------------------------


class Names(nn.Module):
    """Returns an input, a weight, one value twice, and a value named like an input."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.arange(8.0))

    def forward(self, x: Tensor, unused: Tensor) -> dict[str, Tensor]:
        total = x + self.bias
        return {"x": total, "again": total, "copy": x, "bias": self.bias, "max": total.amax(1)}


def test_names_of_outputs_that_have_no_node_of_their_own(tmp_path: Path) -> None:
    program = capture(Names(), {"x": tokens(), "unused": tokens()})
    same(opened(program, tmp_path), program, (tokens(3), tokens(3)))
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    assert [port.name for port in graph.input] == ["x", "unused"]
    assert [port.name for port in graph.output] == ["x_out", "again", "copy", "bias", "max"]
    sizes = [
        [d.dim_param or d.dim_value for d in p.type.tensor_type.shape.dim] for p in graph.output
    ]
    assert sizes == [["batch", 6, 8], ["batch", 6, 8], ["batch", 6, 8], [8], ["batch", 8]]
    assert write(program, tmp_path).ports == {"x": "x_out"}


def test_the_program_is_left_as_it_was(tmp_path: Path) -> None:
    program = capture(Attend(HOW["bool"]), {"x": tokens()})
    before, weights = program.text(), [p.data_ptr() for p in program.module.parameters()]
    write(program, tmp_path)
    assert program.text() == before
    assert [p.data_ptr() for p in program.module.parameters()] == weights


# --- the file ---------------------------------------------------------------------------------


def test_provenance_and_no_traces_of_the_machine(tmp_path: Path) -> None:
    program = capture(Attend(), {"x": tokens()})
    write(program, tmp_path, {"effopt.recipe": "exact"})
    model = onnx.load(str(tmp_path / "model.onnx"))
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert found["effopt.recipe"] == "exact"
    assert found["effopt.version"] == model.producer_version
    assert model.producer_name == "effopt"
    assert not model.graph.value_info
    assert __file__.encode() not in (tmp_path / "model.onnx").read_bytes()


def test_large_weights_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "EXTERNAL_FROM", 100)
    program = capture(nn.Linear(64, 64), {"input": torch.randn(2, 64)})
    artifact = backend("ort").build(program, target("cpu"), tmp_path)
    assert artifact.files == ("model.onnx", "model.onnx.data")
    assert (tmp_path / "model.onnx.data").stat().st_size >= 64 * 64 * 4
    same(backend("ort").load(tmp_path, program.signature, {}), program, (torch.ones(3, 64),))


def test_export_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = capture(Attend(), {"x": tokens()})
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(program, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == level


# --- refusals ---------------------------------------------------------------------------------


def test_an_operator_without_onnx_form_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(PreconditionError) as caught:
        write(capture(Odd(), {"x": tokens()}), tmp_path)
    assert re.fullmatch(r"special_bessel_j0 .*test_onnx_backend.py:\d+", caught.value.node)
    assert caught.value.reason == "no form in standard ONNX operators: prims.bessel_j0"


def test_a_bfloat16_model_is_refused_everywhere() -> None:
    program = capture(nn.Linear(8, 8).bfloat16(), {"input": torch.randn(2, 8).bfloat16()})
    support = backend("ort").supports(program, target("cpu"))
    assert not support.ok
    assert "is bfloat16, which onnxruntime cannot run on a CPU" in support.reason
    support = backend("onnx").supports(program, target("a100"))
    assert "is bfloat16, and arrays of the engine have no such type" in support.reason


def test_without_onnxruntime_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = capture(nn.Linear(8, 8), {"input": torch.randn(2, 8)})
    backend("onnx").build(program, target("onnx"), tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingError, match=r"remedy: pip install 'effopt\[ort\]'"):
        backend("onnx").load(tmp_path, program.signature, {})


def test_the_gpu_file_says_what_is_pending(tmp_path: Path) -> None:
    program = capture(nn.Linear(8, 8), {"input": torch.randn(2, 8)})
    artifact = backend("onnx").build(program, target("a100"), tmp_path)
    assert artifact.pending == "engine: to be built on sm_80 from model.onnx"
    assert backend("onnx").build(program, target("onnx"), tmp_path).pending == ""


def test_the_gpu_file_is_refused_with_its_node(tmp_path: Path) -> None:
    class Select(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, 0].nonzero()

    program = capture(Select(), {"x": tokens()}, dynamic=())
    with pytest.raises(PreconditionError) as caught:
        backend("onnx").build(program, target("h100"), tmp_path)
    assert "(NonZero)" in caught.value.node
    assert "TensorRT cannot take it on sm_90" in caught.value.reason
    assert "the length of its result depends on the data" in caught.value.reason


# --- the oracle -------------------------------------------------------------------------------


def test_eager_is_an_oracle_and_builds_nothing(tmp_path: Path) -> None:
    program = capture(Attend(), {"x": tokens()})
    oracle = backend("eager")
    same(oracle.runner(program), program, (tokens(3),))  # type: ignore[attr-defined]
    assert "no engine file" in oracle.supports(program, target("cpu")).reason
    with pytest.raises(UsageError, match="use the backend 'ort' or 'onnx'"):
        oracle.build(program, target("cpu"), tmp_path)


# --- kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", thin(KERNELS))
def test_every_kernel_in_standard_operators(tmp_path: Path, name: str) -> None:
    found = kernel(name)
    leaves, spec = pytree.tree_flatten(found.samples()[0])  # some take lists of tensors

    class Call(nn.Module):
        def forward(self, tensors: list[Tensor]) -> Any:
            given = iter(tensors)
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return found.op(*pytree.tree_unflatten(filled, spec))

    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    program = capture(Call(), {"tensors": tensors}, dynamic=())
    runner = opened(program, tmp_path, "a100")  # and TensorRT would take it
    same(runner, program, tuple(tensors))
