"""Every plugin: its function, its CUDA source and its launch say what the kernel means."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.backends import nvcc
from effopt.backends.onnx_plugins import plugins
from effopt.kernel import Kernel, kernels
from effopt.plugin import FLOATS, Execute, NoLaunch, Plugin, call, running
from effopt.sizes import names
from tests.plugin_runs import alone, in_onnxruntime, in_reference, on_host

KERNELS = {k.plugin.name: k for k in kernels().values() if k.plugin is not None}
ARCHES = ("sm_80", "sm_89", "sm_90")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative to the largest value: sums in another order, and one rounding to 11 or 8 bits."""

needs_nvcc = pytest.mark.skipif(not nvcc.available().ok, reason=nvcc.available().reason)


def plugin_of(name: str) -> Plugin:
    found = KERNELS[name].plugin
    assert found is not None
    return found


def counted(execute: Execute, calls: list[str]) -> Execute:
    def counting(plugin: Plugin, inputs: Any, attributes: Any) -> Any:
        calls.append(plugin.name)
        return execute(plugin, inputs, attributes)

    return counting


def agree(kernel: Kernel, execute: Execute, kind: torch.dtype) -> None:
    """Hold a plugin to the meaning of its kernel over all samples, in one float type."""
    assert kernel.plugin is not None
    calls = list[str]()
    for sample in kernel.samples():
        given = [_cast(part, kind) for part in sample]
        want = _flat(kernel.op(*given))
        with running(counted(execute, calls)):
            got = _flat(kernel.plugin.adapt(*given))
        for a, b in zip(want, got, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            if not a.is_floating_point():
                assert torch.equal(a, b)
                continue
            scale = max(a.abs().max().item(), 1.0) if a.numel() else 1.0
            error = (a.float() - b.float()).abs().max().item() if a.numel() else 0.0
            assert error <= TOLERANCES[kind] * scale
    assert kernel.plugin.name in calls, "no sample is one that the plugin runs"


def _cast(part: Any, kind: torch.dtype) -> Any:
    real = isinstance(part, Tensor) and part.dtype in (torch.float32, torch.float16)
    return part.to(kind) if real else part


def _flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", KERNELS)
def test_the_function_runs_in_stock_onnxruntime(name: str) -> None:
    agree(KERNELS[name], in_onnxruntime, torch.float32)


@pytest.mark.parametrize("name", KERNELS)
def test_the_function_runs_in_the_reference_evaluator(name: str) -> None:
    agree(KERNELS[name], in_reference, torch.float32)


@pytest.mark.parametrize("kind", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_the_arithmetic_of_the_source_is_right_on_the_host(name: str, kind: torch.dtype) -> None:
    agree(KERNELS[name], on_host, kind)


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("name", KERNELS)
def test_a_function_is_one_of_the_opset_of_its_file(name: str, opset: int) -> None:
    """`alone` asks onnx's checker, which refuses a body of another opset."""
    kernel, seen = KERNELS[name], list[int]()

    def check(plugin: Plugin, inputs: Any, attributes: Any) -> list[Tensor]:
        seen.append(alone(plugin, inputs, attributes, opset).functions[0].opset_import[0].version)
        return on_host(plugin, inputs, attributes)

    with running(check):
        for sample in kernel.samples():
            plugin_of(name).adapt(*sample)
    assert set(seen) == {opset}


# --- PTX and launch -----------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", KERNELS)
def test_ptx_has_an_entry_of_each_type_that_takes_what_is_passed(name: str, arch: str) -> None:
    plugin = plugin_of(name)
    made = nvcc.compile_ptx(plugin.stem, arch)
    assert made.target == arch
    assert made.version == nvcc.PTX_VERSION
    entries = made.entries()
    wanted = [
        *["u64"] * len(plugin.inputs),
        *["u32"] * len(plugin.scalars),
        *["u64"] * len(plugin.outputs),
    ]
    for dtype in FLOATS:
        assert list(entries[plugin.entry(dtype)].parameters) == wanted
    assert set(entries) == {plugin.entry(dtype) for dtype in FLOATS}


@pytest.mark.parametrize("name", KERNELS)
def test_a_launch_is_one_that_a_device_takes(name: str) -> None:
    """For the samples and for a batch of 64 of ViT-L: 1,024 threads, 65,535 blocks in y and z."""
    plugin = plugin_of(name)
    sizes = {size for port in plugin.inputs for size in port.sizes}
    for place, batch in enumerate((1, 3, 64)):
        known: dict[str, Any] = {size: (7, 64, 577)[place] for size in sizes}
        known |= {"B": batch, **{key: kind(1) for key, kind in plugin.attributes.items()}}
        launch = plugin.launch(known)
        assert 32 <= launch.block <= 1024
        assert launch.block % 32 == 0
        assert launch.shared <= 48 << 10
        x, y, z = launch.grid
        assert 1 <= x < 1 << 31
        assert 1 <= y <= 65535
        assert 1 <= z <= 65535
        assert all(-(1 << 31) <= scalar < 1 << 31 for scalar in launch.scalars)


@pytest.mark.parametrize("name", KERNELS)
def test_expressions_read_what_the_inputs_and_attributes_say(name: str) -> None:
    plugin = plugin_of(name)
    known = {size for port in plugin.inputs for size in port.sizes} | set(plugin.attributes)
    texts = [*plugin.grid, plugin.shared, *plugin.scalars]
    texts += [size for port in plugin.outputs for size in port.sizes]
    assert {word for text in texts for word in names(text)} <= known


def test_every_source_is_that_of_a_plugin_and_beside_its_kernel() -> None:
    stems = {path.stem for path in nvcc.SOURCES.glob("*.cu")}
    assert stems == {plugin.stem for plugin in plugins().values()}
    assert all((nvcc.SOURCES / f"{stem}.py").exists() for stem in stems)
    assert all(dataclasses.is_dataclass(plugin) for plugin in plugins().values())


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_broadcast_into_a_launch(name: str) -> None:
    """A batch of one beside others would be read behind its end."""
    plugin, seen = plugin_of(name), list[str]()

    def one_by_one(plugin: Plugin, inputs: Any, attributes: Any) -> Any:
        for place, port in enumerate(plugin.inputs):
            others = [p for n, p in enumerate(plugin.inputs) if n != place]
            if port.sizes[:1] != ("B",) or not any("B" in other.sizes for other in others):
                continue
            if inputs[place].shape[0] == 1:
                continue
            widened = [*inputs[:place], inputs[place][:1], *inputs[place + 1 :]]
            with pytest.raises(NoLaunch, match=f"{plugin.name} is not launched on"):
                call(plugin, widened, **attributes)
            seen.append(port.name)
        return on_host(plugin, inputs, attributes)

    with running(one_by_one):
        for sample in KERNELS[name].samples():
            plugin.adapt(*sample)
    shares = sum("B" in port.sizes for port in plugin.inputs) > 1
    assert bool(seen) == shares
