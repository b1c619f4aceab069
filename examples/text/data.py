"""Sentences about Python: the language reference and the docstrings that every Python carries.

Evaluation and calibration come from `pydoc_data.topics`, the text behind `help()`; training uses
the rest of it and the docstrings of the standard library. The text differs between versions of
Python, so what is held out follows from a hash of each sentence's words: a sentence has the same
role wherever it occurs, and none that a model is evaluated on has been trained on.
"""

import ast
import hashlib
import pydoc_data.topics
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from effopt.errors import UsageError
from examples.text.tokens import encode as encode

Split = Literal["calibration", "evaluation"]
Passage = list[str]

_PAIRS: dict[Split, slice] = {"evaluation": slice(0, 256), "calibration": slice(256, 320)}
_HELD_OUT = 0.25  # share of the sentences that begin a held-out pair, where one can begin
_WORDS = range(8, 41)
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z\"'`(\[*])")
_NOT_PROSE = re.compile(r">>>|::=")
_SKIPPED = {"site-packages", "test", "tests"}


def sentences(split: Split) -> list[str]:
    """Return the sentences of a split, in a fixed order: 512 to evaluate on, 128 to calibrate on.

    The second half are the sentences that follow those of the first half in the text, in the same
    order: with n sentences, number i belongs with number (i + n / 2) modulo n.

    Raises:
        UsageError: if this Python's own text has too few sentences.
    """
    pairs, wanted = _held_out(), _PAIRS[split]
    if len(pairs) < wanted.stop:
        raise UsageError(
            f"pydoc_data.topics of this Python yields {len(pairs)} of {wanted.stop} sentence pairs",
            "use a CPython of 3.11 or later that was built with its documentation topics",
        )
    first, second = zip(*pairs[wanted], strict=True)
    return [*first, *second]


def training_passages() -> list[Passage]:
    """Return the training text: lists of sentences that follow each other.

    No sentence occurs twice, and none is in the calibration or evaluation split.
    """
    seen = {_key(sentence) for pair in _held_out() for sentence in pair}
    passages = (_unseen(passage, seen) for passage in [*_topics(), *_docstrings()])
    return [passage for passage in passages if passage]


def _split(text: str) -> Passage:
    """Cut text into sentences of 8 to 40 words, without code and grammar."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    cut = (_SENTENCE_END.split(part) for part in paragraphs if not _NOT_PROSE.search(part))
    return [one for part in cut for one in part if len(one.split()) in _WORDS]


def _key(sentence: str) -> str:
    """Return what makes a sentence the same: its words, whatever their case and punctuation."""
    return " ".join(re.findall(r"[a-z0-9]+", sentence.lower()))


def _place(sentence: str) -> float:
    """Hash a sentence's words to a number in 0..1."""
    digest = hashlib.sha256(_key(sentence).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _unseen(passage: Passage, seen: set[str]) -> Passage:
    """Keep the sentences that are new, and note them as seen."""
    kept = []
    for sentence in passage:
        key = _key(sentence)
        if key not in seen:
            seen.add(key)
            kept.append(sentence)
    return kept


def _topics() -> Iterator[Passage]:
    for _, text in sorted(pydoc_data.topics.topics.items()):
        yield _split(text)


@cache
def _held_out() -> tuple[tuple[str, str], ...]:
    """Pairs of neighbouring sentences that are not trained on, in the order of their hash."""
    seen: set[str] = set()
    pairs = []
    for passage in _topics():
        rest = iter(_unseen(passage, seen))
        for sentence in rest:
            if _place(sentence) < _HELD_OUT and (follower := next(rest, None)) is not None:
                pairs.append((sentence, follower))
    return tuple(sorted(pairs, key=lambda pair: _place(pair[0])))


def _docstrings() -> Iterator[Passage]:
    """Read the docstrings of the standard library's source, without importing it."""
    library = Path(sysconfig.get_path("stdlib"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.rglob("*.py")):
        if _SKIPPED.intersection(path.relative_to(library).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield _split(text)
