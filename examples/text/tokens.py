"""A tokenizer of word pieces in pure Python, and how its vocabulary is learned.

Text is lower-cased and cut into runs of letters, single digits and single other marks. A run of
letters becomes the longest pieces of the vocabulary, from the left; `##` marks a piece that
continues a word, as in BERT. Every letter is a piece, so only marks outside ASCII are unknown.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

VOCABULARY = Path(__file__).with_name("vocabulary.txt")
LENGTH = 64
"""Tokens of an encoded sentence, padding included."""

PAD, UNKNOWN, CLASS, SEPARATOR, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL = (PAD, UNKNOWN, CLASS, SEPARATOR, MASK)
_CONTINUES = "##"
_WORD = re.compile(r"[a-z]+|[^\sa-z]")


def words(text: str) -> list[str]:
    """Cut text, lower-cased, into letter runs, digits and marks."""
    return _WORD.findall(text.lower())


@cache
def vocabulary() -> dict[str, int]:
    """Return the id of every piece, in the order of the committed file."""
    pieces = VOCABULARY.read_text(encoding="utf-8").splitlines()
    return {piece: number for number, piece in enumerate(pieces)}


@cache
def pieces(word: str) -> tuple[str, ...]:
    """Cut one word into the longest pieces of the vocabulary, from the left."""
    known, found, start = vocabulary(), [], 0
    while start < len(word):
        mark = _CONTINUES if start else ""
        ends = range(len(word), start, -1)
        end = next((end for end in ends if mark + word[start:end] in known), None)
        if end is None:
            return (UNKNOWN,)
        found.append(mark + word[start:end])
        start = end
    return tuple(found)


def encode(sentences: Sequence[str]) -> dict[str, Ints]:
    """Encode sentences as the model reads them: class token, pieces, separator, padding.

    What does not fit into 64 tokens is cut off.

    Returns:
        `input_ids` and `attention_mask`, int64 [n, 64] each; the mask is 1 on tokens, 0 on padding.
    """
    known = vocabulary()
    ids = np.full((len(sentences), LENGTH), known[PAD], np.int64)
    mask = np.zeros_like(ids)
    for row, sentence in enumerate(sentences):
        inner = [piece for word in words(sentence) for piece in pieces(word)]
        tokens = [CLASS, *inner[: LENGTH - 2], SEPARATOR]
        ids[row, : len(tokens)] = [known[token] for token in tokens]
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def decode(ids: Iterable[int]) -> str:
    """Join the words that ids [tokens] stand for with single spaces, without special tokens."""
    names = list(vocabulary())
    kept = (names[number] for number in ids if names[number] not in SPECIAL or number == 1)
    return " ".join(kept).replace(f" {_CONTINUES}", "")


# --- learning ---------------------------------------------------------------------------------


def learn(counts: Mapping[str, int], size: int) -> list[str]:
    """Learn pieces by byte-pair encoding (Sennrich et al., 2016, arXiv 1508.07909), on letters.

    Args:
        counts: how often each word occurs.
        size: pieces wanted, special tokens and single characters included.

    Returns:
        The vocabulary. Ties are broken by the alphabet, so it depends on the arguments alone.
    """
    marks = sorted(set(string.printable.lower()) - set(string.whitespace))
    found = [*SPECIAL, *marks, *(_CONTINUES + letter for letter in string.ascii_lowercase)]
    spelled = {word: _spell(word) for word in counts if word.isascii() and word.isalpha()}
    where: dict[tuple[str, str], set[str]] = defaultdict(set)
    total: Counter[tuple[str, str]] = Counter()

    def count(word: str, sign: int) -> None:
        for pair in pairwise(spelled[word]):
            total[pair] += sign * counts[word]
            where[pair].add(word)

    for word in spelled:
        count(word, 1)
    while len(found) < size and total:
        best = min(total, key=lambda pair: (-total[pair], pair))
        joined = best[0] + best[1].removeprefix(_CONTINUES)
        if joined not in found:
            found.append(joined)
        for word in where.pop(best):
            count(word, -1)
            spelled[word] = _merge(spelled[word], best, joined)
            count(word, 1)
        del total[best]
    return found


def _spell(word: str) -> list[str]:
    return [word[0], *(_CONTINUES + letter for letter in word[1:])]


def _merge(spelling: Sequence[str], pair: tuple[str, str], joined: str) -> list[str]:
    """Replace each occurrence of a pair by the two joined."""
    merged: list[str] = []
    for piece in spelling:
        if merged and (merged[-1], piece) == pair:
            merged[-1] = joined
        else:
            merged.append(piece)
    return merged
