"""`effopt bench` and `effopt verify`: an engine alone, against another, and against its model."""

import sys
from pathlib import Path

import pytest

from effopt.report import Report
from tests.cli.shell import Shell, write_engine


def test_bench_alone(shell: Shell, engine: Path) -> None:
    code, document = shell.json("bench", engine, "--seconds", "0.1")
    assert code == 0
    assert [row["batch"] for row in document["latency"]] == [1, 8]
    assert all(row["speedup"] is None for row in document["latency"])
    assert document["notes"] == []


def test_bench_against_a_folder_of_the_same_name(
    shell: Shell, engine: Path, tmp_path: Path
) -> None:
    other = write_engine(tmp_path / "other" / "out", scale=-2.0, target="a100")
    words = ("bench", other, "--against", engine, "--batch", "3", "--seconds", "0.1")
    code, document = shell.json(*words)
    assert code == 0
    base, ours = document["latency"]
    assert (base["variant"], ours["variant"], ours["baseline"]) == ("out", str(other), "out")
    assert ours["speedup_low"] <= ours["speedup"] <= ours["speedup_high"]
    cosine, top1 = document["quality"]
    assert (cosine["metric"], cosine["value"], cosine["samples"]) == ("cosine of logits", -1.0, 3)
    assert top1["value"] == 0.0
    assert "not of its target a100 (sm_80)" in document["notes"][0]
    assert "Latency, ms a call" in shell(*words)[1]


def test_bench_of_a_fixed_batch(shell: Shell, tmp_path: Path) -> None:
    folder = write_engine(tmp_path / "out", batch=2)
    code, document = shell.json("bench", folder, "--seconds", "0.1")
    assert [row["batch"] for row in document["latency"]] == [2]
    code, document = shell.json("bench", folder, "--batch", "4")
    assert code == 2
    assert "batch of 2 only" in document["error"]["reason"]


def test_verify(shell: Shell, engine: Path) -> None:
    code, document = shell.json("verify", engine)
    assert code == 0
    assert (document["ok"], document["files"]) == (True, 2)
    assert [row["output"] for row in document["outputs"]] == ["logits"]
    code, text = shell("verify", engine)
    assert "2 files are as written" in text


DOUBLE = """
import torch
class Scale(torch.nn.Module):
    def __init__(self, by): super().__init__(); self.by = by
    def forward(self, x): return {"logits": x * self.by}
class Other(torch.nn.Module):
    def forward(self, y): return {"logits": y}
def right(): return Scale(2.0), {"x": torch.ones(2, 4)}
def wrong(): return Scale(2.1), {"x": torch.ones(2, 4)}
def other(): return Other(), {"y": torch.ones(2, 4)}
"""


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("right", 0, "1.0e-04   1.0000   0.0e+00"),
        ("right", 0, "2 files are as written"),
        ("wrong", 5, "logits of the model differs from the stored original by 0.05"),
        ("other", 5, "takes other inputs"),
    ],
)
def test_verify_against_a_model(
    shell: Shell,
    engine: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(engine.parent)
    monkeypatch.syspath_prepend(engine.parent)
    Path("cli_doubles.py").write_text(DOUBLE)
    monkeypatch.delitem(sys.modules, "cli_doubles", raising=False)
    found, out = shell("verify", engine, "--against", f"cli_doubles:{name}")
    assert found == code
    assert message in out + shell.err


def test_from_a_folder_to_an_engine(shell: Shell, tmp_path: Path) -> None:
    pytest.importorskip("effopt.optimizer", reason="no optimizer yet")
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    model, out = tmp_path / "model", tmp_path / "out"
    ViTForImageClassification(config).save_pretrained(model)
    shell.capsys.readouterr()  # what transformers prints while it saves
    code, document = shell.json("convert", model, "-o", out, "--recipe", "merge-tokens{r=2}")
    assert code == 0, document
    assert Report.from_json(document["report"]).steps
    assert document["folder"] == str(out)
    code, document = shell.json("bench", out, "--against", model, "--batch", "2", "--seconds", "1")
    assert code == 0, document
    assert [row["speedup"] is None for row in document["latency"]] == [True, False]
    assert shell("verify", out, "--against", model)[0] == 0
    code, document = shell.json("inspect", model)
    assert code == 0
    assert document
