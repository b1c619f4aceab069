"""Weights in 16 bits: what layers compute, where they compute in them, and who refuses."""

from pathlib import Path

import pytest
import torch
from torch import nn

import effopt
from effopt.errors import PreconditionError
from effopt.program import Program
from tests.test_quantize import BLOCK, Net, inputs, quantized
from tests.thin import thin

aten = torch.ops.aten
KINDS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def types_of_products(made: Program) -> set[torch.dtype]:
    """Return the types that linear layers of blocks compute in."""
    linears = [node for node in made.nodes() if node.target is aten.linear.default]
    return {node.meta["val"].dtype for node in linears if "head" not in str(node.args[1])}


@torch.no_grad()
def narrowed(net: Net, kind: torch.dtype) -> Net:
    for block in dict.fromkeys(net.blocks):
        for name in BLOCK:
            weight = getattr(block, name).weight
            weight.copy_(weight.to(kind))
    return net.eval()


@pytest.mark.parametrize("scheme", KINDS)
def test_the_cpu_computes_in_float32_with_narrow_weights(scheme: str) -> None:
    made, record, _ = quantized(f"quantize{{scheme={scheme}}}", data=False)
    assert types_of_products(made) == {torch.float32}
    want = narrowed(Net(), KINDS[scheme])(inputs(3))
    # The same products in the same order: 0.0 was measured; a library may sum in another.
    torch.testing.assert_close(made.run((inputs(3),))[0], want, rtol=0, atol=1e-5)
    assert {row["bits"] for row in record.facts["layers"]} == {16}
    before, after = record.facts["bytes"]["linear"]
    assert after < 0.6 * before


@pytest.mark.parametrize(("scheme", "machine"), [("fp16", "t4"), ("bf16", "a100")])
def test_a_gpu_computes_in_what_it_has(scheme: str, machine: str) -> None:
    made, _, before = quantized(f"quantize{{scheme={scheme}}}", data=False, machine=machine)
    assert types_of_products(made) == {KINDS[scheme]}
    got, want = made.run((inputs(3),))[0], before.run((inputs(3),))[0]
    assert got.dtype == torch.float32
    # Of the largest value: 6e-4 in float16 and 5e-3 in bfloat16 were measured.
    assert (got - want).abs().max() <= (5e-3 if scheme == "fp16" else 3e-2) * want.abs().max()


def test_a_type_that_a_gpu_does_not_compute_in_is_refused() -> None:
    with pytest.raises(PreconditionError) as caught:
        quantized("quantize{scheme=bf16}", data=False, machine="t4")
    assert caught.value.reason == "it does not compute in bfloat16"
    assert "float32, float16" in caught.value.remedy


def test_a_weight_beyond_the_range_of_float16_stays() -> None:
    net = Net()
    with torch.no_grad():
        net.blocks[1].down.weight[3, 5] = 1e5
    _, record, _ = quantized("quantize{scheme=fp16}", net, data=False)
    assert record.facts["float"]["blocks.1.down"] == "its weight is beyond float16"
    _, record, _ = quantized("quantize{scheme=bf16}", net, data=False)
    assert list(record.facts["float"]) == ["head"]


def test_inputs_beyond_the_range_of_float16_are_named_where_layers_compute_in_it() -> None:
    net = Net()
    with torch.no_grad():
        net.blocks[0].norms[1].weight[:] = 1e5
    with pytest.raises(PreconditionError, match="beyond float16") as caught:
        quantized("quantize{scheme=fp16}", net, machine="a100")
    assert "blocks.0.up" in caught.value.node
    quantized("quantize{scheme=fp16}", net)  # a CPU computes in float32


def test_a_shared_weight_is_kept_once() -> None:
    """A narrow copy for each layer made the file larger than it was."""
    _, record, _ = quantized("quantize{scheme=fp16}", Net(shared=True), data=False)
    before, after = record.facts["bytes"]["linear"]
    assert after < 0.7 * before


@pytest.mark.parametrize("scheme", thin(KINDS))
def test_the_file_is_half_the_size_and_runs(tmp_path: Path, scheme: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 256), nn.Linear(256, 64))
    net, x = net.eval(), torch.randn(3, 64)
    spec = f"quantize{{scheme={scheme},heads=true}}"
    effopt.optimize(net, x, recipe=spec).save(tmp_path / "made")
    weights = sum(layer.weight.numel() for layer in net if isinstance(layer, nn.Linear))
    size = (tmp_path / "made" / "model.onnx").stat().st_size
    assert size == pytest.approx(2 * weights, rel=0.05)
    with torch.no_grad():
        for layer in (net[0], net[2], net[3]):
            layer.weight.copy_(layer.weight.to(KINDS[scheme]))
        want = net(x)
    (got,) = effopt.load(tmp_path / "made")(x.numpy())
    # The same numbers, summed in another order: 2e-7 was measured.
    torch.testing.assert_close(torch.as_tensor(got), want, rtol=0, atol=1e-5)


class Half(nn.Module):
    """A layer whose weight is narrow already."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(64, 64).half(), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.last(x + self.layer(x.half()).float())
        return made


def test_what_is_narrow_already_stays() -> None:
    with pytest.raises(PreconditionError, match="float16 already"):
        quantized("quantize{scheme=fp16}", Half(), data=False)
