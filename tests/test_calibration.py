"""Calibration data: what is taken, what is refused and in which words, and what is gathered."""

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import Node
from torch.utils.data import DataLoader

import effopt
import effopt.save
from effopt import spool, statistics
from effopt.__main__ import main
from effopt.calibration import Calibration, calibration_file, read_calibration
from effopt.capture import capture
from effopt.collectors import ChannelExtremes, Collector, Gram, Histogram, MeanAbs, Rows
from effopt.errors import EffoptError, PreconditionError, UnsafeFileError, UsageError
from effopt.pipeline import Outcome, Pass
from effopt.program import Program, shape
from effopt.statistics import NO_MASK, NO_TOKENS, Real, Seen, find_real, gather
from tests import programs, zoo

Batch = dict[str, Tensor]


class Pair(nn.Module):
    """Two inputs of one batch, a scale for all samples, and a mode that the graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 3)

    def forward(self, x: Tensor, ids: Tensor, scale: Tensor, mode: str = "sum") -> Tensor:
        found: Tensor = self.up(x) * scale + ids.sum(1, keepdim=True)
        return found if mode == "sum" else found.exp()


def batch(rows: int = 2, **changes: Tensor) -> Batch:
    made = {"x": torch.randn(rows, 4), "ids": torch.ones(rows, 5).long(), "scale": torch.ones(3)}
    return {**made, **changes}


@pytest.fixture(scope="module")
def pair() -> Program:
    return capture(Pair(), batch())


def numbered(*sizes: int) -> list[Batch]:
    """Make batches whose x counts the samples."""
    starts = np.cumsum([0, *sizes])
    rows = [torch.arange(4.0 * a, 4.0 * b).reshape(-1, 4) for a, b in pairwise(starts)]
    return [batch(len(x), x=x) for x in rows]


def samples_of(data: Calibration) -> Tensor:
    return torch.cat([x for x, _, _ in data])


# --- streams that are taken -------------------------------------------------------------------


class Set(torch.utils.data.Dataset[Batch]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < 7:
            raise IndexError
        return {key: value[0] for key, value in numbered(*[1] * 7)[index].items()}


def test_a_list_and_a_generator_give_the_same_twice(pair: Program) -> None:
    batches = numbered(2, 3, 1)
    for given in (batches, iter(batches), (b for b in batches), tuple(batches)):
        data = read_calibration(given, pair)
        assert (data.samples, data.batches) == (6, 3)
        for _ in range(2):
            assert torch.equal(samples_of(data), torch.arange(24.0).reshape(6, 4))
        assert [x.shape[0] for x, _, _ in data] == [2, 3, 1]


def test_a_data_loader_is_read_again() -> None:
    program = capture(zoo.make("encoder")[0], torch.randn(2, 12, 32))
    loader = DataLoader(torch.arange(7 * 12 * 32.0).reshape(7, 12, 32), batch_size=3)  # type: ignore[arg-type]
    data = read_calibration(loader, program)
    with pytest.raises(UsageError, match="do not nest"):
        read_calibration([{"x": torch.randn(2, 12, 32)}], program)  # by position at capture
    assert (data.samples, data.batches) == (7, 3)
    assert len([*data]) == len([*data]) == 3


def test_every_nesting_of_the_example_inputs() -> None:
    one = batch()
    x, *rest = one.values()
    kwargs = {key: one[key] for key in ("ids", "scale")}
    for example in ((x, *rest), one, ((x,), kwargs)):
        (found,) = read_calibration([example], capture(Pair(), example))
        assert all(map(torch.equal, found, one.values()))


def test_a_value_that_the_graph_holds_may_be_given(pair: Program) -> None:
    held = capture(Pair(), {**batch(), "mode": "sum"})
    assert read_calibration([{**batch(), "mode": "sum"}], held).samples == 2
    with pytest.raises(UsageError, match="batch 0: mode was 'sum' at capture"):
        read_calibration([{**batch(), "mode": "max"}], held)


def test_a_generator_is_never_all_in_memory(pair: Program, monkeypatch: Any) -> None:
    """By construction: it is asked for one batch at a time, and only places are remembered."""
    asked: list[int] = []

    def batches() -> Iterator[Batch]:
        for number in range(5):
            asked.append(number)
            yield batch(x=torch.full((2, 4), float(number)))

    kept = spool.Spool(batches())
    for number, item in enumerate(kept):
        assert asked == [*range(number + 1)]
        assert isinstance(item, dict)
        assert torch.equal(item["x"], torch.full((2, 4), float(number)))
    held = [leaf for leaves, _ in kept._items for leaf in leaves]
    assert not any(isinstance(leaf, Tensor) for leaf in held)
    assert [item["x"][0, 0].item() for item in kept] == [*range(5)]  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int8, torch.complex64])
def test_a_spool_keeps_every_type_and_shape(dtype: torch.dtype) -> None:
    table = torch.randn(3, 4).mul(3).to(dtype).T  # its rows are not in order
    given = [table, torch.ones((), dtype=dtype), torch.zeros(0, 2, dtype=dtype), "text", None]
    kept = spool.Spool(iter([given]))
    for found in (*kept, *kept):
        assert isinstance(found, list)
        assert found[3:] == ["text", None]
        for got, want in zip(found[:3], given, strict=False):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


def test_a_full_disk_is_told(pair: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(EffoptError, match=r"No space left on device\n  remedy: set TMPDIR"):
        read_calibration(iter([batch()]), pair)


def test_forks_share_it_and_the_program_does_not_print_it(pair: Program) -> None:
    program = pair.fork()
    program.calibration = read_calibration([batch()], program)
    assert program.fork().calibration is program.calibration
    assert pair.calibration is None
    assert "alibration" not in repr(program)


# --- streams that are refused -----------------------------------------------------------------

WRONG: dict[str, tuple[Any, str, str]] = {
    "nesting": (
        (torch.randn(2, 4),),
        "the inputs do not nest as at capture (inputs: x, ids, scale)",
        "pass the same positional and keyword arguments",
    ),
    "no tensors": (
        {"x": np.zeros((2, 4)), "ids": [1]},
        "it holds no tensor (int, ndarray)",
        "pass a tensor, a tuple",
    ),
    "an array": (
        batch(x=np.zeros((2, 4), np.float32)),  # type: ignore[arg-type]
        "input 'x' is a ndarray",
        "pass a tensor",
    ),
    "a type": (
        batch(x=torch.randn(2, 4).double()),
        "input 'x' is float64, the model takes float32",
        ".to(torch.float32)",
    ),
    "a rank": (
        batch(x=torch.randn(2, 1, 4)),
        "input 'x' is [2, 1, 4], the model takes [batch, 4]",
        "whole batches",
    ),
    "a fixed size": (
        batch(ids=torch.ones(2, 6).long()),
        "input 'ids' is [2, 6], the model takes [batch, 5]",
        "whole batches",
    ),
    "a free size": (
        batch(ids=torch.ones(3, 5).long()),
        "batch is 3 in input 'ids' and 2 in 'x'",
        "the same batch",
    ),
    "NaN": (batch(x=torch.full((2, 4), torch.nan)), "input 'x' holds NaN", "leave such samples"),
    "infinity": (
        batch(scale=torch.full((3,), -torch.inf)),
        "input 'scale' holds infinity",
        "torch.finfo(dtype).min",
    ),
    "no samples": (batch(0), "it has no samples", "leave empty batches out"),
    "a device": (
        batch(ids=torch.ones(2, 5, device="meta").long()),
        "input 'ids' is on meta, the model on cpu",
        ".to('cpu')",
    ),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("wrap", [list, iter])
def test_a_wrong_batch_is_refused(pair: Program, what: str, wrap: Callable[..., Any]) -> None:
    given, reason, remedy = WRONG[what]
    with pytest.raises(UsageError) as caught:
        read_calibration(wrap([batch(), given]), pair)
    assert caught.value.reason == f"calibration batch 1: {reason}"
    assert remedy in caught.value.remedy


def test_a_length_out_of_range_is_refused() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(100, 4), nn.Parameter(torch.randn(16, 4))

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return (self.words(ids) + self.places[: ids.shape[1]]) * mask[..., None]

    def texts(length: int, other: int) -> Batch:
        return {"ids": torch.ones(2, length).long(), "mask": torch.ones(2, other)}

    program = capture(Text(), texts(5, 5), dynamic=("batch", "length"))
    assert read_calibration([texts(5, 5), texts(16, 16)], program).samples == 4
    with pytest.raises(
        UsageError, match=r"batch 0: length of input 'ids' is 17, not from \d to 16"
    ):
        read_calibration([texts(17, 17)], program)
    with pytest.raises(UsageError, match=r"batch 0: length is 9 in input 'mask' and 10 in 'ids'"):
        read_calibration([texts(10, 9)], program)


@pytest.mark.parametrize("given", [5, torch.randn(2, 4), batch()])
def test_what_is_no_stream_is_refused(pair: Program, given: Any) -> None:
    with pytest.raises(UsageError, match=r"is a (int|Tensor|dict), not a stream(.|\n)*\[batch\]"):
        read_calibration(given, pair)


def test_too_few_samples_are_refused(pair: Program) -> None:
    with pytest.raises(UsageError, match=r"\(given in Python\) has 3 samples, at least 8 are need"):
        read_calibration(numbered(2, 1), pair, least=8)
    with pytest.raises(UsageError, match="has 0 samples, at least 1"):
        read_calibration([], pair)
    data = read_calibration(numbered(2, 1), pair, least=3)
    with pytest.raises(UsageError, match="at least 4 are needed\n  remedy: give 1 more"):
        data.require(4)


def test_a_stream_that_ends_early_the_second_time_is_told(pair: Program) -> None:
    class Once:
        def __init__(self) -> None:
            self.source = iter(numbered(2, 2))

        def __iter__(self) -> Iterator[Batch]:
            return self.source

    data = read_calibration(Once(), pair)
    with pytest.raises(UsageError, match="gave 2 batches at first and 0 now"):
        list(data)


# --- files ------------------------------------------------------------------------------------


def arrays(rows: int = 19) -> dict[str, Tensor]:
    (made,) = numbered(rows)
    return {**made, "ids": torch.arange(rows * 5).reshape(rows, 5)}


def saved(path: Path, tensors: dict[str, Any]) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
        return path
    save = np.savez_compressed if "packed" in path.name else np.savez
    save(path, **{key: np.asarray(item) for key, item in tensors.items()})
    return path


FILES = ("data.npz", "packed.npz", "data.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_cut_into_batches(pair: Program, tmp_path: Path, name: str) -> None:
    given = arrays()
    data = calibration_file(saved(tmp_path / name, given), pair)
    assert data.describe() == f"calibration: 19 samples, from {name}"
    batches = list(data)
    assert [x.shape[0] for x, _, _ in batches] == [8, 8, 3]
    assert torch.equal(samples_of(data), given["x"])
    assert torch.equal(torch.cat([ids for _, ids, _ in data]), given["ids"])
    assert all(torch.equal(scale, given["scale"]) for _, _, scale in data)
    assert pair.run(batches[2])[0].shape == (3, 3)


def test_a_file_of_a_model_with_a_fixed_batch_and_a_mode(tmp_path: Path) -> None:
    program = capture(Pair(), {**batch(), "mode": "exp"}, dynamic=())
    data = calibration_file(saved(tmp_path / "data.npz", arrays(6)), program)
    assert [x.shape[0] for x, _, _ in data] == [2, 2, 2]
    with pytest.raises(UsageError, match="has 7 samples, and the model takes batches of 2"):
        calibration_file(saved(tmp_path / "odd.npz", arrays(7)), program)


def test_bfloat16_is_read_from_safetensors(tmp_path: Path) -> None:
    program = capture(nn.Linear(4, 3).bfloat16(), torch.ones(2, 4).bfloat16())
    given = torch.randn(3, 4).bfloat16()
    ((found,),) = calibration_file(saved(tmp_path / "x.safetensors", {"input": given}), program)
    assert torch.equal(found, given)


def without(name: str) -> dict[str, Tensor]:
    return {key: item for key, item in arrays().items() if key != name}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing": (without("ids"), "lacks 'ids'\n  remedy: the inputs are x, ids, scale"),
    "extra": ({**arrays(), "label": torch.ones(19)}, "has 'label', which is no input"),
    "type": (
        {**arrays(), "x": arrays()["x"].double()},
        "'x' in PATH is float64, the model takes float32\n  remedy: save it as float32",
    ),
    "rank": ({**arrays(), "x": torch.ones(19)}, "input 'x' is [19], the model takes [samples, 4]"),
    "size": ({**arrays(), "scale": torch.ones(2)}, "input 'scale' is [2], the model takes [3]"),
    "counts": (
        {**arrays(), "ids": torch.ones(18, 5).long()},
        "differ in their samples: 'x' has 19, 'ids' has 18",
    ),
    "empty": (arrays(0), "(from NAME) has 0 samples, at least 1 are needed"),
    "NaN": (
        {**arrays(), "x": torch.full((19, 4), torch.nan)},
        "calibration batch 0: input 'x' holds NaN",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("name", ["data.npz", "data.safetensors"])
def test_a_wrong_file_is_refused(pair: Program, tmp_path: Path, what: str, name: str) -> None:
    given, message = REFUSED[what]
    path = saved(tmp_path / name, given)
    with pytest.raises(UsageError) as caught:
        calibration_file(path, pair)
    wanted = message.replace("PATH", str(path)).replace("NAME", name)
    assert wanted in str(caught.value)


class Evil:
    """Leaves a mark when it is unpickled."""

    mark = Path()

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (Evil.mark,))


def test_pickled_objects_are_refused_and_not_loaded(pair: Program, tmp_path: Path) -> None:
    Evil.mark = tmp_path / "mark"
    objects = np.array([Evil()], dtype=object)
    np.savez(tmp_path / "evil.npz", **{**arrays(), "x": objects}, allow_pickle=True)
    with pytest.raises(UnsafeFileError, match=r"'x' in .* holds pickled Python objects"):
        calibration_file(tmp_path / "evil.npz", pair)
    assert not Evil.mark.exists()


def header(length: int, **records: Any) -> bytes:
    data = json.dumps(records).encode()
    return struct.pack("<Q", len(data) if length < 0 else length) + data


def npy(shape_: str, descr: str = "'<f4'", order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape_}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def zipped(data: bytes, name: str = "x.npy", **options: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr(name, data)
    return file.getvalue()


def record(dtype: Any = "F32", shape_: Any = (2, 4), offsets: Any = (0, 32)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape_, "data_offsets": offsets}}


HOSTILE: dict[str, tuple[str, bytes, str]] = {
    "no zip": (".npz", b"PK no zip", "is damaged: File is not a zip"),
    "claims": (".npz", zipped(npy("(1099511627776, 4)")), "'x' of float32 .* is not all there"),
    "no header": (".npz", zipped(b"x" * 40), "something else than a plain array"),
    "records": (".npz", zipped(npy("(2,)", "[('a', '<f4')]")), "something else than a plain"),
    "no array": (".npz", zipped(npy("(0, 4)"), "../x"), "is no array"),
    "bomb": (
        ".npz",
        zipped(npy("(4194304,)") + bytes(1 << 24), compression=zipfile.ZIP_DEFLATED),
        "unpacks to .* more than 100 times its size",
    ),
    "packed oddly": (".npz", zipped(npy("(0, 4)"), compression=zipfile.ZIP_BZIP2), "unknown way"),
    "short": (".safetensors", b"x", "its header has .* bytes"),
    "long header": (".safetensors", header(1 << 40) + bytes(64), "its header has 1099511627776 b"),
    "no JSON": (
        ".safetensors",
        struct.pack("<Q", 4) + b"oops" + bytes(64),
        "is damaged: Expecting",
    ),
    "deep": (".safetensors", struct.pack("<Q", 90000) + b"[" * 90000, "nests too deeply"),
    "a list": (".safetensors", struct.pack("<Q", 2) + b"[]", "no JSON object"),
    "outside": (
        ".safetensors",
        header(-1, **record(offsets=(1 << 40, (1 << 40) + 32))) + bytes(32),
        "is not all there",
    ),
    "negative": (
        ".safetensors",
        header(-1, **record(shape_=(-2, -4))) + bytes(32),
        "not all there",
    ),
    "mismatch": (".safetensors", header(-1, **record(shape_=(3, 4))) + bytes(32), "not all there"),
    "words": (
        ".safetensors",
        header(-1, **record(offsets="ab")) + bytes(32),
        "the record of 'x' is",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_damaged_or_hostile_file_is_refused(pair: Program, tmp_path: Path, what: str) -> None:
    suffix, data, message = HOSTILE[what]
    path = tmp_path / f"data{suffix}"
    path.write_bytes(data)
    with pytest.raises(UnsafeFileError, match=message):
        calibration_file(path, pair)


USAGE: dict[str, tuple[str, bytes | None, str]] = {
    "absent": (".npz", None, "there is no file"),
    "kind": (".pkl", b"x", "neither .npz nor .safetensors"),
    "columns": (".npz", zipped(npy("(2, 4)", order="True") + bytes(32)), "in column order"),
    "type": (".npz", zipped(npy("(2,)", "'<U4'") + bytes(32)), "is of type '<U4'"),
    "big-endian": (".npz", zipped(npy("(2,)", "'>f4'") + bytes(8)), "is of type '>f4'"),
    "float8": (".safetensors", header(-1, **record("F8_E4M3")) + bytes(32), "of type 'F8_E4M3'"),
}


@pytest.mark.parametrize("what", USAGE)
def test_a_file_of_another_kind_is_refused(pair: Program, tmp_path: Path, what: str) -> None:
    suffix, data, message = USAGE[what]
    path = tmp_path / f"data{suffix}"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UsageError, match=message):
        calibration_file(path, pair)


def test_a_file_that_shrinks_meanwhile_is_told(pair: Program, tmp_path: Path) -> None:
    path = saved(tmp_path / "data.safetensors", arrays())
    data = calibration_file(path, pair)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UnsafeFileError, match="ends within an array"):
        list(data)


# --- optimize and the command line ------------------------------------------------------------


def reader() -> tuple[Pass, list[Any]]:
    """Make a pass that looks at the calibration data, and the list of what it saw."""
    seen: list[Any] = []

    @dataclass(frozen=True)
    class Reader:
        name: ClassVar[str] = "reader"
        exact: ClassVar[bool] = True

        def check(self, program: Program) -> list[PreconditionError]:
            return []

        def run(self, program: Program) -> Outcome:
            seen.append(program.calibration)
            return Outcome(False)

    return Reader(), seen


def test_optimize_hands_it_to_passes_and_reports_it(tmp_path: Path) -> None:
    step, seen = reader()
    done = effopt.optimize(Pair(), batch(), recipe=[step], calibration=iter(numbered(2, 3)))
    assert [data.samples for data in seen] == [5]
    assert "calibration: 5 samples, given in Python" in done.report.notes
    path = saved(tmp_path / "data.npz", arrays())
    done = effopt.optimize(Pair(), batch(), recipe=[step], calibration=path)
    assert "calibration: 19 samples, from data.npz" in done.report.text()
    assert "calibration data" in [stage.name for stage in done.report.stages]
    plain = effopt.optimize(Pair(), batch(), recipe=[step])
    assert seen[-1] is None
    assert not [note for note in plain.report.notes if "calibration" in note]


def test_optimize_refuses_bad_data_before_the_passes() -> None:
    step, seen = reader()
    with pytest.raises(UsageError, match="calibration batch 0"):
        effopt.optimize(Pair(), batch(), recipe=[step], calibration=[torch.ones(2, 4)])
    assert not seen


SHOP = """
import torch
def make():
    return torch.nn.Linear(3, 2), torch.ones(2, 3)
"""


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> list[str]:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    (folder / "calibration_shop.py").write_text(SHOP)
    return ["convert", "calibration_shop:make", "-o", "out", "--recipe", "exact", "--json", *words]


def test_convert_takes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(effopt.save, "BUDGET", 0.1)
    saved(tmp_path / "data.npz", {"input": torch.ones(9, 3)})
    words = command(monkeypatch, tmp_path, "--calibration", "data.npz", "--target", "onnx")
    assert main(words) == 0
    notes = json.loads(capsys.readouterr().out)["report"]["notes"]
    assert "calibration: 9 samples, from data.npz" in notes


@pytest.mark.parametrize(
    ("name", "given", "code", "message"),
    [
        ("absent.npz", None, 2, "there is no file absent.npz"),
        ("data.pkl", b"x", 2, "data.pkl is neither .npz nor .safetensors"),
        ("data.npz", b"x", 7, "data.npz is damaged"),
        ("evil.npz", zipped(npy("(1,)", "'|O'") + bytes(9)), 7, "holds pickled Python objects"),
        ("data.npz", {"input": torch.ones(9, 4)}, 2, "[9, 4], the model takes [samples, 3]"),
        ("data.npz", {"inputs": torch.ones(9, 3)}, 2, "data.npz lacks 'input'"),
    ],
)
def test_convert_refuses_a_wrong_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    given: Any,
    code: int,
    message: str,
) -> None:
    if isinstance(given, bytes):
        (tmp_path / name).write_bytes(given)
    elif given:
        saved(tmp_path / name, given)
    found = main(command(monkeypatch, tmp_path, "--calibration", name))
    error = json.loads(capsys.readouterr().out)["error"]
    assert (found, error["exit_code"]) == (code, code)
    assert message in error["reason"]
    assert error["remedy"]
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "no.such:model", "-o", "out", "--calibration", "absent.npz"]) == 2
    assert "there is no file absent.npz" in capsys.readouterr().err


# --- statistics of a running program ----------------------------------------------------------


def calibrated(name: str, *batches: Batch) -> Program:
    program = programs.normal(name).fork()
    program.calibration = read_calibration(batches, program)
    return program


def linear_inputs(program: Program) -> list[Node]:
    linear = torch.ops.aten.linear.default
    found = [n.args[0] for n in program.nodes() if n.target is linear]
    return [node for node in dict.fromkeys(found) if isinstance(node, Node)]


def hooked(model: nn.Module, given: Batch) -> list[np.ndarray[Any, Any]]:
    """Run the model itself; return what each of its linear layers reads, once for each value."""
    seen: dict[int, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.setdefault(id(args[0]), args[0]))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    return [values.double().numpy() for values in seen.values()]


def test_statistics_are_those_of_the_model_without_padding() -> None:
    """BERT, one padded batch: what each linear layer reads, against hooks on the model itself."""
    given = programs.draw("bert", 3)
    program = calibrated("bert", given)
    nodes = linear_inputs(program)
    wanted: dict[Node, list[Any]] = {
        node: [MeanAbs(), ChannelExtremes(), Gram(), Histogram()] for node in nodes
    }
    notes = gather(program, wanted)
    real = given["attention_mask"].bool().numpy()
    reference = hooked(programs.made("bert")[0], given)
    assert len(reference) == len(nodes) == 3 * 4 + 2  # each block; the pooler, the classifier
    for node, values in zip(nodes, reference, strict=True):
        tokens = values[real] if values.ndim == 3 and values.shape[1] == 16 else values
        rows = tokens.reshape(-1, values.shape[-1])
        mean, extremes, gram, histogram = wanted[node]
        # The two graphs round differently, about 1e-6 of activations that are near 1.
        assert np.allclose(mean.mean, np.abs(rows).mean(0), rtol=1e-4, atol=1e-5)
        assert np.allclose(extremes.max_abs, np.abs(rows).max(0), rtol=1e-4, atol=1e-5)
        assert np.allclose(gram.total, rows.T @ rows, rtol=1e-4, atol=1e-3)
        assert histogram.extremes.count == rows.size
        padded = values.ndim == 3 and values.shape[1] == 16
        dropped = int((~real).sum()) if padded else 0
        how = "excluded" if padded else NO_TOKENS
        assert notes[node] == Seen(3, len(rows), dropped, how)


def test_batches_and_subsets_do_not_change_what_is_gathered() -> None:
    given = programs.draw("bert", 4)
    parts = [{key: x[low:high] for key, x in given.items()} for low, high in ((0, 1), (1, 4))]
    whole, split = calibrated("bert", given), calibrated("bert", *parts)
    kept: list[list[Rows]] = []
    for program, one_by_one in ((whole, False), (split, False), (split, True)):
        wanted: dict[Node, list[Rows]] = {n: [Rows(limit=20)] for n in linear_inputs(program)}
        groups = [{node: found} for node, found in wanted.items()] if one_by_one else [wanted]
        for group in groups:
            assert all(seen.samples == 4 for seen in gather(program, group).values())
        kept.append([rows for (rows,) in wanted.values()])
    for one, two, three in zip(*kept, strict=True):
        assert np.array_equal(one.lots, two.lots)
        first, second, third = (np.asarray(rows.kept) for rows in (one, two, three))
        assert np.allclose(first, second, rtol=1e-4, atol=1e-5)  # products of other sizes round
        assert np.array_equal(second, third)


def test_only_what_is_wanted_runs_and_values_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's input needs a part of the graph, and few of its values at a time."""
    program = calibrated("bert", programs.draw("bert", 2))
    first, last = linear_inputs(program)[0], linear_inputs(program)[-1]
    ran: list[Node] = []
    most = 0
    compute = statistics._compute

    def counting(owner: Program, node: Node, values: dict[Node, Any]) -> Any:
        nonlocal most
        ran.append(node)
        most = max(most, sum(held.op != "get_attr" for held in values))
        return compute(owner, node, values)

    monkeypatch.setattr(statistics, "_compute", counting)
    gather(program, {first: [MeanAbs()]})
    early = len(ran)
    gather(program, {last: [MeanAbs()]})
    assert early < 0.2 * (len(ran) - early)
    assert most <= 12


def test_a_mask_of_the_other_sense_and_given_rows() -> None:
    """`encoder_padded` masks where it pads; rows may also be given by hand, or kept all."""
    given = programs.draw("encoder_padded", 3)
    program = calibrated("encoder_padded", given)
    node = linear_inputs(program)[0]
    count = int((~given["padding"]).sum())
    assert count < 36
    (seen,) = gather(program, {node: [MeanAbs()]}).values()
    assert (seen.rows, seen.dropped, seen.padding) == (count, 36 - count, "excluded")
    (seen,) = gather(program, {node: [MeanAbs()]}, {node: "as asked"}).values()
    assert seen == Seen(3, 36, 0, "as asked")
    mask = next(n for n in program.inputs() if n.name == "padding")
    (seen,) = gather(program, {node: [MeanAbs()]}, {node: Real(mask, (1, 0))}).values()
    assert (seen.rows, seen.dropped) == (36 - count, count)


def test_padding_is_found_in_every_layout() -> None:
    """Heads [B, H, N, d] and the flat [B * N, C] hold the same real tokens as [B, N, C]."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            b, n, c = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
            bias = mask[:, None, None, :].bool()
            y = nn.functional.scaled_dot_product_attention(*qkv.unbind(0), bias)
            flat = y.transpose(1, 2).reshape(b * n, c)
            return (x + self.out(flat).reshape(b, n, c))[:, 0]

    given = {
        "x": torch.randn(3, 6, 8),
        "mask": torch.arange(6)[None] < torch.tensor([[6], [2], [3]]),
    }
    program = programs.apply(capture(Flat(), given), programs.NORMAL)[0]
    program.calibration = read_calibration([given], program)
    call = next(n for n in program.nodes() if "scaled_dot" in str(n.target))
    flat = linear_inputs(program)[1]
    assert (len(shape(call)), len(shape(flat))) in {(4, 2), (4, 3)}
    collected: dict[Node, list[Collector]] = {call: [MeanAbs()], flat: [MeanAbs()]}
    notes = gather(program, collected)
    assert notes[flat] == Seen(3, 11, 7, "excluded")
    assert notes[call] == Seen(3, 22, 14, "excluded")


def test_what_has_no_padding_says_so() -> None:
    program = programs.normal("vit")
    notes = {str(find_real(program, node)) for node in linear_inputs(program)}
    assert notes == {NO_MASK, NO_TOKENS}


def test_merged_tokens_are_not_told_from_padding() -> None:
    program = programs.reduced("bert", "merge-tokens{r=2}")[0]
    found = [find_real(program, node) for node in linear_inputs(program)]
    assert any("were merged before" in note for note in found if isinstance(note, str))


def test_statistics_without_data_and_of_no_tensor_are_refused() -> None:
    program = programs.normal("bert")
    node = linear_inputs(program)[0]
    with pytest.raises(UsageError, match=r"no calibration data(.|\n)*--calibration FILE"):
        gather(program, {node: [MeanAbs()]})
    ready = calibrated("bert", programs.draw("bert", 2))
    ids = next(n for n in ready.inputs() if n.name == "input_ids")
    with pytest.raises(PreconditionError, match=r"input_ids .*no floating tensor"):
        gather(ready, {ids: [MeanAbs()]})


def test_values_that_are_not_finite_name_the_node_and_the_batch() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.up(x.sqrt())
            return found

    program = capture(Root(), torch.ones(2, 4))
    program.calibration = read_calibration([torch.ones(2, 4), -torch.ones(2, 4)], program)
    (node,) = linear_inputs(program)
    with pytest.raises(PreconditionError, match=r"sqrt .*NaN or infinity in calibration batch 1"):
        gather(program, {node: [MeanAbs()]})
