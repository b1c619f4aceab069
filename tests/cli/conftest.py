"""What the tests of the command line start from."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.cli.shell import EVIL, Shell, write_engine


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "out")


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def optimizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any], None]:
    """Put a stand-in for the optimizer and a factory `cli_shop:make` in place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cli_shop.py").write_text(
        "import torch\ndef make(): return torch.nn.Linear(3, 2)\n"
    )
    monkeypatch.delitem(sys.modules, "cli_shop", raising=False)

    def install(outcome: Any) -> None:
        def optimize(model: Any, inputs: Any, *, progress: Any, **options: Any) -> Any:
            progress(f"capture{EVIL}")
            print("a library that prints")
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = ModuleType("effopt.optimizer")
        module.optimize = optimize  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "effopt.optimizer", module)

    return install
