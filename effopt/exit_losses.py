"""From scores of exits to losses: thresholds, which exit each row takes, and what that loses.

Exits are numbered 1 to E, and E + 1 is the end of the model. A row may leave at exit e where its
score is at least the threshold of e (`>=`, everywhere); a threshold of +inf never lets it, whatever
the score. A path is K + 1 rows of thresholds, from row 0 that never exits to ever lower ones.
Free of torch.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from effopt.errors import UsageError

Array = NDArray[Any]


def grid(scores: ArrayLike, count: int = 200, *, shared: bool = True) -> Array:
    """Make a path [count + 1, E] from the scores [n, E] of rows that are not calibrated on.

    By row k, a share k / count of the scores is at its threshold or above. With `shared`, all
    exits have one threshold, from the scores of all exits together; else each has its own, from
    its own scores. Thresholds are scores and have their type, so comparing them rounds nothing.
    """
    if count < 1:
        raise UsageError(f"a grid of {count} steps", "ask for one step or more")
    given = _scores(scores)
    pool = np.sort(given.reshape(-1, 1) if shared else given, axis=0)[::-1]
    places = -(-len(pool) * np.arange(1, count + 1) // count) - 1
    never = np.full((1, given.shape[1]), np.inf, given.dtype)
    return np.concatenate([never, np.broadcast_to(pool[places], (count, given.shape[1]))])


def exits_taken(scores: ArrayLike, thresholds: ArrayLike) -> NDArray[np.int64]:
    """Return the exit, 1 to E + 1, at which each row leaves: [n], int64.

    Scores are [n, E]. Thresholds are [E], or a path [K+1, E], for which the exits are [n, K+1].
    """
    given = _scores(scores)
    limits = np.asarray(thresholds)
    leaves = _leaves(given, _path(limits, given) if limits.ndim == 2 else _limits(limits, given))
    last = np.ones((*leaves.shape[:-1], 1), np.bool_)
    return np.asarray(np.argmax(np.concatenate([leaves, last], axis=-1), axis=-1) + 1, np.int64)


def any_exit_losses(
    scores: ArrayLike, losses: ArrayLike, thresholds: ArrayLike, base: ArrayLike | None = None
) -> Array:
    """Return the largest loss [n, K+1] among all exits at which a row may leave, and the end.

    Scores and losses are [n, E], thresholds a path [K+1, E], `base` [n] the losses of the model
    that never exits: 0 unless it is judged by another one. The result does not fall along a row,
    and is at least the loss of any form of batching, in which a row may stay longer than it must
    because of others.
    """
    leaves, each, table = _start(scores, losses, thresholds, base)
    for number in range(each.shape[1]):
        table = np.maximum(table, np.where(leaves[..., number], each[:, number, None], table))
    return table


def plain_losses(
    scores: ArrayLike, losses: ArrayLike, thresholds: ArrayLike, base: ArrayLike | None = None
) -> Array:
    """Return the loss [n, K+1] of the exit that each row takes; arguments as `any_exit_losses`.

    It may fall along a row: at a lower threshold a row can leave earlier, and right.
    """
    leaves, each, table = _start(scores, losses, thresholds, base)
    for number in reversed(range(each.shape[1])):
        table = np.where(leaves[..., number], each[:, number, None], table)
    return table


def _start(
    scores: ArrayLike, losses: ArrayLike, thresholds: ArrayLike, base: ArrayLike | None
) -> tuple[NDArray[np.bool_], Array, Array]:
    """Return where rows may leave [n, K+1, E], losses [n, E], and those of never [n, K+1]."""
    given = _scores(scores)
    each, path = _numbers("losses", losses), _path(np.asarray(thresholds), given)
    if each.shape != given.shape:
        raise _odd("losses", each, given.shape)
    never = np.zeros(len(given)) if base is None else _numbers("losses of never exiting", base)
    if never.shape != given.shape[:1]:
        raise _odd("losses of never exiting", never, given.shape[:1])
    table = np.broadcast_to(never[:, None], (len(given), len(path)))
    return _leaves(given, path), each, table


def _leaves(scores: Array, thresholds: Array) -> NDArray[np.bool_]:
    """Say where rows may leave: [n, E] for thresholds [E], [n, K+1, E] for a path."""
    rows = scores.reshape(len(scores), *[1] * (thresholds.ndim - 1), scores.shape[1])
    return np.asarray((rows >= thresholds) & (thresholds < np.inf))


def _scores(scores: ArrayLike) -> Array:
    array = _numbers("scores", scores)
    if array.ndim != 2 or not array.size:
        raise UsageError(
            f"scores have the shape {list(array.shape)}", "give [samples, exits], none empty"
        )
    return array


def _limits(thresholds: Array, scores: Array) -> Array:
    if thresholds.shape[-1:] != scores.shape[1:]:
        raise _odd("thresholds", thresholds, scores.shape[1:])
    return _numbers("thresholds", thresholds)


def _path(thresholds: Array, scores: Array) -> Array:
    """Check that thresholds [K+1, E] begin with never exiting and do not rise."""
    path = _limits(thresholds, scores)
    rising = path.ndim != 2 or not len(path) or (path[1:] > path[:-1]).any()
    if rising or not np.isposinf(path[0]).all():
        raise UsageError(
            "thresholds are no path: rows from +inf at every exit down, none above the one before",
            "make them by grid",
        )
    return path


def _numbers(name: str, values: ArrayLike) -> Array:
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float64)
    if np.isnan(array).any():
        place = [int(axis) for axis in np.argwhere(np.isnan(array))[0]]
        raise UsageError(f"{name} have NaN, first at {place}", "see what the model yields there")
    return array


def _odd(name: str, array: Array, shape: tuple[int, ...]) -> UsageError:
    return UsageError(
        f"{name} have the shape {list(array.shape)}, where the scores ask for {list(shape)}",
        "give as many rows and exits as the scores have",
    )
