"""The examples: what they print, what they measure, and the data that they measure it on."""

import hashlib
import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import effopt
import effopt.save
from effopt.measure import Timing, accuracy
from effopt.report import Latency
from examples import bench, footprint, variants
from examples.digits import data, demo, model

IMAGES = 40


# --- the demo ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_prints_every_row_and_its_engine_keeps_the_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One test, as making the engines takes most of the time."""
    monkeypatch.setattr(effopt.save, "BUDGET", 0.1)
    folder = tmp_path / "out"
    words = ["--json", "--images", str(IMAGES), "--seconds", "0.1", "-o", str(folder)]
    assert demo.main(words) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert "time batch 8" in printed.err
    _check_rows(document)
    assert document["report"] == str(folder / "report.html")
    assert (folder / "report.html").exists()

    pixels, labels = data.evaluation_set()
    ours, theirs = effopt.load(folder), model.trained()[0]
    parts = np.split(pixels, 20)
    engine = np.concatenate([ours(pixels=part)["logits"] for part in parts])
    with torch.inference_mode():
        original = torch.cat([theirs(torch.from_numpy(part))["logits"] for part in parts])
    before, after = (accuracy(logits, labels) for logits in (original, engine))
    assert before.samples == 2000
    assert before.value >= 0.95
    assert after.value >= before.value - 0.01


def _check_rows(document: dict[str, Any]) -> None:
    rows = document["rows"]
    names = ["original", "plain export", "folded export", "effopt"]
    assert [row["variant"] for row in rows] == names
    assert [row["plain"] for row in rows] == [False, True, True, False]
    for row in rows:
        assert [found["batch"] for found in row["latency"]] == [1, 8]
        assert row["accuracy"]["samples"] == IMAGES
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
        assert row["bytes"] > 4_000_000
    macs = [row["macs"] for row in rows]
    assert macs[0] == macs[1] == macs[2]
    assert macs[3] < 0.7 * macs[0]
    for place in (0, 1):
        bases = {row["latency"][place]["baseline"] for row in rows} - {""}
        assert len(bases) == 1
        assert bases <= {"plain export", "folded export"}


def test_the_demo_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert demo.main(["-o", str(tmp_path), "--images", "1", "--seconds", "0.1"]) == 2
    assert "is no engine folder" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"


# --- tables -----------------------------------------------------------------------------------


def latency(batch: int, base: str = "plain export", scale: float = 1.0) -> Latency:
    speed = None if not base else 1.525
    low, high = (None, None) if not base else (1.402, 1.614)
    times = (scale * ms for ms in (11.11, 19.1, 22.2, 10.22, 12.33))
    return Latency("effopt", batch, *times, 90, 2, 9, speed, low, high, base)


def variant(name: str = "folded export", plain: bool = True) -> variants.Variant:
    return variants.Variant(name, "onnxruntime", lambda feeds: feeds["x"], 17_600_000_000, 10**9)


def test_a_demo_reads_well_at_80_columns() -> None:
    share = demo.Proportion(0.9655, 0.9566, 0.9726, 2000)
    lines = tuple(
        demo.Line(variant(name), (latency(1, base), latency(8, base, 40.0)), share, lost)
        for name, base, lost in (("plain export", "", -0.05), ("effopt", "plain export", 0.15))
    )
    text = demo.Demo(lines, Path("demo-out"), 61.2).text(colour=False)
    assert max(map(len, text.splitlines())) <= 80
    for word in ("1.52x", "1.40-1.61", "baseline", "96.55", "95.7-97.3", "0.15", "17600", "444"):
        assert word in text
    assert "plain export at batch 1 and 8" in text.replace("\n", " ")
    assert "demo-out/report.html" in text
    assert "effopt bench demo-out --against examples.digits.model:trained" in text


def test_a_benchmark_reads_well_at_80_columns() -> None:
    lines = (bench.Line(variant(), (latency(1), latency(8)), bench.Cosine(0.99, 0.98, 16)),)
    found = bench.Result("ViT-S/16", lines)
    assert max(map(len, found.text(colour=False).splitlines())) <= 80
    assert found.document()["rows"][0]["cosine"] == {"mean": 0.99, "min": 0.98, "rows": 16}


def test_a_conversion_shows_its_stages_and_its_memory() -> None:
    found = {
        "model": "ViT-B/16",
        "threads": 2,
        "stages": [{"name": "capture", "seconds": 1.5}, {"name": "merge[r]", "seconds": 2.0}],
        "seconds": 3.5,
        "import_mib": 200.0,
        "model_mib": 600.0,
        "peak_mib": 1100.0,
        "weights_mib": 330.0,
        "ratio": 2.727,
    }
    text = bench.conversion_text(found, colour=False)
    for word in ("capture", "merge[r]", "3.50", "1100 MiB", "weights = 2.73", "2 threads"):
        assert word in text


class Step(nn.Module):
    """x W: no attention, so that recipes have nothing to do and the test little."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_a_benchmark_measures_every_row() -> None:
    def make() -> tuple[nn.Module, dict[str, torch.Tensor]]:
        return Step().eval(), {"x": torch.randn(16, 8)}

    # tome must refuse a model without attention, and says so
    case = bench.Case("step", make, 1)
    with pytest.raises(effopt.PreconditionError, match="no self-attention"):
        bench.bench(case, 0.05)


def test_an_unknown_model_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--models", "digits,vit-x"])
    assert "unknown model 'vit-x'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_prints_one_document(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"ratio": 2.0}
    monkeypatch.setattr(footprint, "measured", lambda: record)
    monkeypatch.setattr(bench, "conversion_text", lambda found, colour: "conversion")
    assert bench.main(["--models", "digits,vit-b", "--seconds", "0.1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["conversion"] == record
    rows = document["models"]["digits"]["rows"]
    names = ["plain export", "folded export", "balanced", "tome r=16", "int8", "balanced + int8"]
    assert [row["variant"] for row in rows] == names
    assert rows[0]["cosine"]["min"] > 0.99999
    assert rows[1]["cosine"]["min"] > 0.99999
    assert rows[0]["macs"] == rows[1]["macs"] > rows[2]["macs"]


# --- timing against the faster ----------------------------------------------------------------


def fake_compare(speeds: list[dict[str, float]]) -> tuple[Callable[..., Any], list[str | None]]:
    """Make a `compare` whose calls return given speed-ups in turn, and a list of baselines."""
    asked, turn = list[str | None](), count()

    def compare(calls: dict[str, Any], *, baseline: str | None = None, budget: float) -> Any:
        asked.append(baseline)
        found = speeds[next(turn)]
        base = baseline or next(iter(calls))
        times = (1.0, 1.0, 1.0, 1.0, 1.0, 9, 2)
        known = {base: Timing(*times)}
        return known | {
            name: Timing(*times, found[name], found[name], found[name], base)
            for name in calls
            if name != base
        }

    return compare, asked


@pytest.mark.parametrize(
    ("speeds", "asked"),
    [
        ([{"b": 1.1}, {"a": 0.9, "ours": 1.5}], [None, "b"]),
        ([{"b": 0.9}, {"b": 0.95, "ours": 1.5}], [None, "a"]),
        ([{"b": 0.9}, {"b": 1.2, "ours": 1.5}, {"a": 0.8, "ours": 1.3}], [None, "a", "b"]),
    ],
)
def test_speedups_count_against_the_faster_plain_export(
    speeds: list[dict[str, float]], asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, found = fake_compare(speeds)
    monkeypatch.setattr(variants, "compare", compare)
    calls = dict.fromkeys(("a", "b", "ours"), lambda: None)
    timings = variants._against_faster(calls, ("a", "b"), 1.0)
    assert found == asked
    assert timings["ours"].baseline == asked[-1]
    assert timings["ours"].speedup == speeds[-1]["ours"]


def test_rows_are_cut_and_repeated() -> None:
    feeds = {"x": np.arange(3), "y": np.arange(6).reshape(3, 2)}
    assert variants.rows_of(feeds, 1)["y"].tolist() == [[0, 1]]
    assert variants.rows_of(feeds, 5)["x"].tolist() == [0, 1, 2, 0, 1]


# --- the digits: data and checkpoint ----------------------------------------------------------


def test_the_checkpoint_loads() -> None:
    made, (pixels,) = model.trained()
    assert not made.training
    assert sum(weight.numel() for weight in made.parameters()) == 1_247_178
    with torch.inference_mode():
        assert made(pixels)["logits"].shape == (2, 10)


def test_a_missing_checkpoint_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "CHECKPOINT", Path("nowhere.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"python -m examples\.digits\.train"):
        model.trained()


EVALUATION = "94efbd526e56181f155b7e02a9bf0a5f85f5ce48c517df702c739ebb123bab4e"
"""SHA-256 of the first 64 test canvases in 8-bit grey, and of their labels."""


def test_the_evaluation_set_is_fixed() -> None:
    """Grey levels are rounded, as a processor may differ in the last digits of a float."""
    pixels, labels = data.evaluation_set(64)
    grey = np.round(pixels * 255).astype(np.uint8)
    digest = hashlib.sha256(grey.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    assert digest == EVALUATION
    again, _ = data.evaluation_set(64)
    assert np.array_equal(pixels, again)


def test_the_splits_share_no_handwriting() -> None:
    parts = {split: data._handwriting(split)[0] for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [1197, 200, 400]
    bounds = [data._BOUNDS[split] for split in parts]
    assert [(part.start, part.stop) for part in bounds] == [(0, 1197), (1197, 1397), (1397, 1797)]
    source = np.concatenate(list(parts.values())).reshape(1797, -1)
    everything = data.load_digits().images.reshape(1797, -1) / 16
    order = [rows[np.lexsort(rows.T)] for rows in (source, everything.astype(np.float32))]
    assert np.array_equal(*order)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_canvases_are_what_they_say(split: data.Split) -> None:
    found = data.scenes(split, 32, np.random.default_rng(1))
    assert found.images.shape == (32, 1, 48, 48)
    assert (found.images.dtype, found.labels.dtype) == (np.float32, np.int64)
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert set(found.labels) <= set(range(10))
    assert (found.ink.reshape(32, -1).max(axis=1) > 0.5).all(), "a canvas without its digit"
    covered = found.images[:, 0] >= found.ink - 0.5  # noise may take some ink away
    assert covered.all()


def test_canvases_depend_on_their_seed_alone() -> None:
    first, labels = data.canvases("train", 8, seed=3)
    again, same = data.canvases("train", 8, seed=3)
    other, _ = data.canvases("train", 8, seed=4)
    assert np.array_equal(first, again)
    assert np.array_equal(labels, same)
    assert not np.array_equal(first, other)


def test_clutter_is_what_is_asked_for() -> None:
    bare = data.Clutter(scraps=0, strokes=0, noise=0.0)
    found = data.scenes("test", 8, np.random.default_rng(2), bare)
    assert np.array_equal(found.images[:, 0], found.ink)
    cluttered = data.scenes("test", 8, np.random.default_rng(2))
    assert cluttered.images.sum() > 2 * found.images.sum()
