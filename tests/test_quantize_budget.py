"""max-loss: the fewest sensitive layers stay in float, so that outputs keep within a budget."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from effopt.capture import capture
from effopt.errors import PreconditionError, UsageError
from effopt.passes.quantizable import layers_of
from effopt.passes.quantize import Quantize
from effopt.passes.sensitivity import Trial, by_sensitivity, within_budget
from effopt.pipeline import Pipeline, parse_passes
from effopt.recipe import steps_of
from effopt.target import target
from tests.test_quantize import Net, distance, program, quantized


def trial_of(spec: str = "int4-rtn") -> tuple[Trial, list]:  # type: ignore[type-arg]
    made = program(Net())
    plan = Quantize(spec)._plan(made)
    return Trial(made, plan), layers_of(made, 64, heads=False)[0]  # type: ignore[arg-type]


def test_the_fewest_layers_that_keep_within_the_budget_are_left_out() -> None:
    trial, layers = trial_of()
    order = [layer for layer, _ in by_sensitivity(trial, layers)]
    losses = [trial.loss(order[count:]) for count in range(len(order))]
    assert all(later <= earlier for earlier, later in pairwise(losses)), "true of this model"
    for kept in (1, 4, 11):
        found, loss = within_budget(trial, layers, losses[kept] * 1.0001)
        assert found == order[:kept]
        assert loss == losses[kept]


def test_a_budget_that_all_layers_keep_within_leaves_none_out() -> None:
    trial, layers = trial_of("int8-weight")
    found, loss = within_budget(trial, layers, 0.5)
    assert found == []
    assert loss == trial.loss(layers)


def test_a_budget_that_no_layer_keeps_within_is_refused() -> None:
    with pytest.raises(PreconditionError, match="each layer alone loses") as caught:
        quantized("quantize{scheme=int4-rtn,max-loss=1e-12}")
    assert "raise max-loss" in caught.value.remedy


def test_the_result_and_the_report_say_so() -> None:
    made, record, before = quantized("quantize{scheme=int4-rtn,max-loss=0.002}")
    left = [why for why in record.facts["float"].values() if "most sensitive" in why]
    assert 0 < len(left) < 12
    assert record.notes[1].startswith("the outputs change by 0.00")
    # Inputs that the budget was not measured on: 0.0016 was measured.
    assert distance(made, before) < 0.003


def test_two_ways_to_say_what_stays_are_one_too_many() -> None:
    with pytest.raises(UsageError, match="both say which layers"):
        parse_passes("quantize{scheme=int4-rtn,max-loss=0.1,keep-float=2}")


def test_the_budget_holds_for_the_result_and_not_for_a_guess() -> None:
    """Tables are rounded too, which no trial of layers sees."""
    torch.manual_seed(0)
    words = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    with torch.no_grad():
        words[0].weight[:, 0] = 100  # the other channels of a row share its scale
    made = replace(capture(words.eval(), torch.randint(0, 100, (2, 9))), target=target("cpu"))
    spec = "quantize{scheme=int8-weight,embeddings=true,heads=true,max-loss=1e-4}"
    with pytest.raises(PreconditionError, match="above max-loss"):
        Pipeline(steps_of(spec)).run(made)
    Pipeline(steps_of(spec.replace("1e-4", "1e-2"))).run(made)
