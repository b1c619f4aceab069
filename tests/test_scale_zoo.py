"""Scales are free on the zoo: the groups of every architecture take any positive scale."""

import pytest

from effopt.capture import capture
from effopt.errors import CaptureError
from effopt.program import Program
from tests.architectures import ARCHITECTURES
from tests.check import NORMAL
from tests.programs import apply
from tests.scaling import prove
from tests.thin import thin

FAST = (
    *("vit", "bert", "gpt2", "llama", "t5-encoder", "distilbert", "dinov2", "plain-layerscale"),
    *("plain-matmul", "opt", "deit", "esm-absolute"),
)
"""Of many spellings one: pre and post norms, addmm, grouped heads, gains, explicit products."""


def program_of(name: str) -> Program:
    """Capture a model with a free batch, or with a fixed one where it takes no other."""
    model, inputs = ARCHITECTURES[name].make()
    try:
        program = capture(model, inputs)
    except CaptureError:
        program = capture(model, inputs, dynamic=())
    return apply(program, NORMAL)[0]


@pytest.mark.parametrize("name", thin(FAST, 3))
def test_scales_are_free(name: str) -> None:
    assert prove(program_of(name))["folded"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in FAST])
def test_scales_are_free_on_the_whole_zoo(name: str) -> None:
    try:
        program = program_of(name)
    except CaptureError as error:
        pytest.skip(str(error))
    prove(program)
