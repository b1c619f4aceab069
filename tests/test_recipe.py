"""Recipes that are given as lists of passes."""

from typing import Any

import pytest

from effopt.errors import UsageError
from effopt.pipeline import pass_class
from effopt.recipe import steps_of


def test_the_class_of_a_pass_is_told_from_a_pass() -> None:
    wrong: Any = [pass_class("merge-tokens")]
    with pytest.raises(UsageError, match="the class MergeTokens") as caught:
        steps_of(wrong)
    assert caught.value.remedy == "write MergeTokens(...), such as MergeTokens(r=8)"
