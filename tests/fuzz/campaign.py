"""A campaign: many random models, each reduced in many ways; counts, and what was wrong."""

import itertools
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.judge import judge, kind, reproduction, shrunk
from tests.fuzz.spec import Spec
from tests.fuzz.strategy import trials

PASSES = 12
"""Passes tried on a model: to capture it takes as long as to judge five of them."""

BATCH = 20
"""Models drawn from one seed."""

RENEWED = 20
"""Batches after which a process ends: torch keeps something of every graph that it traced."""


@dataclass
class Tally:
    """How many pairs of a model and a pass came out how, and one failure of each kind.

    One kind of fault under another mask, or with another head, is likely another defect.
    """

    counts: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    failures: dict[tuple[str, str, str], tuple[Spec, str, str]] = field(default_factory=dict)

    @property
    def pairs(self) -> int:
        return self.counts["right"] + self.counts["refused"] + self.counts["wrong"]

    def add(self, spec: Spec, passes: tuple[str, ...]) -> None:
        """Judge one model."""
        verdict = judge(spec, passes)
        wrong, refused = verdict.faults, verdict.refusals
        self.counts.update(models=1, right=len(verdict.right))
        self.counts.update(refused=len(refused.keys() - wrong), wrong=len(wrong))
        self.refusals.update(kind(reason) for reason in refused.values())
        for name, found in wrong.items():
            what = kind(found[0]), spec.mask, spec.out
            self.failures.setdefault(what, (spec, name, found[0]))

    def join(self, other: "Tally") -> None:
        """Add what another batch found."""
        self.counts.update(other.counts)
        self.refusals.update(other.refusals)
        self.failures = {**other.failures, **self.failures}

    def report(self, shown: int = 5) -> str:
        """Write failures, each with the smallest model that has it."""
        lines = [f"{len(self.failures)} kinds of faults in {self}"]
        for (what, *_), (spec, name, fault) in list(self.failures.items())[:shown]:
            lines += [f"--- {fault}", reproduction(shrunk(spec, name, what), name)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return ", ".join(f"{self.counts[n]} {n}" for n in ("models", "right", "refused", "wrong"))


def batch(number: int, models: int, tally: Tally, passes: int = PASSES) -> None:
    """Judge the models of one seed."""

    @seed(number)
    @settings(
        max_examples=models,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(trials(passes))
    def one(trial: tuple[Spec, tuple[str, ...]]) -> None:
        tally.add(*trial)

    one()


def _fresh_batch(number: int) -> Tally:
    torch.set_num_threads(1)
    tally = Tally()
    batch(number, BATCH, tally)
    return tally


def campaign(pairs: int, first: int = 0, jobs: int = 1) -> Iterator[Tally]:
    """Judge at least so many pairs in so many processes; yield the tally after every batch."""
    tally, numbers = Tally(), itertools.count(first)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=RENEWED) as pool:
        running = {pool.submit(_fresh_batch, next(numbers)) for _ in range(2 * jobs)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for one in done:
                tally.join(one.result())
                if tally.pairs < pairs:
                    running.add(pool.submit(_fresh_batch, next(numbers)))
                yield tally
