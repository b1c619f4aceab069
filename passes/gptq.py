"""Rounding with error feedback (GPTQ, arXiv 2210.17323).

Columns are rounded one after the other; what a column's rounding changes in the outputs is taken
back, as far as it can be, by the columns that are still to come.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from effopt.errors import UsageError
from effopt.memory import give_back
from effopt.passes.rounding import Grid, Rounded, nearest, real, rounded, steps

RAISED = (0.01, 0.1, 1.0)
"""Dampings to go on with, in this order, where the wanted one is not enough."""

LEAST_PIVOT = 1e-12
"""The least diagonal of a factor whose inverse float32 holds."""

ROWS = 256
"""Rows of a Hessian that are worked on at a time."""


def gptq(
    weight: Tensor,
    hessian: Tensor | Callable[[], Tensor],
    grid: Grid,
    *,
    damp: float = 0.01,
    block: int = 128,
    order: bool = False,
) -> Rounded:
    """Round a weight [N, K] so that its outputs over the calibration inputs change little.

    `hessian` [K, K] is any positive multiple of the sum of x x^T over inputs x [K], or what reads
    it anew each time, so that it takes no memory beside its factor. `damp` times its mean diagonal
    is added to the diagonal, and more where it is not positive definite. Of `block` columns errors
    are fed forward together, which changes the speed and not the result.
    Steps of a block are fixed, when it begins, from weights with the feedback so far. With `order`
    columns go by falling diagonal, and steps come from the weights as given. A channel that no
    input has used is rounded to nearest. Raises UsageError.
    """
    if block < 1:
        raise UsageError(f"block is {block}", "give how many columns to round together, from 1")
    blocks = grid.cut(weight)
    count, group = weight.shape[1], blocks.shape[2]
    scale, zero = steps(blocks, grid)
    read = hessian if callable(hessian) else lambda: hessian
    mean, diagonal = _diagonal(read(), count)
    visited = torch.arange(count, device=weight.device)
    if order:
        visited = torch.where(diagonal > 0, diagonal, mean).argsort(descending=True, stable=True)
    wide = _cholesky(read, visited.flip(0), mean, damp)  # of K * K numbers, as the next two
    lower = wide.float()
    del wide
    factor = _inverse(lower).to(weight.device)
    del lower
    give_back()
    # Columns are the rows of these two, so that each lies in one piece.
    left = blocks.reshape(weight.shape).T.index_select(0, visited)
    codes = torch.empty_like(left)
    homes = (visited // group).tolist()
    for start, stop in _spans(count, count if order else group, block):
        if not order and start % group == 0:
            home = homes[start]
            scale[:, home], zero[:, home] = steps(left[start : start + group].T, grid)
        errors = torch.empty_like(left[start:stop])
        for at in range(start, stop):
            step, origin = scale[:, homes[at]], zero[:, homes[at]]
            codes[at] = nearest(left[at], step, origin, grid)
            errors[at - start] = left[at] - real(codes[at], step, origin, grid)
            errors[at - start] /= factor[at, at]
            left[at:stop] -= torch.outer(factor[at, at:stop], errors[at - start])
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    placed = left  # its numbers are used up
    placed[visited] = codes
    del factor, codes
    return rounded(placed.T.contiguous(), scale, zero, grid)


def _diagonal(hessian: Tensor, columns: int) -> tuple[float, Tensor]:
    """Check a Hessian, and return the mean of its diagonal as `check_hessian`, and the diagonal."""
    return check_hessian(hessian, columns), hessian.diagonal().clone()


def checked_hessian(hessian: Tensor, columns: int) -> Tensor:
    """Return a Hessian [K, K] in float64, scaled so that its diagonal has the mean 1.

    A channel that no input used has 1 on the diagonal and is apart from all others.
    Raises UsageError as `check_hessian`.
    """
    mean = check_hessian(hessian, columns)
    return _scaled(hessian, torch.arange(columns, device=hessian.device), mean)


def check_hessian(hessian: Tensor, columns: int) -> float:
    """Return the mean of the diagonal of a Hessian [K, K], over the channels that inputs used.

    Raises UsageError if it is not a finite symmetric matrix with a diagonal of squares.
    """
    remedy = "give the sum of x x^T over the inputs x of the layer, without padding"
    if hessian.shape != (columns, columns):
        reason = f"a Hessian is {list(hessian.shape)} for {columns} channels"
        raise UsageError(reason, remedy)
    if not all(bool(end.isfinite()) for end in hessian.aminmax()):
        raise UsageError("a Hessian has NaN or infinite values", remedy)
    diagonal = hessian.diagonal().double()
    near = 1e-4 * float(diagonal.max())
    uneven = max(float((hessian[rows] - hessian[:, rows].T).abs().max()) for rows in _rows(columns))
    if (diagonal < 0).any() or uneven > near:
        raise UsageError("a Hessian is not symmetric with a diagonal of squares", remedy)
    used = diagonal[diagonal > 0]
    return float(used.mean()) if len(used) else 1.0


def _rows(count: int) -> Iterator[slice]:
    """Cut the rows of a large matrix, so that what is computed of them is small."""
    return (slice(start, start + ROWS) for start in range(0, count, ROWS))


def _scaled(hessian: Tensor, order: Tensor, mean: float) -> Tensor:
    """Return a Hessian in float64 over its mean, rows and columns in an order; dead ones have 1."""
    made = torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device)
    for rows in _rows(len(order)):
        made[rows] = hessian[order[rows]][:, order]
    made /= mean
    dead = made.diagonal() == 0
    made.diagonal().add_(dead)
    return made


def _cholesky(read: Callable[[], Tensor], order: Tensor, mean: float, damp: float) -> Tensor:
    """Return L [K, K] float64, lower triangular, with L L^T the scaled and damped Hessian."""
    if damp < 0:
        raise UsageError(f"damp is {damp}", "give a share of the mean diagonal, such as 0.01")
    failed = torch.empty((), dtype=torch.int32, device=order.device)
    for added in (damp, *(more for more in RAISED if more > damp)):
        lower = _scaled(read(), order, mean).mT  # it is symmetric: this is what LAPACK works in
        lower.diagonal().add_(added)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed and lower.diagonal().min() > LEAST_PIVOT:
            return lower
    reason = f"a Hessian is not positive definite, even with a damping of {max(damp, RAISED[-1])}"
    raise UsageError(reason, "sum x x^T over more inputs, in float32 or wider")


def _inverse(lower: Tensor) -> Tensor:
    """Return U [K, K] float32, upper triangular, with U^T U the inverse of the damped Hessian.

    With rows and columns from the last to the first that is L L^T. So H = R R^T, where R is L
    turned around, and U is the inverse of R: no inverse of H is made.
    """
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device).mT
    torch.linalg.solve_triangular(lower, eye, upper=False, out=eye)
    return eye.flip(0, 1)


def _spans(count: int, group: int, block: int) -> Iterator[tuple[int, int]]:
    """Cut columns into runs of at most `block`, none across the start of a group."""
    for home in range(0, count, group):
        for start in range(home, home + group, block):
            yield start, min(start + block, home + group)
