"""From what a user calls a recipe to the steps of a pipeline."""

from collections.abc import Sequence
from string import Template
from typing import Any

from effopt.errors import UsageError, unknown
from effopt.pipeline import Pass, Step, make_pass, parse_passes
from effopt.spec import Item, parse, show


def steps_of(recipe: str | Sequence[Pass]) -> list[Step]:
    """Resolve a recipe's name, a spec string, a mix of both, or a list of passes.

    The normal form comes first, whatever is asked. Raises UsageError for unknown names (with the
    nearest) and wrong options.
    """
    from effopt.passes.recipes import NORMAL_FORM

    normal = [Step(step) for step in parse_passes(NORMAL_FORM)]
    if not isinstance(recipe, str):
        return normal + [Step(_as_pass(step)) for step in recipe]
    items = parse(recipe) if recipe.strip() else []
    return normal + [step for item in items for step in _resolve(item)]


def _resolve(item: Item) -> list[Step]:
    from effopt.passes import TABLE
    from effopt.passes.recipes import RECIPES

    if item.name in TABLE:
        return [Step(make_pass(item))]
    if item.name not in RECIPES:
        raise unknown("recipe or pass", item.name, [*TABLE, *RECIPES])
    row = RECIPES[item.name]
    for key in item.options:
        if key not in row.options:
            raise unknown(f"option of recipe {item.name}", key, row.options)
    values = {**row.options, **{key: show(value) for key, value in item.options.items()}}
    spec = Template(row.spec).substitute(values)
    return [Step(step, row.optional) for step in (parse_passes(spec) if spec else [])]


def _as_pass(step: Any) -> Pass:
    if not (hasattr(step, "run") and hasattr(step, "check")):
        reason = f"a recipe's list holds a {type(step).__name__}, which is no pass"
        raise UsageError(reason, "list passes, such as MergeTokens(r=8)")
    if isinstance(step, type):
        reason = (
            f"a recipe's list holds the class {step.__name__}, not a pass made with its options"
        )
        raise UsageError(reason, f"write {step.__name__}(...), such as MergeTokens(r=8)")
    found: Pass = step
    return found
