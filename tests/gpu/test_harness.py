"""What checks kernels on a GPU is checked itself, on the driver's stand-in: it needs no GPU."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.backends import cuda_driver
from effopt.backends.cuda_driver import Device, Stream
from effopt.backends.onnx_plugins import plugins
from effopt.errors import MissingError
from effopt.plugin import FLOATS, Plugin, results, running
from tests.fake_cuda import PTX, Fake, needs_gcc
from tests.gpu import ptx
from tests.gpu.harness import GUARD, Case, Loaded, OnDevice, Out, case, poison
from tests.gpu.sizes import BATCHES, TIMED
from tests.gpu.timing import COUNT, WARM, Row, document, median_time, table, torch_time
from tests.test_plugins import KERNELS

pytestmark = needs_gcc


@pytest.fixture
def device(fake: Fake) -> Iterator[Device]:
    yield cuda_driver.device(library=fake.path)
    fake.settle()


@pytest.fixture
def stream(device: Device) -> Iterator[Stream]:
    with Stream(device) as made:
        yield made


X, Y = torch.tensor([1.0, 2.0, 3.0]), Out(torch.float32, (3,))


def add_one(entry: str, *arguments: Any) -> Case:
    return Case(entry, PTX.decode(), (1, 1, 1), (32, 1, 1), 0, arguments)


def run(device: Device, stream: Stream, case: Case) -> list[Tensor]:
    with Loaded(device, stream, case) as loaded:
        loaded.launch()
        return loaded.outputs()


# --- checking -----------------------------------------------------------------------------------


def test_outputs_come_back(device: Device, stream: Stream) -> None:
    (y,) = run(device, stream, add_one("add_one", X, 3, Y))
    assert y.tolist() == [2, 3, 4]


def test_what_a_kernel_leaves_out_stays_poison(device: Device, stream: Stream) -> None:
    (y,) = run(device, stream, add_one("nothing", X, 3, Y))
    assert y.isnan().all()
    (y,) = run(device, stream, add_one("add_one", X, 2, Y))
    assert y.isnan().tolist() == [False, False, True]


def test_a_write_behind_an_output_is_found(device: Device, stream: Stream) -> None:
    with pytest.raises(AssertionError, match="written behind argument 2 of add_one_too_far"):
        run(device, stream, add_one("add_one_too_far", X, 3, Y))


def test_a_write_into_an_input_is_found(device: Device, stream: Stream) -> None:
    with pytest.raises(AssertionError, match="an input is overwritten: argument 2"):
        run(device, stream, add_one("add_one", X, 3, X))


def test_buffers_have_their_guards(device: Device, stream: Stream, fake: Fake) -> None:
    fake.forget()
    run(device, stream, add_one("add_one", X, 3, Y))
    assert [call[1] for call in fake.calls("cuMemAlloc_v2")] == [(3 + GUARD) * 4] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_every_type_is_poisoned(dtype: torch.dtype) -> None:
    made = poison(Out(dtype, (2, 3)))
    flat = made.view(torch.uint8)
    assert flat.numel() == 6 * dtype.itemsize
    assert made.isnan().all() if dtype.is_floating_point else flat.any()


# --- plugins ------------------------------------------------------------------------------------


def entries(plugin: Plugin) -> str:
    """Write PTX of a plugin's entries, with parameters and nothing in them."""
    kinds = [*["u64"] * len(plugin.inputs), *["u32"] * len(plugin.scalars)]
    kinds += ["u64"] * len(plugin.outputs)
    parameters = ", ".join(f".param .{kind} p{place}" for place, kind in enumerate(kinds))
    return "\n".join(f".visible .entry {plugin.entry(f)}({parameters})" for f in FLOATS)


@pytest.mark.parametrize("name", KERNELS)
def test_a_plugin_is_launched_as_its_rule_says(
    device: Device, stream: Stream, fake: Fake, name: str
) -> None:
    kernel = KERNELS[name]
    plugin = kernel.plugin
    assert plugin is not None
    wanted: list[tuple[int, ...]] = []

    def execute(
        plugin: Plugin, inputs: Sequence[Tensor], attributes: Mapping[str, float]
    ) -> list[Tensor]:
        rule = plugin.launch(plugin.known([t.shape for t in inputs], attributes))
        scalars = tuple(scalar % 2**32 for scalar in rule.scalars)
        wanted.append((*rule.grid, rule.block, 1, 1, rule.shared, *scalars))
        OnDevice(device, stream, lambda stem: entries(plugin))(plugin, inputs, attributes)
        # Its outputs are poison here, which what follows in `adapt` cannot take.
        kinds = results(plugin, inputs, attributes)
        return [torch.zeros(sizes, dtype=kind) for kind, sizes in kinds]

    with running(execute):
        for sample in kernel.samples():
            plugin.adapt(*sample)
    first = 9 + len(plugin.inputs)
    found = [
        (*call[1:8], *call[first : first + len(plugin.scalars)])
        for call in fake.calls("cuLaunchKernel")
    ]
    assert wanted
    assert found == wanted


@pytest.mark.parametrize("name", TIMED)
def test_what_is_timed_is_one_launch(name: str) -> None:
    plugin = KERNELS[name].plugin
    assert plugin is not None
    cases: list[Case] = []

    def execute(plugin: Plugin, inputs: Any, attributes: Any) -> list[Tensor]:
        cases.append(case(plugin, inputs, attributes, entries_of))
        kinds = results(plugin, inputs, attributes)
        return [torch.zeros(sizes, dtype=kind) for kind, sizes in kinds]

    def entries_of(stem: str) -> str:
        return entries(plugin)

    with running(execute):
        plugin.adapt(*TIMED[name](BATCHES[0], torch.float16))
    (only,) = cases
    assert only.entry == plugin.entry("float16")
    assert only.moved > 0


def test_ptx_can_be_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a machine that has a GPU, and no nvcc."""
    monkeypatch.setattr(ptx.nvcc, "find", lambda: None)
    assert "nvcc is not installed" in ptx.lacking("sm_90")
    with pytest.raises(MissingError):
        ptx.ptx_of("gather_tokens", "sm_90")
    monkeypatch.setenv(ptx.FOLDER, str(tmp_path))
    for plugin in plugins().values():
        (tmp_path / ptx.ptx_file(plugin.stem, "sm_90")).write_text(plugin.stem)
    assert ptx.lacking("sm_90") == ""
    assert ptx.ptx_of("gather_tokens", "sm_90") == "gather_tokens"


# --- times --------------------------------------------------------------------------------------


def test_a_time_is_the_median_over_200_launches(device: Device, stream: Stream, fake: Fake) -> None:
    """Each event of the stand-in is 1.5 ms after the one before it."""
    with Loaded(device, stream, add_one("add_one", X, 3, Y)) as loaded:
        assert median_time(device, stream, loaded.launch) == pytest.approx(0.0015, rel=1e-3)
    assert len(fake.calls("cuLaunchKernel")) == WARM + COUNT == 220


def test_times_make_a_table_and_a_document(device: Device) -> None:
    rows = [
        Row("MatchMerge", "batch 64", "float16", 20e-6, 150e-6, 40_000_000),
        Row("PoolTokens", "batch 1", "float16", 5e-6, None, 10_000),
    ]
    assert table(rows).splitlines() == [
        "| kernel | sizes | type | ours, µs | plain torch, µs | ratio | GB/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| MatchMerge | batch 64 | float16 | 20.0 | 150 | 7.5 | 2000 |",
        "| PoolTokens | batch 1 | float16 | 5.00 |  |  | 2 |",
    ]
    read = json.loads(document(device, rows))
    assert (read["device"], read["arch"], read["driver_cuda"]) == ("Fake 0", "sm_86", "13.2")
    assert [row["ours"] for row in read["rows"]] == [20e-6, 5e-6]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch has CUDA")
def test_plain_torch_is_not_timed_where_it_has_no_cuda() -> None:
    assert torch_time(torch.add, (X, X)) is None
