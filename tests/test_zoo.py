"""The wide zoo: every model is reduced and found right, or refused for the reason pinned."""

import json
from pathlib import Path

import pytest

from tests import zoo_run
from tests.architectures import ARCHITECTURES
from tests.architectures.record import document, expected, is_reduced, row_of
from tests.architectures.trial import REDUCED, REFUSED, AxisTrial, Trial, Verdict, judge, stable

ROOT = Path(__file__).parent.parent
FAST = (
    *("vit", "swin", "beit", "bert", "deberta-v2", "fnet", "t5", "whisper", "clip", "detr"),
    *("llama", "gpt-neox", "mamba", "plain-mean", "plain-relative-bias", "plain-eva"),
)
"""One or two of each family; the others are tried by `make test-all` and `make zoo`."""


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_a_model_is_reduced_and_right_or_refused_as_pinned(name: str) -> None:
    trial = judge(name)
    assert trial.decisive.kind in (REDUCED, REFUSED), trial.decisive.reason
    assert row_of(trial) == expected()[name]


def test_the_promise_is_kept() -> None:
    rows = expected()
    assert list(rows) == list(ARCHITECTURES)
    assert len(rows) >= zoo_run.LEAST
    assert sum(map(is_reduced, rows.values())) >= zoo_run.LEAST_REDUCED


def test_the_document_shows_what_is_pinned() -> None:
    assert (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8") == document(expected())


def test_the_command_writes_records_and_leaves_the_document_of_the_whole_zoo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo_run, "run", lambda names, jobs: map(_reduced, names))
    out, docs = tmp_path / "new" / "zoo.json", tmp_path / "zoo.md"
    assert zoo_run.main(["--only", "vit,bert", "--out", str(out), "--docs", str(docs)]) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["model"], row["outcome"], row["sites"]) for row in written] == [
        ("vit", REDUCED, 3),
        ("bert", REDUCED, 3),
    ]
    assert {path.name for path in tmp_path.rglob("*")} == {"new", "zoo.json"}
    assert "vision" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["crash", "wrong"])
def test_one_bad_verdict_fails_the_command(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = {"merge-tokens": Verdict(REDUCED), "prune-tokens": Verdict(kind, "why")}
    bad = Trial("vit", (AxisTrial("tokens", passes),))
    monkeypatch.setattr(zoo_run, "run", lambda names, jobs: [bad])
    out = tmp_path / "zoo.json"
    assert zoo_run.main(["--only", "vit", "--out", str(out)]) == 1
    row = json.loads(out.read_text(encoding="utf-8"))[0]
    assert (row["outcome"], row["reason"]) == (kind, "why")


def test_too_few_models_fail_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_run, "ARCHITECTURES", {"vit": ARCHITECTURES["vit"]})
    monkeypatch.setattr(zoo_run, "run", lambda names, jobs: map(_reduced, names))
    files = ["--out", str(tmp_path / "zoo.json"), "--docs", str(tmp_path / "zoo.md")]
    assert zoo_run.main(files) == 1


def test_an_unknown_model_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo_run.main(["--only", "vit,bret"]) == 2
    assert "no such model: bret" in capsys.readouterr().err


def test_what_is_pinned_does_not_change_with_numbers_and_folders() -> None:
    text = "transpose_8 of [97, 2*s11] at /a/b/model_x.py:12 (x): Eq(u0, 1) (unhinted: u0).  (None)"
    assert stable(text) == "transpose of [97, 2*s] at model_x.py (x): Eq(s, 1)"


def _reduced(name: str) -> Trial:
    passes = {"merge-tokens": Verdict(REDUCED), "prune-tokens": Verdict(REFUSED, "why", "how")}
    return Trial(name, (AxisTrial("tokens", passes, 17, 3),))
