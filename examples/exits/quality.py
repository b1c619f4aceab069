"""Early exits on plain digits: how deep rows go, and what that costs, over many calibrations.

python -m examples.exits.quality [--small] [--json]
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from torch import Tensor

from effopt.calibration import read_calibration
from effopt.capture import capture
from effopt.console import Progress, print_error
from effopt.errors import EffoptError
from effopt.exit_losses import any_exit_losses, exits_taken, grid, plain_losses
from effopt.exits import probe
from effopt.passes.exit_early import ExitEarly
from effopt.passes.exit_fit import FIT, HELD, marks
from effopt.pipeline import Pipeline
from effopt.program import Program
from effopt.recipe import steps_of
from effopt.risk import choose
from examples.exits.model import SEEDS, Split, splits, trained
from examples.exits.train import views
from examples.variants import text_of

CUTS = (1, 3)
"""Exits behind the second and the fourth of six blocks."""
DEPTHS = np.array((2, 4, 6)) / 6
EPSILONS = (0.01, 0.02, 0.05)
TRIES = 200
"""Draws of calibration rows from the pool of each training."""
CALIBRATED = 500
STEPS = 200
"""Thresholds that are tried."""
VIEWS = 6
"""How often heads see each training digit, shifted as in training.

The model is surer of the very digits that it was trained on than of others: heads and thresholds
that know those alone fit new ones worse.
"""
_CHUNK = 100

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Setup:
    """How sure an exit is, and how its head is fitted; `views` is 0 for digits as they are."""

    score: str
    polish: int = 0
    views: int = VIEWS


BEST = "margin, ridge + polish"
SETUPS: Mapping[str, Setup] = MappingProxyType(
    {
        "margin, ridge, digits as they are": Setup("margin", views=0),
        "max, ridge": Setup("max"),
        "margin, ridge": Setup("margin"),
        BEST: Setup("margin", 200),
    }
)


@dataclass(frozen=True)
class Way:
    """A rule with its delta, None for naive; and whether the losses of other exits count."""

    rule: str | None
    delta: float | None = None
    every: bool = True


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "crc": Way("crc"),
        "crc, plain loss": Way("crc", every=False),
        "ltt, delta .1": Way("ltt", 0.1),
        "wsr, delta .1": Way("wsr", 0.1),
        "naive": Way(None),
    }
)


@dataclass(frozen=True)
class Figures:
    """What a calibration gives on rows that had no part in it, or the mean over many.

    `depth` is the part of the blocks that run, `disagreement` the part of rows with another class
    than at the end, `gain` the accuracy less that of the whole model, `first` the part of rows
    that leave at the first exit.
    """

    depth: float
    disagreement: float
    accuracy: float
    gain: float
    first: float


@dataclass(frozen=True)
class Pool:
    """Rows that fitted nothing, at thresholds `path` [K+1, E] from rows that did.

    `taken` [n, K+1] are exits from 0, `right` [n, E+1] tells which exits say the class, `plain`
    and `every` [n, K+1] are losses: of the exit taken, and the largest of those that may be.
    """

    taken: Rows
    right: NDArray[np.bool_]
    plain: Floats
    every: Floats


# --- the model with exits -------------------------------------------------------------------------


@cache
def pool_of(seed: int, setup: Setup) -> Pool:
    """Fit exits to an instance, and see what they say of the pool.

    Raises PreconditionError as exit-early does.
    """
    fitting, _, pool = _parts(setup.views)
    program = _exited(seed, setup)
    path = grid(_seen(program, fitting)[0], STEPS)
    scores, classes = _seen(program, torch.from_numpy(pool.pixels))
    wrong = (classes[:, :-1] != classes[:, -1:]).astype(np.float64)
    return Pool(
        exits_taken(scores, path) - 1,
        classes == pool.labels[:, None],
        plain_losses(scores, wrong, path),
        any_exit_losses(scores, wrong, path),
    )


@cache
def _parts(count: int) -> tuple[Tensor, Tensor, Split]:
    """Return what fits heads, what chooses among them, and the pool."""
    train, held, pool = splits()
    if not count:
        return torch.from_numpy(train.pixels), torch.from_numpy(held.pixels), pool
    random = torch.Generator().manual_seed(0)
    return views(train, count, random), views(held, count, random), pool


def _exited(seed: int, setup: Setup) -> Program:
    """Return an instance with exits whose heads are fitted on the training digits alone.

    The pass itself draws what fits and what chooses, so rows are laid out as it will draw them.
    """
    fitting, choosing, pool = _parts(setup.views)
    fits = round(len(fitting) / (1 - HELD))
    count = fits + len(pool.labels)
    drawn = marks(count, fits / count)
    rows = torch.empty(count, *fitting.shape[1:])
    rows[drawn == FIT] = fitting
    rows[drawn > FIT] = choosing[: fits - len(fitting)]
    rows[drawn == 0] = torch.from_numpy(pool.pixels)
    original = capture(trained(seed), {"pixels": rows[:4]})
    program, _ = Pipeline(steps_of("exact")).run(original)
    parts = torch.tensor_split(rows, -(-count // _CHUNK))
    program.calibration = read_calibration([{"pixels": x} for x in parts], program)
    step = ExitEarly(
        cuts=CUTS,
        score=setup.score,
        head="ridge",
        pool="first-mean",
        polish=setup.polish,
        epsilon=max(EPSILONS),
        share=fits / count,
    )
    for refusal in step.check(program):
        raise refusal
    step.run(program)
    return program


def _seen(program: Program, pixels: Tensor) -> tuple[NDArray[np.float32], Rows]:
    """Return scores [n, E] and the classes that exits and the end say, [n, E+1]."""
    found = [x.numpy() for x in probe(program, "logits").run((pixels,))]
    count = len(CUTS)
    classes = [answer.argmax(1) for answer in found[count:]]
    return np.stack(found[:count], axis=1), np.stack(classes, axis=1)


# --- many calibrations ------------------------------------------------------------------------


def figures(pool: Pool, known: Rows, new: Rows, way: Way, epsilon: float) -> Figures:
    """Calibrate on rows that are `known`, and see what that gives on `new` ones."""
    table = (pool.every if way.every else pool.plain)[known]
    if way.rule is None:
        index = naive(table, epsilon)
    else:
        index = choose(table, way.rule, epsilon, way.delta).index
    taken, right = pool.taken[new, index], pool.right[new]
    accuracy = right[np.arange(len(new)), taken].mean()
    return Figures(
        float(DEPTHS[taken].mean()),
        float(pool.plain[new, index].mean()),
        float(accuracy),
        float(accuracy - right[:, -1].mean()),
        float((taken == 0).mean()),
    )


def naive(losses: Floats, epsilon: float) -> int:
    """Return the last setting before the mean loss [K+1] first exceeds epsilon: no promise."""
    fails = losses.mean(axis=0) > epsilon
    return int(np.argmax(fails)) - 1 if fails.any() else len(fails) - 1


def measured(
    setups: Sequence[str],
    seeds: Sequence[int] = SEEDS,
    tries: int = TRIES,
    ways: Sequence[str] = tuple(WAYS),
    stage: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[str, dict[float, Figures]]]:
    """Return the mean figures over trainings and draws: by setup, way and epsilon."""
    found = dict[str, dict[str, dict[float, Figures]]]()
    for name in setups:
        tried: dict[tuple[str, float], list[Figures]] = {(w, e): [] for w in ways for e in EPSILONS}
        for seed in seeds:
            stage(f"{name}: training {seed}")
            pool, random = pool_of(seed, SETUPS[name]), np.random.default_rng(seed)
            for _ in range(tries):
                order = random.permutation(len(pool.right))
                known, new = order[:CALIBRATED], order[CALIBRATED:]
                for (way, epsilon), rows in tried.items():
                    rows.append(figures(pool, known, new, WAYS[way], epsilon))
        found[name] = {way: {e: _mean(tried[way, e]) for e in EPSILONS} for way in ways}
    return found


def _mean(rows: Sequence[Figures]) -> Figures:
    names = [field.name for field in fields(Figures)]
    return Figures(**{name: float(np.mean([getattr(x, name) for x in rows])) for name in names})


# --- printing -----------------------------------------------------------------------------------


def text(name: str, ways: Mapping[str, Mapping[float, Figures]]) -> str:
    """Write the figures of one setup as a table."""
    made = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD)
    made.show_edge, made.pad_edge = False, False
    for head in ("rule", "epsilon", "depth", "disagree", "accuracy", "less full", "at exit 1"):
        made.add_column(head, justify="left" if head == "rule" else "right")
    for way, by_epsilon in ways.items():
        for epsilon, row in by_epsilon.items():
            made.add_row(
                way if epsilon == EPSILONS[0] else "",
                f"{epsilon:.0%}",
                f"{row.depth:.3f}",
                f"{row.disagreement:.2%}",
                f"{row.accuracy:.2%}",
                f"{100 * row.gain:+.2f}",
                f"{row.first:.1%}",
            )
    return text_of(made, "", colour=False)


def _document(found: Mapping[str, Mapping[str, Mapping[float, Figures]]]) -> dict[str, Any]:
    return {
        name: {way: {f"{e:g}": asdict(row) for e, row in by.items()} for way, by in ways.items()}
        for name, ways in found.items()
    }


def main(words: Sequence[str] | None = None) -> int:
    """Print a table for each setup, or one JSON document."""
    parser = argparse.ArgumentParser(prog="examples.exits.quality", description=__doc__)
    parser.add_argument("--small", action="store_true", help="one training, 20 draws, no polish")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args(words)
    whole = (tuple(SETUPS), SEEDS, TRIES)
    setups, seeds, tries = (("margin, ridge",), SEEDS[:1], 20) if given.small else whole
    try:
        with redirect_stdout(sys.stderr), Progress(quiet=False) as progress:
            found = measured(setups, seeds, tries, stage=progress.stage)
    except EffoptError as error:
        print_error(error, error.exit_code, given.json, sys.stdout)
        return error.exit_code
    shown = "\n".join(text(name, ways) for name, ways in found.items())
    print(json.dumps(_document(found), indent=1) if given.json else shown.rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
