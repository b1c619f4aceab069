"""Every plugin: its function, its CUDA source and its launch say what the kernel means."""

from functools import partial
from pathlib import Path
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
from tests.thin import thin

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


@pytest.mark.parametrize("backwards", [False, True], ids=["first to last", "last to first"])
@pytest.mark.parametrize("kind", thin(TOLERANCES), ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_the_arithmetic_of_the_source_is_right_on_the_host(
    name: str, kind: torch.dtype, backwards: bool
) -> None:
    """Threads and blocks in either order: what one needs of another shows in one of the two."""
    agree(KERNELS[name], partial(on_host, backwards=backwards), kind)


NEIGHBOURS = """
#include "effopt.cuh"
template <class T> DEVICE void pool_tokens(const T*, const float*, int, int C, T* y) {
  FOR_THREADS(c, C) y[c] = rounded<T>(c ? real(y[c - 1]) + 1.0f : 0.0f);
}
#define PARAMETERS(T) (const T* x, const float* size, int N, int C, T* y)
ENTRIES(pool_tokens, PARAMETERS, x, size, N, C, y)
"""


def test_a_thread_that_reads_what_another_of_its_phase_writes_shows(tmp_path: Path) -> None:
    source = tmp_path / "neighbours.cu"
    source.write_text(NEIGHBOURS)
    plugin, given = plugin_of("PoolTokens"), (torch.ones(1, 2, 4), torch.ones(1, 2))
    ahead, back = (on_host(plugin, given, {}, source, way)[0] for way in (False, True))
    assert ahead.tolist() == [[0, 1, 2, 3]]
    assert not torch.equal(ahead, back)


@pytest.mark.parametrize("opset", thin([23, 21]))
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


NAMES = {size for kernel in plugins().values() for port in kernel.inputs for size in port.sizes}
SMALL = {"H": 4, "G": 2, "N": 128, "K": 64, "W": 8, "R": 64}
LAUNCHES: dict[str, dict[str, int]] = {
    "least": dict.fromkeys(NAMES, 7) | {"B": 1},
    "three": dict.fromkeys(NAMES, 64) | {"B": 3},
    "64 of ViT-L": dict.fromkeys(NAMES, 577) | {"B": 64},
    "70,000 small ones": dict.fromkeys(NAMES, 8) | SMALL | {"B": 70_000, "M": 70_000 * 128},
}
"""Sizes by name; M, the rows of a linear layer, counts tokens of all samples."""


@pytest.mark.parametrize("case", LAUNCHES)
@pytest.mark.parametrize("name", KERNELS)
def test_a_launch_is_one_that_a_device_takes(name: str, case: str) -> None:
    """1,024 threads, 48 KB, 2^31 - 1 blocks in x and 65,535 in y and z; scalars of 32 bits."""
    plugin = plugin_of(name)
    known: dict[str, Any] = {key: kind(1) for key, kind in plugin.attributes.items()}
    launch = plugin.launch(LAUNCHES[case] | known)
    assert 32 <= launch.block <= 1024
    assert launch.block % 32 == 0
    assert launch.shared <= 48 << 10
    for blocks, most in zip(launch.grid, ((1 << 31) - 1, 65535, 65535), strict=True):
        assert 1 <= blocks <= most
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
