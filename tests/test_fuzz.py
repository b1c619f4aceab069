"""Random transformers in random spellings: each pass is refused with a reason, or right.

`make test` tries some 150 pairs of a model and a pass; `make fuzz N=20000` that many, and shows
how far it is. A fault is shown as code that makes the smallest model of its kind.
"""

import pytest

from tests.fuzz.campaign import Tally, batch
from tests.thin import thin

MODELS = 4
"""Models a test, each with a dozen passes."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", thin(range(2)))
def test_random_models_are_reduced_rightly_or_refused(number: int) -> None:
    tally = Tally()
    batch(number, MODELS, tally)
    assert not tally.failures, tally.report()
    assert tally.counts["right"] > 0.2 * tally.pairs, f"hardly anything is reduced: {tally}"
