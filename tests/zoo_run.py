"""The proof on the zoo: every model is reduced and judged, or refused with a reason.

    python -m tests.zoo_run [--only vit,bert] [--out out/zoo.json] [--docs docs/zoo.md] [--pin]

Writes what came out as JSON and as a table; `--pin` makes it what tests/test_zoo.py expects.
Exit code 1 if a model crashed or came out wrong, or if too few were reduced.
"""

import argparse
import json
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from tests.architectures import ARCHITECTURES
from tests.architectures.record import document, expected, pin, record, row_of, write
from tests.architectures.trial import (
    CRASH,
    PASSES,
    REDUCED,
    REFUSED,
    WRONG,
    AxisTrial,
    Trial,
    Verdict,
    judge,
)

LEAST, LEAST_REDUCED = 60, 48
"""The promise: so many architectures are tried, so many of them reduced."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the models, write the records, and return the exit code."""
    given = _parser().parse_args(arguments)
    names = given.only.split(",") if given.only else list(ARCHITECTURES)
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        print(f"no such model: {', '.join(unknown)}", file=sys.stderr)
        return 2
    found: dict[str, Trial] = {}
    for trial in run(names, given.jobs):
        found[trial.model] = trial
        print(_line(trial, len(found), len(names)), file=sys.stderr, flush=True)
    trials = [found[name] for name in names]
    write(given.out, json.dumps([record(trial) for trial in trials], indent=1) + "\n")
    rows = {trial.model: row_of(trial) for trial in trials}
    if given.pin:
        known = {**expected(), **rows}
        rows = {name: known[name] for name in ARCHITECTURES if name in known}
        pin(rows)
    if given.pin or not given.only:
        write(given.docs, document(rows))
    print(_summary(trials))
    return _exit_code(trials, whole=not given.only)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo_run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", help="names of models, with commas between them")
    parser.add_argument("--out", type=Path, default=Path("out/zoo.json"))
    parser.add_argument("--docs", type=Path, default=Path("docs/zoo.md"))
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--pin", action="store_true", help="make this what the tests expect")
    return parser


def run(names: Sequence[str], jobs: int) -> Iterator[Trial]:
    """Judge models in processes of their own; yield each as it is done."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_quiet) as pool:
        names_of = {pool.submit(judge, name): name for name in names}
        for done in as_completed(names_of):
            yield _trial_of(done, names_of[done])


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def _trial_of(done: "Future[Trial]", name: str) -> Trial:
    """Take the trial, or note that its process ended."""
    if (error := done.exception()) is None:
        return done.result()
    verdict = Verdict(CRASH, f"{type(error).__name__}: {error}")
    return Trial(name, (AxisTrial("", dict.fromkeys(PASSES, verdict)),))


def _line(trial: Trial, done: int, count: int) -> str:
    verdict = trial.decisive
    head = f"[{done:3}/{count}] {verdict.kind:8} {trial.model:24} {trial.seconds:5.1f} s"
    return f"{head}  {verdict.reason[:100]}".rstrip()


def _summary(trials: Sequence[Trial]) -> str:
    kinds = (REDUCED, REFUSED, WRONG, CRASH)
    counts = Counter((trial.family, trial.decisive.kind) for trial in trials)
    lines = [f"{'family':12}" + "".join(f"{kind:>9}" for kind in kinds)]
    for family in dict.fromkeys(trial.family for trial in trials):
        lines.append(f"{family:12}" + "".join(f"{counts[family, kind]:9}" for kind in kinds))
    total = Counter(trial.decisive.kind for trial in trials)
    lines.append(f"{'all':12}" + "".join(f"{total[kind]:9}" for kind in kinds))
    return "\n".join(lines)


def _exit_code(trials: Sequence[Trial], whole: bool) -> int:
    kinds = Counter(trial.decisive.kind for trial in trials)
    few = whole and (len(trials) < LEAST or kinds[REDUCED] < LEAST_REDUCED)
    return 1 if few or kinds[CRASH] or kinds[WRONG] else 0


if __name__ == "__main__":
    sys.exit(main())
