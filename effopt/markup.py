"""Markup that is safe by construction: every text is escaped unless it is Markup already."""

import html
import json
from typing import Any

from effopt.plain import clean


class Markup(str):
    """Text that is HTML or SVG; a plain `str` is text from elsewhere and gets escaped."""

    __slots__ = ()


Child = str | float | None
_VOID = frozenset({"meta", "rect", "line", "path", "circle"})


def escaped(text: Child) -> Markup:
    """Escape a text for content and for attributes alike; Markup passes, None is nothing."""
    if isinstance(text, Markup):
        return text
    return Markup("" if text is None else html.escape(clean(text), quote=True))


def tag(name: str, /, *children: Child, **attributes: Child) -> Markup:
    """Make an element; `class_` is class, `stroke_width` is stroke-width; None is left out."""
    pairs = ((key.rstrip("_").replace("_", "-"), v) for key, v in attributes.items())
    inside = "".join(f' {key}="{escaped(_short(v))}"' for key, v in pairs if v is not None)
    if name in _VOID and not children:
        return Markup(f"<{name}{inside}>" if name == "meta" else f"<{name}{inside}/>")
    return Markup(f"<{name}{inside}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """Put pieces side by side."""
    return Markup("".join(escaped(child) for child in children))


def island(record: Any) -> Markup:
    """Embed JSON as a data block that no browser runs and that cannot end its element."""
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    safe = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(f'<script type="application/json" id="report">{safe}</script>')


def _short(value: Child) -> Child:
    """Round a coordinate to what a screen can show."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
