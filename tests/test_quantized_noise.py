"""How far an engine with integer layers may be from eager torch: measured, and held to."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import effopt
from effopt.backends.quantized_noise import _rounded, rounding_noise
from effopt.engine import Engine, check, load
from effopt.kernel import kernel
from tests.test_quantize import Net, inputs, quantized
from tests.thin import thin


def test_the_noise_is_what_one_more_rounding_changes() -> None:
    made, _, before = quantized("quantize{scheme=int8-weight}", data=False)
    assert rounding_noise(before) == 0
    (x,) = made.samples
    want = made.run(made.samples)[0]
    # All layers on integer activations by row are the same program with one more rounding, on a
    # grid of twice as many codes. The largest of 128 changes varies: 0.5 to 0.9 was measured.
    rows = made.fork()
    for node in rows.nodes():
        if node.target is kernel("quantized_linear").op:
            node.args = (*node.args[:7], "row", *node.args[8:])
    rows.compile()
    got = rows.run((x,))[0]
    share = float((got - want).abs().max() / want.abs().max())
    assert 0.2 * rounding_noise(made) < share < 2 * rounding_noise(made)


@pytest.mark.parametrize(
    "scheme", thin(["int4-rtn", "int8-weight", "int8-dynamic,activations=row", "int8-dynamic"])
)
def test_an_engine_keeps_within_the_noise_and_a_wrong_scale_does_not(
    tmp_path: Path, scheme: str
) -> None:
    made = effopt.optimize(Net().eval(), inputs(2), recipe=f"quantize{{scheme={scheme}}}")
    made.save(tmp_path / "made", measure=False)
    engine = load(tmp_path / "made")
    (figure,) = check(engine)
    noise = engine.manifest["facts"]["integer_noise"]
    assert 0 < figure.difference < figure.tolerance == pytest.approx(3 * noise)

    class Wrong:
        """The engine with an output that is too large by five times the noise."""

        def run(self, given: list[np.ndarray]) -> list[np.ndarray]:
            return [out * np.float32(1 + 5 * noise) for out in engine.run(given)]

    assert not check(Engine(engine.folder, engine._manifest, Wrong()))[0].ok


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = effopt.optimize(Net().eval(), inputs(2), recipe="quantize{scheme=int8-weight}")
    return made.save(tmp_path_factory.mktemp("noise") / "made", measure=False)


@pytest.mark.parametrize("odd", ["much", 1e9, float("inf"), float("nan"), -1.0, None, True])
def test_a_folder_cannot_ask_for_any_tolerance(folder: Path, odd: object) -> None:
    engine = load(folder)
    facts = {**engine._manifest.facts, "integer_noise": odd}
    hostile = Engine(engine.folder, replace(engine._manifest, facts=facts), engine._runner)
    assert check(hostile)[0].tolerance <= 0.4


def test_inputs_of_zeros_have_no_noise() -> None:
    made, _, _ = quantized("quantize{scheme=int8-weight}", data=False)
    quiet = replace(made, samples=(torch.zeros_like(made.samples[0]),))
    assert np.isfinite(rounding_noise(quiet))


class Hides(Net):
    """Logits of which half are hidden."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).masked_fill(torch.arange(64) % 2 == 0, -torch.inf)


def test_outputs_that_are_infinite_do_not_count(tmp_path: Path) -> None:
    made, _, _ = quantized("quantize{scheme=int8-weight}", Hides(), data=False)
    assert 0 < rounding_noise(made) < 1
    spec = "quantize{scheme=int8-weight}"
    effopt.optimize(Hides().eval(), inputs(2), recipe=spec).save(tmp_path / "made", measure=False)
    assert check(load(tmp_path / "made"))[0].ok


def test_a_row_of_zeros_in_half_precision_has_no_noise() -> None:
    made, _, _ = quantized("quantize{scheme=int4-rtn}", data=False, machine="a100")
    x = torch.ones(2, 3, dtype=torch.float16)
    x[0] = 0
    assert torch.equal(_rounded(x), x)
    assert np.isfinite(rounding_noise(made))
