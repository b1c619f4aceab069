"""Every plugin on a GPU: what it means, and how long it takes beside the same in plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from effopt.backends.cuda_driver import Device, Stream
from effopt.plugin import running
from tests.gpu.harness import Case, Loaded, OnDevice, case
from tests.gpu.ptx import lacking, ptx_of
from tests.gpu.sizes import BATCHES, TIMED
from tests.gpu.timing import Row, Times, median_time, torch_time
from tests.test_plugins import KERNELS, TOLERANCES, agree

pytestmark = pytest.mark.gpu


@pytest.fixture
def ptx(gpu: Device) -> Callable[[str], str]:
    if reason := lacking(gpu.arch):
        pytest.skip(reason)
    return lambda stem: ptx_of(stem, gpu.arch)


@pytest.mark.parametrize("kind", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_computes_what_it_means(
    gpu: Device, stream: Stream, ptx: Callable[[str], str], name: str, kind: torch.dtype
) -> None:
    """On all samples, with poisoned outputs, and guards of 256 elements behind each buffer."""
    agree(KERNELS[name], OnDevice(gpu, stream, ptx), kind)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", TIMED)
def test_the_time_of_a_kernel(
    gpu: Device,
    stream: Stream,
    ptx: Callable[[str], str],
    times: Times,
    name: str,
    batch: int,
) -> None:
    """The median of 200 launches in float16; nothing is asserted of it."""
    kernel, kind = KERNELS[name], torch.float16
    assert kernel.plugin is not None
    arguments = TIMED[name](batch, kind)
    cases: list[Case] = []

    def execute(plugin: Any, inputs: Any, attributes: Any) -> Any:
        cases.append(case(plugin, inputs, attributes, ptx))
        return OnDevice(gpu, stream, ptx)(plugin, inputs, attributes)

    with running(execute):
        kernel.plugin.adapt(*arguments)
    (only,) = cases
    with Loaded(gpu, stream, only) as loaded:
        ours = median_time(gpu, stream, loaded.launch)
        loaded.outputs()
    other = torch_time(kernel.op, arguments)
    times.add(gpu, Row(name, f"batch {batch}", "float16", ours, other, only.moved))
