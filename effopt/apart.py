"""Work on engine folders in a process of its own, which holds no torch: `python -m effopt.apart`.

Neither the memory nor the threads of the compiler disturb an engine there, and the engine's copy
of the weights does not come on top of the compiler's.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from effopt.bench import batches, time_engines, turns
from effopt.engine import Figure, check, load
from effopt.errors import EffoptError
from effopt.report import Latency

_PATIENCE = 600.0
"""Seconds that loading the engines may take."""


def time_folders(rows: Mapping[str, Path], budget: float) -> tuple[Latency, ...]:
    """Time engine folders at their batch sizes, `budget` seconds each; the first is the baseline.

    Raises EffoptError with what the process said where it fails.
    """
    folders = {name: str(folder) for name, folder in rows.items()}
    found = _run({"time": folders, "budget": budget}, _PATIENCE + 10 * budget * len(rows))
    return tuple(Latency(**record) for record in found)


def check_folder(folder: Path) -> list[Figure]:
    """Run an engine on its stored inputs and compare, as `effopt.engine.check` does."""
    return [Figure(**record) for record in _run({"check": str(folder)}, _PATIENCE)]


def _run(request: dict[str, Any], limit: float) -> Any:
    command = [sys.executable, "-m", "effopt.apart", json.dumps(request)]
    remedy = "save with measure=False, or look at the engine with effopt verify"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise EffoptError(f"the engine did not answer within {limit:.0f} s", remedy) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EffoptError(f"the engine could not be run: {last}", remedy)
    return json.loads(done.stdout)


def _answer(request: dict[str, Any]) -> list[dict[str, Any]]:
    if "check" in request:
        return [asdict(figure) for figure in check(load(request["check"]))]
    engines = {name: load(folder) for name, folder in request["time"].items()}
    last = list(engines.values())[-1]
    found: list[Latency] = []
    for batch in batches(last):
        found += time_engines(engines, turns(last, batch), batch, request["budget"])
    return [asdict(latency) for latency in found]


if __name__ == "__main__":
    print(json.dumps(_answer(json.loads(sys.argv[1]))))
