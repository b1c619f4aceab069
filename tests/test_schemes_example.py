"""The table of schemes: what is measured of a model, and how it is written."""

import json
from types import MappingProxyType

import pytest
import torch
from torch import nn

from examples import schemes


class Tiny(nn.Module):
    """Two layers, wide enough to be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x + self.down(self.up(x).relu())}


def tiny() -> schemes.Case:
    torch.manual_seed(0)
    x = torch.randn(120, 64).numpy()
    return schemes.Case(Tiny().eval(), {"x": x}, {"x": x[:100]}, schemes._cosines)


def test_every_row_is_measured_against_the_original(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {name: schemes.SCHEMES[name] for name in ("float", "int8-weight", "int4-rtn")}
    monkeypatch.setattr(schemes, "SCHEMES", MappingProxyType(known))
    monkeypatch.setattr(schemes, "CASES", {"tiny": tiny})
    assert schemes.main(["--models", "tiny", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["tiny"]
    lost = {name: 1 - row["cos_mean"] for name, row in rows.items()}
    assert lost["float"] < 1e-9 < lost["int8-weight"] < lost["int4-rtn"] < 0.02
    assert rows["int4-rtn"]["bytes"] < rows["int8-weight"]["bytes"] < rows["float"]["bytes"]
    written = schemes.text("tiny", rows)
    assert "1.000" in written.split("int8-weight")[0]
    assert f"{lost['int4-rtn']:.1e}" in written


def test_an_unknown_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        schemes.main(["--models", "digit"])
    assert "digits" in capsys.readouterr().err
