"""What there is to choose from: recipes and targets, by name."""

from typing import TYPE_CHECKING

from effopt.target import TARGETS, Target

if TYPE_CHECKING:
    from effopt.passes.recipes import Recipe


def recipes() -> dict[str, "Recipe"]:
    """Return the recipes by name."""
    from effopt.passes.recipes import RECIPES

    return dict(RECIPES)


def targets() -> dict[str, Target]:
    """Return the targets by name."""
    return dict(TARGETS)
