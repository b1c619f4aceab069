"""What an answer of an exit loses against the one that is wanted. Free of torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Loss:
    """A loss in [0, 1], by its `title`: `of` takes two answers [B, ..., C] to [B, ...] float64.

    The first is the exit's, the second the one that is wanted. A `labelled` loss is of answers
    [B, C] only, and `of` takes labels [B] as a third. `whole` losses are 0 or 1 at each position.
    """

    title: str
    of: Callable[..., Array]
    whole: bool = False
    labelled: bool = False


def _disagree(got: Array, want: Array) -> Array:
    """Tell for each position whether the largest logit is another."""
    return np.asarray(got.argmax(-1) != want.argmax(-1), np.float64)


def _excess(got: Array, want: Array, labels: Array) -> Array:
    """Tell for each row whether it is wrong by its label where what is wanted is right."""
    wrong, excused = (answer.argmax(-1) != labels for answer in (got, want))
    return np.asarray(wrong & ~excused, np.float64)


def _kl(got: Array, want: Array) -> Array:
    """KL divergence from what is wanted, in nats, of at most 1."""
    p, q = _log_softmax(want), _log_softmax(got)
    return np.asarray(np.clip((np.exp(p) * (p - q)).sum(-1), 0.0, 1.0))


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    made = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return np.asarray(np.maximum(made, -1e4))  # of what is hidden: 0 times infinity is no number


def _cosine(got: Array, want: Array) -> Array:
    """Half of what the cosine lacks to 1: 0 for the same direction, 1 for the opposite."""
    one, two = got.astype(np.float64), want.astype(np.float64)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)
    cosine = (one * two).sum(-1) / np.maximum(lengths, 1e-12)
    return np.asarray(np.clip((1 - cosine) / 2, 0.0, 1.0))


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "disagree": Loss("disagree", _disagree, whole=True),
        "kl": Loss("kl", _kl),
        "cosine": Loss("cosine", _cosine),
        "error": Loss("excess error", _excess, whole=True, labelled=True),
    }
)


def losses_of(kind: str, unit: str, got: Array, want: Array, labels: Array | None = None) -> Array:
    """Return the loss of each unit: of each position, or of each row, the mean over its positions.

    `got` and `want` are [B, ..., C], `labels` [B] where the loss needs them.
    """
    loss = LOSSES[kind]
    assert labels is not None or not loss.labelled, "whoever has a labelled loss has labels"
    found = loss.of(got, want, *([labels] if loss.labelled else []))
    table = found.reshape(len(found), -1)
    return np.asarray(table.reshape(-1) if unit == "token" else table.mean(axis=1))
