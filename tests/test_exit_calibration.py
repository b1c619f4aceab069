"""Thresholds of exits: calibrated on the engine of the whole pipeline, and void if it changes."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import effopt
from effopt.backend import as_array
from effopt.calibration import read_calibration
from effopt.errors import PreconditionError
from effopt.exits import probe
from effopt.optimizer import Optimized
from effopt.passes.exit_calibration import said
from effopt.passes.exit_rows import fit_rows
from effopt.pipeline import Pipeline
from effopt.promise import Promise
from effopt.recipe import steps_of
from effopt.risk import least_samples
from tests import exit_nets, zoo
from tests.check import Check
from tests.thin import thin

SAMPLES, BATCH = 400, 25


def batches() -> list[dict[str, Tensor]]:
    """Draw images whose brightness says how far they are from the border of two classes."""
    draw = torch.Generator().manual_seed(3)
    images = torch.randn(SAMPLES, 3, 32, 32, generator=draw)
    images = images + 2 * torch.randn(SAMPLES, 1, 1, 1, generator=draw)
    return [{"pixel_values": part} for part in images.split(BATCH)]


def converted(options: str, more: str = "", target: str = "onnx") -> Optimized:
    """Convert the ViT of the zoo; the file of the target "onnx" runs in onnxruntime as well."""
    model, inputs = zoo.make("vit")
    recipe = f"exact,exit-early{{{options}}}{more}"
    return effopt.optimize(model, inputs, recipe=recipe, target=target, calibration=batches())


@functools.cache
def usual() -> Optimized:
    """Return the model with one exit, at a loss that random weights can keep."""
    return converted("cuts=1,epsilon=0.04,pool=first-mean")


def promise_of(optimized: Optimized) -> Promise:
    """Return the promise, as the report keeps it."""
    (facts,) = [step.facts for step in optimized.report.steps if "promise" in step.facts]
    made = Promise.from_json(json.loads(json.dumps(facts["promise"])))
    assert made == optimized.program.promise
    return made


def test_the_promise_is_what_the_rows_say() -> None:
    """Scores and answers in eager, and the rule by hand: the same threshold, risk and shares."""
    optimized = usual()
    promise, program = promise_of(optimized), optimized.program
    images = torch.cat([batch["pixel_values"] for batch in batches()])
    with torch.no_grad():
        score, early, end = (as_array(x) for x in probe(program, "logits").run((images,)))
    kept = ~fit_rows(SAMPLES, 0.4).numpy()
    assert promise.samples == kept.sum() == 240
    assert promise.fitted == 160
    (tau,) = promise.tau
    leaves = score[kept] >= tau
    wrong = early.argmax(1)[kept] != end.argmax(1)[kept]
    assert 0 < leaves.sum() < 240
    assert promise.risk == pytest.approx((leaves & wrong).mean(), abs=1e-9)
    assert promise.shares == pytest.approx([leaves.mean(), 1 - leaves.mean()], abs=1e-9)
    from scipy.stats import binom

    assert binom.cdf((leaves & wrong).sum(), 240, 0.04) <= 0.05  # and the next threshold fails:
    (after,) = promise.grid[promise.index + 1]
    more = ((score[kept] >= after) & wrong).sum()
    assert binom.cdf(more, 240, 0.04) > 0.05


def test_a_threshold_is_a_little_safer_than_the_grid() -> None:
    """A batch of another size gives other last digits: no row may leave by them."""
    promise = promise_of(usual())
    (chosen,) = promise.grid[promise.index]
    assert chosen < promise.tau[0] < chosen + 1e-3 * abs(chosen)


def test_the_folder_keeps_thresholds_and_promise(tmp_path: Path) -> None:
    optimized = usual()
    engine = effopt.load(optimized.save(tmp_path / "out", measure=False))
    assert [(spec.name, spec.default) for spec in engine.signature.inputs] == [
        ("pixel_values", None),
        ("tau", promise_of(optimized).tau),
    ]
    assert Promise.from_json(engine.manifest["facts"]["exits"]["promise"]) == promise_of(optimized)
    images = as_array(batches()[0]["pixel_values"])
    own, never = engine(images), engine(images, tau=[np.inf])
    assert set(own["exit_index"].tolist()) == {1, 2}
    assert never["exit_index"].tolist() == [2] * BATCH
    late = own["exit_index"] == 2
    assert np.allclose(own["logits"][late], never["logits"][late], atol=1e-5)
    assert not np.allclose(own["logits"][~late], never["logits"][~late], atol=1e-3)


def test_a_pass_behind_calibration_is_refused() -> None:
    with pytest.raises(PreconditionError, match="its exits are calibrated") as found:
        Pipeline(steps_of("quantize{scheme=int8-dynamic,least=16}")).run(usual().program)
    assert "one recipe" in str(found.value)


def test_passes_of_one_recipe_come_first_wherever_they_stand() -> None:
    """Calibration sees the quantized engine, though exit-early stands ahead of quantize."""
    optimized = converted("cuts=1,epsilon=0.3", ",quantize{scheme=int8-dynamic,least=16}")
    assert [step.spec for step in optimized.report.steps][-2:] == [
        "quantize{scheme=int8-dynamic,least=16}",
        "exit-early (finish)",
    ]
    assert promise_of(optimized).graph != promise_of(usual()).graph
    (*_, shared) = optimized.report.steps[-1].notes
    assert "activations=row" in shared  # of the batch, as int8-dynamic goes by tensor


def test_one_changed_weight_voids_the_promise(tmp_path: Path) -> None:
    optimized = converted("cuts=1,epsilon=0.3")
    weight = next(
        optimized.program.weight(node)
        for node in optimized.program.nodes()
        if str(node.target).endswith("classifier.weight")
    )
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    with pytest.raises(PreconditionError, match="promise is void"):
        optimized.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Shuffled:
    """Data that comes in another order each time, as of a DataLoader that shuffles."""

    def __init__(self) -> None:
        self.times = 0

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.times += 1
        order = torch.randperm(
            SAMPLES // BATCH, generator=torch.Generator().manual_seed(self.times)
        )
        data = batches()
        return iter([data[place] for place in order.tolist()])


def test_shuffled_data_is_refused() -> None:
    """A sample that fits a head must not calibrate: places have to mean the same samples."""
    model, inputs = zoo.make("vit")
    with pytest.raises(PreconditionError, match="not in the order"):
        effopt.optimize(
            *(model, inputs),
            recipe="exit-early{cuts=1,epsilon=0.3}",
            target="onnx",
            calibration=Shuffled(),
        )


def test_too_few_samples_are_refused_with_the_number() -> None:
    least = least_samples("ltt", 0.01, 0.05)
    assert least == 299
    with pytest.raises(PreconditionError, match=f"needs {least} samples to calibrate"):
        converted("cuts=1")


def test_an_engine_that_differs_by_itself_cannot_promise_to_agree_with_the_original() -> None:
    with pytest.raises(PreconditionError, match="setting 0, the safest, loses") as found:
        converted(
            "cuts=1,epsilon=0.02,reference=original,rule=crc",
            ",quantize{scheme=int4-rtn,group=16,least=16}",
        )
    assert "larger epsilon" in str(found.value)


@pytest.mark.parametrize("rule", thin(["crc", "wsr"]))
def test_other_rules_promise_as_well(rule: str) -> None:
    promise = promise_of(converted(f"cuts=1,epsilon=0.3,rule={rule},loss=kl"))
    assert promise.rule == rule
    assert promise.delta == (None if rule == "crc" else 0.05)
    assert 0 < promise.risk <= 0.3


def test_where_nothing_may_leave_it_is_said() -> None:
    promise = replace(promise_of(usual()), index=0, tau=(np.inf,), shares=(0.0, 1.0))
    (words,) = said(promise, usual().program)
    assert words.startswith("no row may leave: no threshold keeps disagree against")


def test_a_model_in_half_precision_is_calibrated() -> None:
    """In eager: numpy has no bfloat16."""
    net, batches = exit_nets.Net(exit_nets.logits), exit_nets.data()
    tester = Check(net.bfloat16(), torch.randn(2, exit_nets.TOKENS, 4).bfloat16()).normal()
    given = [batch.bfloat16() for batch in batches]
    tester.program.calibration = read_calibration(given, tester.program)
    promise = tester.run("exit-early{cuts=1,epsilon=0.05}").program.promise
    assert promise is not None
    assert promise.samples == 120
