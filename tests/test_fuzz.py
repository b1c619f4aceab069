"""Random transformers in random spellings: each pass is refused with a reason, or right.

`make test` tries some 150 pairs of a model and a pass; `make fuzz N=20000` that many. A fault is
shown as code that makes the smallest model of its kind.
"""

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.judge import judge, kind, reproduction, shrunk
from tests.fuzz.spec import Spec
from tests.fuzz.strategy import trials

EXAMPLES = int(os.environ.get("EFFOPT_FUZZ", "150"))
"""Pairs of a model and a pass."""

PASSES = 6
"""Passes tried on a model: capture is what takes time."""

SHARD = 480
SHARDS = max(2, EXAMPLES // SHARD)
"""Each shard is one test: so a long run shows how far it is, and two processes share it."""

SHOWN = 5
Failure = tuple[Spec, str, str]


def campaign(number: int, models: int) -> tuple[Counter[str], dict[str, Failure]]:
    """Judge random models; return how many pairs came out how, and one failure of each kind."""
    counts: Counter[str] = Counter()
    failures: dict[str, Failure] = {}

    @seed(number)
    @settings(
        max_examples=models,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(trials(PASSES))
    def one(trial: tuple[Spec, tuple[str, ...]]) -> None:
        spec, passes = trial
        verdict = judge(spec, passes)
        counts.update(right=len(verdict.right), refused=len(verdict.refusals))
        for name, found in verdict.faults.items():
            failures.setdefault(kind(found[0]), (spec, name, found[0]))

    one()
    return counts, failures


def report(failures: dict[str, Failure]) -> str:
    """Write each failure with the smallest model that has it."""
    lines = []
    for what, (spec, name, fault) in list(failures.items())[:SHOWN]:
        lines += [f"--- {fault}", reproduction(shrunk(spec, name, what), name)]
    return "\n".join([f"{len(failures)} kinds of faults", *lines])


@pytest.mark.timeout(0)
@pytest.mark.parametrize("number", range(SHARDS))
def test_random_models_are_reduced_rightly_or_refused(number: int) -> None:
    counts, failures = campaign(number, max(EXAMPLES // SHARDS // PASSES, 1))
    assert not failures, report(failures)
    assert counts["right"] > 0.2 * counts.total(), f"hardly anything is reduced: {counts}"
