"""Spec strings: `merge-tokens{r=8,first=2},simplify` is a list of names with options.

spec   = item ("," item)*
item   = name [ "{" option ("," option)* "}" ]
option = key "=" value;  value = int | float | true | false | word | "[" value ("," value)* "]"
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from effopt.errors import UsageError

Value = int | float | bool | str | tuple["Value", ...]

_TOKEN = re.compile(r"\s*([A-Za-z_][\w.-]*|[-+]?\d[\w.+:-]*|[{}\[\],=])")
_REMEDY = "write name{key=value,...},name,... as in merge-tokens{r=8,first=2}"


@dataclass(frozen=True)
class Item:
    """One name with its options, as written."""

    name: str
    options: dict[str, Value]

    def __str__(self) -> str:
        inside = ",".join(f"{key}={show(value)}" for key, value in self.options.items())
        return f"{self.name}{{{inside}}}" if inside else self.name


def show(value: Any) -> str:
    """Write one option's value so that `parse` reads the same value back."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{','.join(show(item) for item in value)}]"
    return str(value)


def parse(text: str) -> list[Item]:
    """Read a spec string; a UsageError points at the first place that does not fit."""
    reader = _Reader(text)
    items = [reader.item()]
    while reader.take(","):
        items.append(reader.item())
    reader.expect_end()
    return items


class _Reader:
    """A cursor over the tokens of one spec string."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0

    def peek(self) -> str:
        found = _TOKEN.match(self.text, self.place)
        return found.group(1) if found else ""

    def next(self) -> str:
        found = _TOKEN.match(self.text, self.place)
        if found is None:
            raise self.error()
        self.place = found.end()
        return found.group(1)

    def take(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self.next()
        return True

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise self.error(f"expected {token!r}")

    def expect_end(self) -> None:
        if self.text[self.place :].strip():
            raise self.error("expected ',' or the end")

    def word(self) -> str:
        if not re.match(r"[A-Za-z_]", self.peek()):
            raise self.error("expected a name")
        return self.next()

    def item(self) -> Item:
        name, options = self.word(), dict[str, Value]()
        if self.take("{") and not self.take("}"):
            self.option(options)
            while self.take(","):
                self.option(options)
            self.expect("}")
        return Item(name, options)

    def option(self, options: dict[str, Value]) -> None:
        key = self.word().replace("-", "_")
        if key in options:
            raise self.error(f"option {key!r} is given twice")
        self.expect("=")
        options[key] = self.value()

    def value(self) -> Value:
        if self.take("["):
            items = [] if self.peek() == "]" else [self.value()]
            while self.take(","):
                items.append(self.value())
            self.expect("]")
            return tuple(items)
        token = self.next()
        if token in "{}],=":
            raise self.error("expected a value")
        found = _scalar(token)
        if isinstance(found, float) and not math.isfinite(found):
            raise self.error(f"{token} is no finite number")
        return found

    def error(self, why: str = "cannot be read") -> UsageError:
        return UsageError(f"spec {self.text!r}: {why} at character {self.place}", _REMEDY)


def _scalar(token: str) -> Value:
    if token in ("true", "false"):
        return token == "true"
    for kind in (int, float):
        try:
            return kind(token)
        except ValueError:
            continue
    return token
