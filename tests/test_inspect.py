"""The command `effopt inspect`: the rules, wrong usage, and the picture that it writes."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from effopt.__main__ import main
from effopt.rules_table import rules


def test_the_rules_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--rules"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert main(["inspect", "--rules", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["rules"]
    assert [row["family"] for row in listed] == [row.family for row in rules()]
    assert all(row["family"] in text and row["operators"] and row["effect"] for row in listed)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no MODEL was given"),
        (("--rules", "shop:make"), "--rules takes no MODEL"),
        (("shop:make", "--svg", "vit.png"), "ends with .svg"),
        (("shop:make", "--svg", "nowhere/vit.svg"), "cannot be written"),
    ],
)
def test_wrong_usage_is_told_at_once(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_command_writes_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inspect_shop.py").write_text(
        "from tests import zoo\ndef make(): return zoo.make('encoder')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "inspect_shop:make", "--svg", "net.svg"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Encoder\n")
    assert out.endswith("written: net.svg\n")
    assert "attention calls" in err
    document: Any = ET.parse(tmp_path / "net.svg").getroot()
    assert document.tag == "{http://www.w3.org/2000/svg}svg"
