"""Calibration data as a stream: what is taken, what is refused and in which words."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import effopt
from effopt import spool
from effopt.calibration import read_calibration
from effopt.capture import capture
from effopt.errors import EffoptError, PreconditionError, UsageError
from effopt.pipeline import Outcome, Pass
from effopt.program import Program
from tests import zoo
from tests.calibration_data import Batch, Pair, arrays, batch, numbered, samples_of, saved


@pytest.fixture(scope="module")
def pair() -> Program:
    return capture(Pair(), batch())


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


# --- labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        np.array([3, 0, 2, 1, 9], np.uint8),
        np.array([3, 0, 2, 1, 9], np.int64),
        torch.tensor([3, 0, 2, 1, 9], dtype=torch.int32),
    ],
)
@pytest.mark.parametrize("wrap", [list, iter])
def test_labels_are_whole_numbers_in_the_order_of_the_stream(
    pair: Program, labels: Any, wrap: Callable[..., Any]
) -> None:
    data = read_calibration(wrap(numbered(2, 3)), pair, labels=labels)
    assert data.labels is not None
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == [3, 0, 2, 1, 9]
    assert data.describe() == "calibration: 5 samples with labels, given in Python"
    assert read_calibration(numbered(2, 3), pair).labels is None


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.zeros(4, np.int64), "there are 4 labels for 5 samples"),
        (np.zeros(5), "the labels are float64, not whole numbers"),
        (torch.zeros(5).bfloat16(), "the labels are bfloat16, not whole numbers"),
        (np.zeros(5, np.bool_), "the labels are bool, not whole numbers"),
        (np.array(["a"] * 5, object), "the labels are object, not whole numbers"),
        (torch.zeros(5, 1).long(), "the labels are [5, 1], not one number for each sample"),
        (np.int64(5), "the labels are [], not one number for each sample"),
        ([0, 1, 2, 0, 1], "the labels are a list, not an array"),
        ("labels.npy", "the labels are a str, not an array"),
    ],
)
def test_labels_that_do_not_fit_are_refused(pair: Program, labels: Any, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_calibration(numbered(2, 3), pair, labels=labels)
    assert caught.value.reason == reason
    assert caught.value.remedy


# --- optimize ---------------------------------------------------------------------------------


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


def test_optimize_hands_labels_to_passes() -> None:
    step, seen = reader()
    labels, batches = np.arange(5), numbered(2, 3)
    effopt.optimize(Pair(), batch(), recipe=[step], calibration=batches, labels=labels)
    assert seen[0].labels.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="there are labels, and no calibration data"):
        effopt.optimize(Pair(), batch(), recipe=[step], labels=labels)


def test_optimize_refuses_bad_data_before_the_passes() -> None:
    step, seen = reader()
    with pytest.raises(UsageError, match="calibration batch 0"):
        effopt.optimize(Pair(), batch(), recipe=[step], calibration=[torch.ones(2, 4)])
    assert not seen
