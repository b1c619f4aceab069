"""How far embeddings move, and whether the nearest neighbours stay the same."""

import numpy as np
from numpy.typing import NDArray

from effopt.errors import UsageError

Floats = NDArray[np.floating]
_SAME = 1e-6  # rows whose cosine is this close to 1 are one embedding in float32
_NEIGHBOURS = 10


def compare(reference: Floats, other: Floats) -> dict[str, float]:
    """Compare two embeddings of the same n sentences.

    Args:
        reference: float [n, d], n > 10, the embeddings of the original model.
        other: float [n, d], those of the changed model.

    Returns:
        `cos_mean`, `cos_min`: cosine of each sentence's two embeddings, their mean and minimum.
        `top1`, `top10`: share of the 1 and the 10 nearest other sentences, by cosine, that agree.
        `rho`: Spearman correlation of the cosines of all pairs of sentences.
        All are 1 for the reference itself.

    Raises:
        UsageError: if the shapes do not fit, a number is not finite, or the reference has equal
            rows. A model that embeds everything alike, as with a broken tokenizer, would look
            perfect.
    """
    _check(reference, other)
    ours, theirs = _unit(reference), _unit(other)
    before, after = ours @ ours.T, theirs @ theirs.T
    upper = np.triu_indices(len(ours), k=1)
    if before[upper].max() > 1 - _SAME:
        raise UsageError(
            "distinct inputs have the same reference embedding",
            "check the tokenizer and the model before measuring quality",
        )
    cosines = np.einsum("nd,nd->n", ours, theirs)
    return {
        "cos_mean": float(cosines.mean()),
        "cos_min": float(cosines.min()),
        "top1": _agreement(before, after, 1),
        "top10": _agreement(before, after, _NEIGHBOURS),
        "rho": float(np.corrcoef(_ranks(before[upper]), _ranks(after[upper]))[0, 1]),
    }


def retrieval(embedding: Floats, count: int = 1) -> float:
    """Share of sentences that have their neighbour in the text among the nearest others.

    Args:
        embedding: float [n, d], of a split of `examples.text.data.sentences`, in its order.
        count: how many nearest others to look at.
    """
    unit = _unit(embedding)
    partner = np.roll(np.arange(len(unit)), len(unit) // 2)
    found = _nearest(unit @ unit.T, count) == partner[:, None]
    return float(found.any(1).mean())


def _check(reference: Floats, other: Floats) -> None:
    if reference.ndim != 2 or reference.shape != other.shape or len(reference) <= _NEIGHBOURS:
        raise UsageError(
            f"embeddings of shapes {reference.shape} and {other.shape} cannot be compared",
            f"pass two arrays [n, d] of one shape, with n above {_NEIGHBOURS}",
        )
    if not (np.isfinite(reference).all() and np.isfinite(other).all()):
        raise UsageError("an embedding is not finite", "look for an overflow in the model")


def _unit(rows: Floats) -> NDArray[np.float64]:
    """Scale rows [n, d] to length 1, in float64; a row of zeros stays."""
    wide = rows.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(length == 0, 1, length)


def _nearest(cosines: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return the indices [n, count] of the nearest others by cosine [n, n], ties by index."""
    others = cosines.copy()
    np.fill_diagonal(others, -np.inf)
    return np.argsort(-others, axis=1, kind="stable")[:, :count]


def _agreement(before: NDArray[np.float64], after: NDArray[np.float64], count: int) -> float:
    ours, theirs = _nearest(before, count), _nearest(after, count)
    return float((ours[:, :, None] == theirs[:, None, :]).sum() / ours.size)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank values [m] from 0, equal values sharing their average rank."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last: NDArray[np.float64] = np.cumsum(sizes) - (sizes + 1) / 2
    return last[group]
