"""Words and figures made fit to print: a model's names may hold anything at all."""

import math
import unicodedata
from typing import Any

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that no terminal or page must get: controls, direction marks, surrogates."""

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_COUNT_UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def clean(text: object) -> str:
    r"""Return the text on one line, with every control character spelt out (`\x1b`)."""
    return "".join(_shown(char) if _hidden(char) else char for char in str(text))


def clean_lines(text: object) -> str:
    """Clean each line, keep the line breaks: for our own text that holds a model's names."""
    return "\n".join(clean(line) for line in str(text).split("\n"))


def _hidden(char: str) -> bool:
    return unicodedata.category(char) in _HIDDEN


def _shown(char: str) -> str:
    return (
        char.encode("unicode_escape").decode("ascii") if ord(char) < 128 else f"\\u{ord(char):04x}"
    )


def shorten(text: str, width: int) -> str:
    """Cut the middle out of a text that is longer than `width` characters."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def figure(value: float | None, digits: int = 3) -> str:
    """Write a number with so many significant digits and no exponent; "-" where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0 or abs(value) >= 10**digits:
        return f"{value:.0f}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, min(places, 9))}f}"


def time_text(milliseconds: float) -> str:
    """Write milliseconds to three digits, and to no finer than a tenth of a microsecond."""
    return figure(milliseconds) if milliseconds >= 0.1 else f"{milliseconds:.4f}"


def bytes_text(count: int) -> str:
    """Write a size in bytes with its binary unit: 1536 is `1.50 KiB`."""
    place = min(max(count, 1).bit_length() // 10, len(_BYTE_UNITS) - 1) if count >= 1024 else 0
    scaled = count / 1024**place
    return f"{count} B" if place == 0 else f"{figure(scaled)} {_BYTE_UNITS[place]}"


def count_text(count: float, unit: str) -> str:
    """Write a count with its decimal prefix: `count_text(4.6e9, "MACs")` is `4.60 GMACs`."""
    for prefix, scale in _COUNT_UNITS:
        if count >= scale:
            return f"{figure(count / scale)} {prefix}{unit}"
    return f"{figure(count)} {unit}"


def change_text(before: float, after: float) -> str:
    """Write a change in per cent, signed: `-41 %`; "" where there is nothing to compare with."""
    if not before:
        return ""
    percent = 100.0 * (after - before) / before
    return "unchanged" if abs(percent) < 0.05 else f"{percent:+.{1 if abs(percent) < 10 else 0}f} %"


def json_ready(value: Any) -> Any:
    """Turn tuples into lists, and figures that JSON has no word for (NaN, infinity) into None."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
