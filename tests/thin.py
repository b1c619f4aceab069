"""Cases of one kind: some in the default set, all in the slow one."""

from collections.abc import Iterable
from typing import Any

import pytest


def thin(cases: Iterable[Any], every: int = 2) -> list[Any]:
    """Keep the first of each `every` cases in the default set; the others are slow."""
    slow = pytest.mark.slow
    return [
        case if place % every == 0 else pytest.param(case, marks=slow)
        for place, case in enumerate(cases)
    ]
