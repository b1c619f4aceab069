"""The benchmark of integer engines: what it compares, how it reads, what it writes."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from effopt.measure import Cosine, median_interval
from effopt.report import Latency
from examples import integers
from examples.integer_models import CASES, ROWS, Case, add_outliers

NAMES = [
    "fp32",
    "quantize_dynamic per tensor",
    "quantize_dynamic per channel",
    "int8-dynamic",
    "int8-dynamic activations=row",
    "int4-rtn",
]


class Block(nn.Module):
    """x + W norm(x), the smallest thing with a norm that feeds a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(128), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


class Model(nn.Module):
    """Three blocks: effopt quantizes two of the layers, as the last is a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.norm = nn.LayerNorm(128)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"features": self.norm(x)}


def case() -> tuple[nn.Module, dict[str, Tensor]]:
    model = Model().eval()
    add_outliers(model)
    return model, {"x": torch.randn(2 * ROWS, 4, 128)}


@pytest.fixture(scope="module")
def result() -> integers.Result:
    """One run for all tests, as making the engines takes most of the time."""
    stages = list[str]()
    tiny = Case("tiny", lambda small: case(), "features")
    (found,) = integers.bench(tiny, (1,), 0.05, stages.append, small=True)
    assert len([stage for stage in stages if "quantize" in stage]) == 6
    assert stages[-1] == "time with 1 threads"
    return found


def test_every_engine_is_timed_against_fp32_and_compared_with_it(result: integers.Result) -> None:
    rows = json.loads(json.dumps(result.document()))["rows"]
    assert [row["name"] for row in rows] == NAMES
    for row in rows:
        assert [one["batch"] for one in row["latency"]] == list(integers.BATCHES)
        assert {one["threads"] for one in row["latency"]} == {1}
        assert {one["baseline"] for one in row["latency"]} == {"fp32" if row is not rows[0] else ""}
        assert [one["rows"] for one in row["cosine"]] == [ROWS, ROWS]
        assert row["size"] == pytest.approx(row["bytes"] / rows[0]["bytes"])
    for row in rows[1:]:
        assert row["size"] < 0.75
        for one in row["latency"]:
            assert 0 < one["speedup_low"] <= one["speedup"] <= one["speedup_high"]


def test_engines_give_what_their_scheme_leaves_of_the_output(result: integers.Result) -> None:
    """By scheme: fp32 is itself; eight bits lose less than four, which still point one way."""
    least = {line.document()["name"]: min(one.min for one in line.cosine) for line in result.lines}
    assert least["fp32"] == 1.0
    assert 0.9 < least["int4-rtn"] < least["int8-dynamic"] < 1.0
    assert least["int8-dynamic activations=row"] > least["quantize_dynamic per tensor"] > 0.9


def test_the_table_reads_well_at_80_columns(result: integers.Result) -> None:
    text = result.text()
    assert max(map(len, text.splitlines())) <= 80
    for word in (
        "tiny (tiny)",
        "1 thread,",
        "batch 1",
        "batch 8",
        "per channel",
        "activations=row",
    ):
        assert word in text
    assert text.count("x ") >= 10, "ten speed-ups, each with its cosine behind it"
    assert "…" not in text


def test_a_wide_table_fits_too() -> None:
    slow = Latency(
        "int8-dynamic activations=row", 8, *[12345.6] * 5, 9, 2, 1, 10.25, 9.99, 10.75, "x",
        min_ms=11111.1, speedup_min=10.31,
    )  # fmt: skip
    line = integers.Line(
        "int8-dynamic\nactivations=row",
        354_000_000,
        0.264,
        (slow, slow),
        (Cosine(0.99, 0.98765, 16), Cosine(0.99, -0.5, 16)),
    )
    text = integers.Result("ViT-B/16", 2, (line,)).text()
    assert max(map(len, text.splitlines())) <= 80
    for word in (
        "10.25x",
        "9.99-10.75",
        "10.31x",
        "0.98765",
        "-0.50000",
        "0.264",
        "338 MiB",
        "2 threads",
    ):
        assert word in text


def test_the_interval_of_few_rounds_is_their_range() -> None:
    """The table calls the interval's ends the least and the greatest ratio."""
    for count in range(1, integers.ROUNDS + 1):
        assert median_interval(range(count)) == (0, count - 1)


def test_rows_run_in_batches_of_one_size() -> None:
    sizes = list[int]()

    def run(feeds: integers.Feeds) -> integers.Floats:
        sizes.append(len(feeds["x"]))
        return feeds["x"]

    x = np.arange(ROWS, dtype=np.float32)
    assert np.array_equal(integers.in_batches(run, {"x": x}, 8), x)
    assert sizes == [8, 8]


@pytest.mark.parametrize("words", [["--json"], ["--small"]])
def test_the_command_prints_one_document_or_the_tables(
    words: list[str],
    result: integers.Result,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = list[Any]()

    def measured(*given: Any, small: bool) -> dict[str, list[integers.Result]]:
        asked.extend((*given[:3], small))
        return {"vit": [result]}

    monkeypatch.setattr(integers, "measured", measured)
    assert integers.main([*words, "--models", "vit", "--threads", "2", "--seconds", "3"]) == 0
    assert asked == [("vit",), (2,), 3.0, words == ["--small"]]
    printed = capsys.readouterr().out
    if words == ["--json"]:
        assert json.loads(printed)["models"]["vit"][0]["title"] == "tiny (tiny)"
    else:
        assert printed.strip() == result.text().strip()


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["--models", "vit,gpt"], "unknown model 'gpt'"), (["--threads", "1,0"], "under one")],
)
def test_wrong_words_are_told(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        integers.main(words)
    assert reason in capsys.readouterr().err


# --- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_tiny_models_run_and_have_the_output_that_is_compared(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = CASES[name].make(True)
    assert {len(tensor) for tensor in inputs.values()} == {2 * ROWS}
    with torch.inference_mode():
        found = model(**inputs)[CASES[name].output].flatten(1)
    assert not found.allclose(found[:1].expand_as(found), atol=1e-3), "all rows give one output"


def test_outliers_are_the_same_few_channels_of_every_norm_within_a_block() -> None:
    model = Model()
    add_outliers(model)
    first, second, third = (block.norm.weight for block in model.blocks)
    assert sorted(set(first.tolist())) == [1.0, 15.0]
    assert int((first > 1).sum()) == 1, "6 of 768 are 1 of 128"
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert set(model.norm.weight.tolist()) == {1.0}

    again, other = Model(), Model()
    add_outliers(again)
    add_outliers(other, seed=1)
    assert torch.equal(again.blocks[0].norm.weight, first)
    assert not torch.equal(other.blocks[0].norm.weight, first)
