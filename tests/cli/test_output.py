"""What is printed where: progress, tables, and nothing that drives the terminal."""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import effopt
from effopt import console
from effopt.errors import PreconditionError
from tests.cli.shell import CONVERT, EVIL, FakeOptimized, Shell


def test_progress_is_plain_lines_without_control_characters(
    shell: Shell, optimizer: Callable[[Any], None]
) -> None:
    optimizer(FakeOptimized())
    shell(*CONVERT)
    lines = [line for line in shell.err.splitlines() if line.startswith("[")]
    assert [line.split("s] ")[1] for line in lines] == [
        "load model",
        "capture</script>\\x1b[2J[red]",
        "save",
    ]


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with console.Progress(quiet=False) as progress:
        progress.stage("capture")
        progress.stage(EVIL)
    text = terminal.getvalue()
    assert "✓" in text
    assert "\\x1b[2J[red]" in text
    assert "\x1b[2J" not in text
    assert "\x1b[32m" not in text


def test_errors_cannot_drive_the_terminal(shell: Shell, optimizer: Callable[[Any], None]) -> None:
    optimizer(PreconditionError(EVIL, EVIL, EVIL))
    shell(*CONVERT)
    assert "\x1b" not in shell.err
    _, out = shell(*CONVERT, "--json")
    assert "\x1b" not in out


@pytest.mark.parametrize("name", ["passes", "targets", "recipes", "kernels"])
def test_tables(shell: Shell, name: str) -> None:
    if name == "recipes" and not hasattr(effopt, "recipes"):
        pytest.skip("no recipes yet")
    code, document = shell.json(name)
    assert code == 0
    assert document[name]
    code, text = shell(name)
    assert code == 0
    for record in document[name]:
        assert record["name"] in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_target_of_kernels_without_a_folder_is_not_ignored(shell: Shell) -> None:
    assert shell("kernels", "--target", "a100")[0] == 2
    assert "add -o DIR" in shell.err


def test_version(shell: Shell) -> None:
    code, document = shell.json("--version")
    assert code == 0
    assert shell("--version")[1] == f"effopt {document['effopt']}\n"


def test_inspect(
    shell: Shell, optimizer: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Explanation:
        def text(self) -> str:
            return f"axes{EVIL}\nsites"

        def to_json(self) -> dict[str, Any]:
            return {"sites": [EVIL]}

    given: list[dict[str, Any]] = []

    def explain(model: Any, inputs: Any, *, progress: Any, **options: Any) -> Explanation:
        progress(f"explain{EVIL}")
        given.append(options)
        return Explanation()

    optimizer(None)
    monkeypatch.setattr(effopt, "explain", explain, raising=False)
    assert shell("inspect", "cli_shop:make") == (0, "axes</script>\\x1b[2J[red]\nsites\n")
    assert shell.json("inspect", "cli_shop:make") == (0, {"sites": [EVIL]})
    shell("inspect", "cli_shop:make", "--dynamic", "batch,length", "--seed", "3")
    assert given[0] == {"dynamic": ("batch",), "seed": 0}
    assert given[-1] == {"dynamic": ("batch", "length"), "seed": 3}


def test_logging_and_warnings_are_left_as_they_were(shell: Shell) -> None:
    level, filters = logging.root.manager.disable, list(warnings.filters)
    assert shell("targets")[0] == 0
    assert shell("inspect", "nowhere:make")[0] == 2
    assert (logging.root.manager.disable, list(warnings.filters)) == (level, filters)
