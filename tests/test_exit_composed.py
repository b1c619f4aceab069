"""exit-early with other passes: neither changes what the other does."""

from dataclasses import replace

import pytest
import torch

from effopt.exits import NEVER, set_thresholds
from effopt.passes.exit_early import ExitEarly
from effopt.passes.exit_fit import returning
from effopt.pipeline import parse_passes
from effopt.program import Program
from effopt.report import StepRecord
from tests.exit_nets import exits_in, zoo
from tests.programs import apply, draw, normal, run


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave thresholds at infinity, where the pass puts them: what it does last is another test."""
    monkeypatch.delattr(ExitEarly, "finish")


SPEC = "exit-early{epsilon=0.05}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("vit", "prune-tokens{keep=0.5}"),
        ("vit", "merge-tokens{r=2},quantize{scheme=int8-dynamic,least=8}"),
        ("bert_tokens", "merge-tokens{r=2},quantize{scheme=int8-dynamic,least=8}"),
    ],
)
def test_what_follows_does_to_the_model_what_it_does_without_exits(name: str, rest: str) -> None:
    both, given = zoo(name, f"{SPEC},{rest}"), draw(name, 3)
    alone, _ = apply(replace(normal(name), calibration=both.calibration), rest)
    *outputs, index = run(both, given)
    for a, b in zip(run(alone, given), outputs, strict=True):
        assert torch.equal(a, b), "bit for bit"
    assert index.tolist() == [3, 3, 3]
    set_thresholds(both, [-NEVER] * 2)
    early = run(both, given)
    set_thresholds(both, [NEVER] * 2)
    assert early[-1].tolist() == [1, 1, 1]
    # measured 0.007 to 0.23 of the norm: what merged tokens and narrow weights change
    plain = run(returning(zoo(name), list(exits_in(zoo(name)).exits[0].answers.values())), given)
    assert all((a - b).norm() < 0.5 * b.norm() for a, b in zip(early, plain, strict=False))


def test_heads_of_exits_stay_in_float() -> None:
    steps = "quantize{scheme=int8-dynamic,least=8}"
    program, records = run_steps("bert_tokens", f"{SPEC},{steps}")
    left = records[-1].facts["float"]
    assert list(left.values()).count("it is the head of an exit") == 2
    alone = apply(normal("bert_tokens"), steps)[0]
    counted = [sum("quantized" in str(n.target) for n in p.nodes()) for p in (program, alone)]
    assert counted[0] == counted[1]
    taken = run_steps("bert_tokens", f"{SPEC},quantize{{scheme=int8-dynamic,least=8,heads=true}}")
    assert "it is the head of an exit" not in taken[1][-1].facts["float"].values()


def run_steps(name: str, spec: str) -> tuple[Program, tuple[StepRecord, ...]]:
    from effopt.pipeline import Pipeline, Step

    start = replace(normal(name).fork(), calibration=zoo(name).calibration)
    return Pipeline([Step(one) for one in parse_passes(spec)]).run(start)


def test_exits_of_a_pruned_model() -> None:
    program = normal("vit").fork()
    program.calibration = zoo("vit").calibration
    pruned, _ = apply(program, "prune-tokens{keep=0.5,sites=[0]}")
    found, _ = apply(pruned, SPEC)
    given = draw("vit", 3)
    assert torch.equal(run(found, given)[0], run(pruned, given)[0])
