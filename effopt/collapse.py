"""Many rows that say the same of many blocks, said once."""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import groupby
from typing import TypeVar

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def ranges(numbers: Iterable[int]) -> str:
    """Write numbers in order, runs of them as a range: `0-3, 7`."""
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    spans = ([number for _, number in run] for _, run in runs)
    return ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in spans)


def starred(paths: Sequence[str]) -> str:
    """Write module paths that differ in numbers alone as one: `vit.layers.*.attention`."""
    first, *others = [path.split(".") for path in paths]
    if any(len(words) != len(first) for words in others):
        return paths[0]
    columns = zip(first, *others, strict=True)
    return ".".join(column[0] if len(set(column)) == 1 else "*" for column in columns)


def bare(path: str) -> str:
    """Take the numbers out of a module path, so that the same place in other blocks is equal."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def braced(paths: Sequence[str]) -> str:
    """Write paths with one beginning and one ending as one: `attention.{query, key}.dense`."""
    words = [path.split(".") for path in dict.fromkeys(paths)]
    head = _shared(words)
    rest = [own[head:] for own in words]
    tail = _shared([own[::-1] for own in rest])
    middle = [".".join(own[: len(own) - tail]) for own in rest]
    inside = f"{{{', '.join(middle)}}}" if len(words) > 1 else middle[0]
    ending = words[0][len(words[0]) - tail :] if tail and len(words) > 1 else []
    return ".".join([*words[0][:head], *([inside] if inside else []), *ending])


def _shared(words: Sequence[Sequence[str]]) -> int:
    if len(words) < 2:
        return max(len(words[0]) - 1, 0)
    alike = [len(set(column)) == 1 for column in zip(*words, strict=False)]
    return min([*(n for n, same in enumerate(alike) if not same), *(len(own) for own in words)])


def alike(rows: Iterable[T], key: Callable[[T], K]) -> list[tuple[K, list[T]]]:
    """Gather the rows of each key, in order of the first."""
    found: dict[K, list[T]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.items())
