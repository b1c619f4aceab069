"""Thresholds and losses of exits, against plain loops; properties over random scores with ties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from effopt.errors import UsageError
from effopt.exit_losses import any_exit_losses, exits_taken, grid, plain_losses

Floats = NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int) -> tuple[Floats, Floats, Floats]:
    """Draw scores with ties and infinities, losses, and a path from other scores."""
    rng = np.random.default_rng(seed)
    rows, exits = int(rng.integers(1, 30)), int(rng.integers(1, 5))
    values = np.r_[-np.inf, np.round(rng.normal(size=8), 1), np.inf]
    scores = rng.choice(values, (rows, exits))
    path = grid(rng.choice(values, (rows, exits)), int(rng.integers(1, 40)), shared=seed % 2 == 0)
    return scores, rng.choice([0.0, 0.3, 1.0], (rows, exits)), path


def plain(
    scores: Floats, losses: Floats, path: Floats, base: Floats
) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
    """The exits, and the plain and any-exit losses, one row and one threshold at a time."""
    taken, alone, worst = [], [], []
    for score, loss, last in zip(scores, losses, base, strict=True):
        open_at = [
            [
                e
                for e, (s, t) in enumerate(zip(score, limits, strict=True))
                if t < math.inf and s >= t
            ]
            for limits in path
        ]
        taken.append([exits[0] + 1 if exits else len(score) + 1 for exits in open_at])
        alone.append([float(loss[exits[0]]) if exits else float(last) for exits in open_at])
        worst.append([max([float(last), *(float(loss[e]) for e in exits)]) for exits in open_at])
    return taken, alone, worst


@given(seeds)
@settings(max_examples=100, deadline=None)
def test_exits_and_losses_are_those_of_plain_loops(seed: int) -> None:
    scores, losses, path = draw(seed)
    base = np.random.default_rng(seed).choice([0.0, 0.5], len(scores))
    taken, alone, worst = plain(scores, losses, path, base)
    found = exits_taken(scores, path)
    assert found.dtype == np.int64
    assert found.tolist() == taken
    assert exits_taken(scores, path[-1]).tolist() == [row[-1] for row in taken]
    assert plain_losses(scores, losses, path, base).tolist() == alone
    assert any_exit_losses(scores, losses, path, base).tolist() == worst


@given(seeds)
@settings(max_examples=200, deadline=None)
def test_further_along_a_path_no_row_leaves_later(seed: int) -> None:
    scores, _, path = draw(seed)
    found = exits_taken(scores, path)
    assert (found[:, 0] == scores.shape[1] + 1).all()
    assert (np.diff(found, axis=1) <= 0).all()


@given(seeds)
@settings(max_examples=200, deadline=None)
def test_the_any_exit_loss_does_not_fall_and_covers_every_way_to_batch(seed: int) -> None:
    scores, losses, path = draw(seed)
    worst = any_exit_losses(scores, losses, path)
    assert (np.diff(worst, axis=1) >= 0).all()
    assert (worst >= plain_losses(scores, losses, path)).all()
    assert (worst[:, 0] == 0).all()
    # One verdict for a batch: it leaves at the first exit where all rows may.
    for step, limits in enumerate(path):
        open_to_all = ((scores >= limits) & (limits < np.inf)).all(axis=0)
        for number in np.flatnonzero(open_to_all)[:1]:
            assert (worst[:, step] >= losses[:, number]).all()


def test_a_tie_leaves_and_an_infinite_threshold_never_lets() -> None:
    scores = np.array([[0.5, np.inf], [0.4, np.inf]], np.float32)
    assert exits_taken(scores, [0.5, np.inf]).tolist() == [1, 3]
    assert exits_taken(scores, [0.6, 9.0]).tolist() == [2, 2]
    assert exits_taken(scores, [-np.inf, np.inf]).tolist() == [1, 1]
    assert exits_taken(scores, [np.inf, np.inf]).tolist() == [3, 3]


def test_the_loss_at_an_exit_taken_may_fall_and_the_any_exit_loss_may_not() -> None:
    scores, losses = [[0.5, 0.9]], [[0.0, 1.0]]
    path = [[np.inf, np.inf], [0.8, 0.8], [0.5, 0.5]]
    assert plain_losses(scores, losses, path).tolist() == [[0, 1, 0]]
    assert any_exit_losses(scores, losses, path).tolist() == [[0, 1, 1]]
    assert plain_losses(scores, losses, path, [0.5]).tolist() == [[0.5, 1, 0]]
    assert any_exit_losses(scores, losses, path, [0.5]).tolist() == [[0.5, 1, 1]]


# --- the grid


@given(seeds, st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_grid_falls_from_never_and_lets_its_share_of_scores_pass(seed: int, shared: bool) -> None:
    rng = np.random.default_rng(seed)
    rows, count = int(rng.integers(1, 50)), int(rng.integers(1, 60))
    scores = rng.normal(size=(rows, 3)).astype(np.float32) * [1, 10, 100]
    path = grid(scores, count, shared=shared)
    assert (path.shape, path.dtype) == ((count + 1, 3), scores.dtype)
    assert np.isposinf(path[0]).all()
    assert (path[1:] <= path[:-1]).all()
    assert np.isin(path[1:], scores).all()
    assert not shared or (path == path[:, :1]).all()
    total = scores.size if shared else rows
    for step in range(1, count + 1):
        passing = (scores >= path[step]).sum(axis=None if shared else 0)
        assert (passing == math.ceil(total * step / count)).all()


def test_a_grid_of_float32_scores_is_float32_and_ties_with_them() -> None:
    scores = np.random.default_rng(0).uniform(size=(100, 2)).astype(np.float32)
    path = grid(scores, 100, shared=False)
    assert path.dtype == np.float32
    found = exits_taken(scores, path)
    assert [int((found[:, step] == 1).sum()) for step in range(101)] == list(range(101))


def test_a_grid_may_be_finer_than_there_are_scores() -> None:
    assert grid([[1.0], [2.0]], 4).ravel().tolist() == [np.inf, 2, 2, 1, 1]


def test_exits_with_scores_of_other_sizes_open_together_with_own_thresholds() -> None:
    rng = np.random.default_rng(0)
    scores = np.stack([rng.uniform(size=300), 1000 * rng.uniform(size=300)], axis=1)
    own = (scores >= grid(scores, 10, shared=False)[5]).mean(axis=0)
    together = (scores >= grid(scores, 10)[5]).mean(axis=0)
    assert own.tolist() == [0.5, 0.5]
    assert together.tolist() == [0.0, 1.0]


# --- what is refused

SCORES = np.zeros((4, 2))
PATH = np.array([[np.inf, np.inf], [0.5, 0.5]])
REFUSED = {
    "a grid of 0 steps": lambda: grid(SCORES, 0),
    r"scores have the shape \[4\]": lambda: grid(SCORES[:, 0]),
    r"scores have the shape \[0, 2\]": lambda: grid(SCORES[:0]),
    r"scores have NaN, first at \[1, 0\]": lambda: exits_taken([[0.0], [math.nan]], [0.0]),
    "thresholds have NaN": lambda: exits_taken(SCORES, [math.nan, 0.0]),
    r"thresholds have the shape \[3\], where the scores ask for \[2\]": lambda: exits_taken(
        SCORES, [0.0, 0.0, 0.0]
    ),
    "no path: .* down": lambda: any_exit_losses(SCORES, SCORES, PATH[1:]),
    "no path: .* none above": lambda: plain_losses(SCORES, SCORES, PATH[[0, 1, 0]]),
    "thresholds are no path": lambda: plain_losses(SCORES, SCORES, PATH[0]),
    r"losses have the shape \[3, 2\]": lambda: plain_losses(SCORES, SCORES[1:], PATH),
    "losses have NaN": lambda: plain_losses(SCORES, SCORES * math.nan, PATH),
    r"losses of never exiting have the shape \[1\]": lambda: plain_losses(
        SCORES, SCORES, PATH, [0.0]
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_is_refused_with_a_remedy(words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        REFUSED[words]()
    assert error.value.remedy
