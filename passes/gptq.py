"""Rounding with error feedback (GPTQ, arXiv 2210.17323).

Columns are rounded one after the other; what a column's rounding changes in the outputs is taken
back, as far as it can be, by the columns that are still to come.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from effopt.errors import UsageError
from effopt.passes.rounding import Grid, Rounded, nearest, real, rounded, steps

RAISED = (0.01, 0.1, 1.0)
"""Dampings to go on with, in this order, where the wanted one is not enough."""


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damp: float = 0.01,
    block: int = 128,
    order: bool = False,
) -> Rounded:
    """Round a weight [N, K] so that its outputs over the calibration inputs change little.

    `hessian` [K, K] is any positive multiple of the sum of x x^T over inputs x [K]. `damp` times
    its mean diagonal is added to the diagonal, and more where it is not positive definite. Of
    `block` columns errors are fed forward together, which changes the speed and not the result.
    Steps of a block are fixed, when it begins, from weights with the feedback so far. With `order`
    columns go by falling diagonal, and steps come from the weights as given. A channel that no
    input has used is rounded to nearest. Raises UsageError.
    """
    if block < 1:
        raise UsageError(f"block is {block}", "give how many columns to round together, from 1")
    blocks = grid.cut(weight)
    count, group = weight.shape[1], blocks.shape[2]
    scale, zero = steps(blocks, grid)
    hessian = checked_hessian(hessian, count)
    visited = torch.arange(count, device=weight.device)
    if order:
        visited = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _factor(hessian[visited][:, visited], damp).to(weight.device)
    # Columns are the rows of these two, so that each lies in one piece.
    left = blocks.reshape(weight.shape).T[visited].contiguous()
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
        left[stop:] -= factor[start:stop, stop:].T @ errors
    placed = torch.empty_like(codes)
    placed[visited] = codes
    return rounded(placed.T.contiguous(), scale, zero, grid)


def checked_hessian(hessian: Tensor, columns: int) -> Tensor:
    """Return a Hessian [K, K] in float64, scaled so that its diagonal has the mean 1.

    A channel that no input used has 1 on the diagonal and is apart from all others.
    Raises UsageError if it is not a finite symmetric matrix with a diagonal of squares.
    """
    remedy = "give the sum of x x^T over the inputs x of the layer, without padding"
    if hessian.shape != (columns, columns):
        reason = f"a Hessian is {list(hessian.shape)} for {columns} channels"
        raise UsageError(reason, remedy)
    if not torch.isfinite(hessian).all():
        raise UsageError("a Hessian has NaN or infinite values", remedy)
    hessian = hessian.double()
    diagonal = hessian.diagonal()
    near = 1e-4 * float(diagonal.max())
    if (diagonal < 0).any() or not torch.allclose(hessian, hessian.T, rtol=0, atol=near):
        raise UsageError("a Hessian is not symmetric with a diagonal of squares", remedy)
    dead = diagonal == 0
    if dead.all():
        return torch.diag(dead.double())
    return hessian / diagonal[~dead].mean() + torch.diag(dead.double())


def _factor(hessian: Tensor, damp: float) -> Tensor:
    """Return U [K, K] float32, upper triangular, with U^T U the inverse of the damped Hessian.

    H = R R^T with R upper triangular is a Cholesky factorization from the last column to the
    first; U is the inverse of R, so no inverse of H is made.
    """
    if damp < 0:
        raise UsageError(f"damp is {damp}", "give a share of the mean diagonal, such as 0.01")
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    for added in (damp, *(more for more in RAISED if more > damp)):
        lower, failed = torch.linalg.cholesky_ex((hessian + added * eye).flip(0, 1))
        if not failed:
            inverse: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            if torch.isfinite(inverse.float()).all():
                return inverse.float()
    reason = f"a Hessian is not positive definite, even with a damping of {max(damp, RAISED[-1])}"
    raise UsageError(reason, "sum x x^T over more inputs, in float32 or wider")


def _spans(count: int, group: int, block: int) -> Iterator[tuple[int, int]]:
    """Cut columns into runs of at most `block`, none across the start of a group."""
    for home in range(0, count, group):
        for start in range(home, home + group, block):
            yield start, min(start + block, home + group)
