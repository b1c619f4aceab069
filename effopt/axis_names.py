"""Names of token axes: after the module whose attention calls attend over them."""

from collections.abc import Sequence
from itertools import takewhile

TYPES = ("_model", "_tower", "_encoder")
"""Endings that say what a module is and not what it is for: `vision_tower` makes vision.tokens."""


def axis_names(paths: Sequence[Sequence[str]]) -> list[str]:
    """Name each axis after the first part of its calls' module paths that tells it from others.

    `paths` lists, for each axis, the module paths of its attention calls. A single axis is
    `tokens`; those of a vision and a text tower are `vision.tokens` and `text.tokens`.
    """
    if len(paths) == 1:
        return ["tokens"]
    stems = [_common([path.split(".") for path in own]) for own in paths]
    shared = len(_common(stems))
    names = [_name(stem, shared) for stem in stems]
    return [
        name if names.count(name) == 1 else f"{name[: -len('.tokens')]}.{place}.tokens"
        for place, name in enumerate(names)
    ]


def _common(parts: Sequence[Sequence[str]]) -> list[str]:
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return [column[0] for column in alike]


def _name(stem: list[str], shared: int) -> str:
    """Take the first part beyond what all share; a number needs the part ahead of it."""
    if len(stem) <= shared:
        return ".".join([*stem[-1:], "tokens"])
    part = stem[shared]
    if part.isdigit() and shared:
        return f"{stem[shared - 1]}.{part}.tokens"
    ending = next((end for end in TYPES if part.endswith(end) and part != end), "")
    return f"{part.removesuffix(ending)}.tokens"
