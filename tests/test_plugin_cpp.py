"""The C++ plugins, compiled against a stand-in for TensorRT, and driven as TensorRT drives them."""

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.backends import nvcc, plugin_cpp
from effopt.backends.nvcc import Ptx
from effopt.backends.onnx_plugins import plugins
from effopt.errors import UsageError
from effopt.plugin import FLOATS, Plugin, Port, results, running
from tests.plugin_host import (
    FLOAT32,
    GXX,
    INT32,
    INT64,
    STREAM,
    TYPES,
    Attached,
    Host,
    addresses,
    compiled,
    described,
)
from tests.plugin_runs import float_type
from tests.test_plugins import KERNELS, needs_nvcc


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this plugin has no function")


PROBE = Plugin(
    name="Probe",
    stem="probe",
    inputs=(
        Port("index", "int64", ("B", "K")),
        Port("x", "T", ("B", "N", "C")),
        Port("y", "T", ("N",)),
        Port("bias", "float32", ("K",)),
    ),
    outputs=(
        Port("made", "T", ("B", "N - r", "2 * cdiv(C, 3)")),
        Port("places", "int32", ("B // 2 + K", "7")),
    ),
    attributes={"r": int, "scale": float},
    scalars=("N", "r - 4", "bits(scale)", "(K + 3) // 2 - B"),
    grid=("cdiv(K * N, 4)", "B", "2"),
    block=64,
    shared="1024 * C",
    body=never,
    adapt=never,
)
"""Every form that an expression has, and a float type that is not that of the first input."""


def ptx(stem: str, arch: str) -> Ptx:
    """Write PTX of entries without bodies, longer than a literal that every compiler takes."""
    (plugin,) = [p for p in (PROBE, *plugins().values()) if p.stem == stem]
    kinds = [*[".u64"] * len(plugin.inputs), *[".u32"] * len(plugin.scalars)]
    kinds += [".u64"] * len(plugin.outputs)
    parameters = ",\n".join(f"\t.param {kind} param_{n}" for n, kind in enumerate(kinds))
    entries = [
        f".visible .entry {plugin.entry(kind)}(\n{parameters}\n)\n{{ ret; }}\n" for kind in FLOATS
    ]
    head = f".version {nvcc.PTX_VERSION}\n.target {arch}\n" + f'// {stem} "\\n\n' * 2000
    return Ptx(head + "".join(entries))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all plugins, and of one that is a table row alone."""
    folder = tmp_path_factory.mktemp("source")
    with pytest.MonkeyPatch.context() as patch:
        every = {PROBE.name: PROBE, **plugins()}
        patch.setattr(plugin_cpp, "plugins", lambda: every)
        plugin_cpp.write_source(folder, every, "sm_80", ptx)
    return folder


@pytest.fixture(scope="module")
def host(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    return compiled(source, tmp_path_factory.mktemp("built"))


# --- every plugin ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_a_plugin_launches_what_was_checked_on_the_host(
    host: Host, name: str, kind: torch.dtype
) -> None:
    kernel, seen = KERNELS[name], list[str]()
    assert kernel.plugin is not None

    def execute(plugin: Plugin, inputs: Any, attributes: Any) -> list[Tensor]:
        agree(host, plugin, inputs, attributes)
        seen.append(plugin.name)
        return [torch.zeros(sizes, dtype=of) for of, sizes in results(plugin, inputs, attributes)]

    with running(execute):
        for sample in kernel.samples():
            kernel.plugin.adapt(*(_cast(part, kind) for part in sample))
    assert seen


def _cast(part: Any, kind: torch.dtype) -> Any:
    real = isinstance(part, Tensor) and part.dtype in (torch.float32, torch.float16)
    return part.to(kind) if real else part


def agree(host: Host, plugin: Plugin, inputs: Sequence[Tensor], attributes: Any) -> None:
    """Hold one call in C++ to the record of its plugin."""
    made = host.make(plugin, attributes)
    assert made, host.said()
    attached, wanted = host.attached(made), results(plugin, inputs, attributes)
    given = [described(tensor.dtype, tensor.shape) for tensor in inputs]
    count, every = len(given), [*given, *(described(*result) for result in wanted)]
    assert attached.results(given) == [(TYPES[kind], sizes) for kind, sizes in wanted]
    assert all(attached.supports(at, every, count) for at in range(len(every)))
    assert attached.change(every, count) == 0, host.said()
    assert attached.enqueue(every, count) == 0, host.said()
    launch = plugin.launch(plugin.known([tensor.shape for tensor in inputs], attributes))
    last = attached.last()
    assert last.entry.decode() == plugin.entry(float_type(plugin, inputs))
    assert list(last.numbers) == [*launch.grid, launch.block, 1, 1, launch.shared]
    scalars = [scalar & 0xFFFFFFFF for scalar in launch.scalars]
    places = addresses(len(every))
    assert list(last.arguments[: last.count]) == [*places[:count], *scalars, *places[count:]]
    assert last.stream == STREAM
    assert host.host.host_image().decode() == ptx(plugin.stem, "sm_80").text
    attached.drop()
    host.host.host_drop(ctypes.c_void_p(made))
    assert host.host.host_alive() == 0


@pytest.mark.parametrize("name", KERNELS)
def test_a_creator_names_the_attributes_of_the_node(host: Host, name: str) -> None:
    plugin = plugins()[name]
    found = host.host.host_fields(name.encode()).contents
    made = {found.fields[at].name.decode(): found.fields[at].type for at in range(found.count)}
    kinds = {int: INT32, float: FLOAT32}
    assert made == {key: kinds[kind] for key, kind in plugin.attributes.items()}


def test_the_library_offers_every_plugin_and_nothing_else(host: Host) -> None:
    assert host.count == 1 + len(plugins())
    words = ["nm", "-D", "--defined-only", "--format=posix", host.library._name]
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    ours = {line.split()[0] for line in listed.splitlines()}
    ours = {name for name in ours if not name.startswith(("_Z", "_init", "_fini"))}
    assert ours == {"getCreators", "setLoggerFinder"}


# --- one that has all there is -------------------------------------------------------------------


@pytest.fixture
def probe(host: Host) -> Iterator[Attached]:
    made = host.make(PROBE, {"r": 3, "scale": 0.1})
    assert made is not None
    attached = host.attached(made)
    host.host.host_drop(ctypes.c_void_p(made))
    yield attached
    host.host.host_fail(b"")
    attached.drop()


def call(b: int = 4, n: int = 9, bias: int = 5, kind: torch.dtype = torch.float16) -> Any:
    sizes = ((b, 5), (b, n, 60), (9,), (bias,), (b, n - 3, 40), (b // 2 + 5, 7))
    kinds = (torch.int64, kind, kind, torch.float32, kind, torch.int32)
    return [described(of, size) for of, size in zip(kinds, sizes, strict=True)]


def test_expressions_attributes_and_much_shared_memory(host: Host) -> None:
    """60 KB of shared memory is more than a launch has without asking for it."""
    for b, n in ((4, 9), (2, 17)):
        inputs = [torch.zeros(b, 5, dtype=torch.int64), torch.zeros(b, n, 60), torch.zeros(n)]
        agree(host, PROBE, [*inputs, torch.zeros(5)], {"r": 3, "scale": -0.1})


@pytest.mark.parametrize("at", range(6))
def test_types_and_formats_that_a_kernel_does_not_read_are_refused(
    probe: Attached, at: int
) -> None:
    assert probe.supports(at, call(), 4)
    every = call()
    every[at].type = TYPES[torch.int8]
    assert not probe.supports(at, every, 4)
    every = call()
    every[at].format = 1
    assert not probe.supports(at, every, 4)


@pytest.mark.parametrize("at", [2, 4])
def test_one_node_has_one_float_type(probe: Attached, at: int) -> None:
    every = call()
    every[at].type = TYPES[torch.float32]
    assert not probe.supports(at, every, 4)


def test_sizes_of_one_name_must_agree(host: Host, probe: Attached) -> None:
    assert probe.change(call(), 4) == 0
    assert probe.change(call(bias=6), 4) == 1
    assert host.said() == "effopt::Probe: K is 5, but 6 in bias"


def test_a_tensor_of_another_rank_is_refused(host: Host, probe: Attached) -> None:
    every = call()
    every[1].rank = 2
    assert probe.results(every[:4]) == []
    assert host.said() == "effopt::Probe: x has 2 dimensions, not 3"
    assert probe.results(call()[:3]) == []
    assert host.said() == "effopt::Probe: it takes 4 inputs, not 3"


def test_nothing_is_launched_where_all_outputs_are_empty(host: Host, probe: Attached) -> None:
    before, every = host.host.host_launches(), call(b=0)
    every[5].sizes[0] = 0
    assert probe.enqueue(every, 4) == 0
    assert host.host.host_launches() == before


@pytest.mark.parametrize("step", ["cuLibraryLoadData", "cuLaunchKernel"])
def test_an_error_of_the_driver_is_logged_and_returned(
    host: Host, probe: Attached, step: str
) -> None:
    host.host.host_fail(step.encode())
    assert probe.enqueue(call(), 4) == 1
    words = {"cuLibraryLoadData": "loading the PTX", "cuLaunchKernel": "cuLaunchKernel"}
    assert host.said() == f"effopt::Probe: {words[step]} failed: CUDA_ERROR_INVALID_VALUE"
    host.host.host_fail(b"")
    assert probe.enqueue(call(), 4) == 0, "the next call may succeed"


def test_a_size_that_is_no_int32_is_refused(host: Host, probe: Attached) -> None:
    every = call()
    every[0].sizes[1] = every[3].sizes[0] = 1 << 33
    assert probe.enqueue(every, 4) == 1
    assert "is no int32" in host.said()


def test_plugins_of_one_kind_share_their_code(host: Host, probe: Attached) -> None:
    made = host.make(PROBE, {"r": 2, "scale": 1.0})
    assert made is not None
    other, before = host.attached(made), host.host.host_loads()
    assert probe.enqueue(call(), 4) == other.enqueue(call(kind=torch.float32), 4) == 0
    assert other.last().entry == b"probe_float32"
    assert host.host.host_loads() == before + 1
    assert host.host.host_alive() == 1
    other.drop()
    host.host.host_drop(ctypes.c_void_p(made))
    assert host.host.host_alive() == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([("r", INT32, ctypes.c_int32(3))], "the attribute scale is missing"),
        (
            [("r", FLOAT32, ctypes.c_float(3)), ("scale", FLOAT32, ctypes.c_float(1))],
            "the attribute r is no single integer",
        ),
        (
            [("r", INT64, ctypes.c_int64(1 << 40)), ("scale", FLOAT32, ctypes.c_float(1))],
            f"r of {1 << 40} is no int32",
        ),
        (
            [("r", INT64, ctypes.c_int64(3)), ("scale", INT64, ctypes.c_int64(1))],
            "the attribute scale is no single float32",
        ),
    ],
)
def test_attributes_that_are_not_the_nodes_are_refused(
    host: Host, fields: Any, reason: str
) -> None:
    assert host.make_of("Probe", fields) is None
    assert host.said() == f"effopt::Probe: {reason}"


def test_an_integer_may_come_as_int64(host: Host) -> None:
    fields = [("scale", FLOAT32, ctypes.c_float(1)), ("r", INT64, ctypes.c_int64(3))]
    made = host.make_of("Probe", fields)
    assert made is not None, host.said()
    host.host.host_drop(ctypes.c_void_p(made))


# --- the folder -----------------------------------------------------------------------------------


def test_the_folder_is_written_the_same_each_time(tmp_path: Path) -> None:
    names = list(plugins())
    one = plugin_cpp.write_source(tmp_path / "one", names, "sm_89", ptx)
    two = plugin_cpp.write_source(tmp_path / "two", reversed(names), "sm_89", ptx)
    assert one == two == sorted(path.name for path in (tmp_path / "one").iterdir())
    for name in one:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "sm_89" in (tmp_path / "one" / plugin_cpp.TABLE).read_text()


def test_literals_are_short_enough_for_every_compiler(source: Path) -> None:
    """MSVC takes 16,380 bytes."""
    for path in source.glob("*.inc"):
        pieces = re.findall(r'R"ptx\((.*?)\)ptx",\n', path.read_text(), re.DOTALL)
        assert len(pieces) > 1
        assert max(len(piece.encode()) for piece in pieces) <= 16380


def test_a_name_that_is_no_plugins_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no plugin 'Nothing'"):
        plugin_cpp.write_source(tmp_path, ["Nothing"], "sm_80", ptx)
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_tensorrt_gives_no_plugin_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = Plugin("Probe", "probe", (Port("x", "uint8", ("B",)),), (), never, never)
    monkeypatch.setattr(plugin_cpp, "plugins", lambda: {"Probe": odd})
    with pytest.raises(ValueError, match="x: a plugin of TensorRT has no tensors of uint8"):
        plugin_cpp.write_source(tmp_path, ["Probe"], "sm_80", ptx)


@needs_nvcc
def test_the_ptx_of_nvcc_goes_in_whole_and_no_path_with_it(tmp_path: Path) -> None:
    name = min(plugins())
    stem = plugins()[name].stem
    made = plugin_cpp.write_source(tmp_path, [name], "sm_80")
    text = (tmp_path / f"{stem}.ptx.inc").read_text()
    pieces = re.findall(r'R"ptx\((.*?)\)ptx",\n', text, re.DOTALL)
    assert "".join(pieces) == nvcc.compile_ptx(stem, "sm_80").text
    here = (str(Path.home()), str(plugin_cpp.SOURCE), str(tmp_path))
    for file in made:
        assert not any(path in (tmp_path / file).read_text() for path in here)


@pytest.mark.skipif(
    not {"TENSORRT_ROOT", "CUDA_HOME"} <= set(os.environ),
    reason="TENSORRT_ROOT and CUDA_HOME do not say where headers of TensorRT and CUDA are",
)
def test_the_source_compiles_against_the_headers_of_tensorrt(source: Path) -> None:
    folders = [f"{os.environ[root]}/include" for root in ("TENSORRT_ROOT", "CUDA_HOME")]
    given = [word for folder in folders for word in ("-isystem", folder)]
    files = map(str, sorted(source.glob("*.cpp")))
    subprocess.run([*GXX, "-fsyntax-only", *given, *files], check=True)
