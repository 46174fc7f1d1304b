"""Sequential error feedback: what rounding a column does wrong, the columns right of it make good.

With the second moment ``H = E[x x^T]`` of a matrix's input, errors e of a row (what it was, less what it became) make a
mean squared output error of ``e^T H e``. With ``H = U diag(v) U^T``, U unit upper triangular, and columns rounded from
left to right,

    e^T H e = sum_j v_j (t_j - q_j)^2,   t_j = w_j + sum_{i < j} U_ij e_i,

so the best that column j can do, what stands left of it given, is to round t_j instead of w_j. This is GPTQ (Frantar et
al., arXiv 2210.17323) in the form LDLQ (Chee et al., arXiv 2307.13304, section 3.1), which needs no inverse.

Columns are rounded with the scales of their block, which are found when the block is reached. With a for all that is
left of block b, the sum over b is 0 at ``e_b = -U_bb^-T U_ab^T e_a``; the *targets* ``g_b = w_b + U_bb^-T U_ab^T e_a`` are
therefore what its scales are to suit, and ``(g_b - q_b)^T U_bb diag(v_b) U_bb^T (g_b - q_b)`` is what is left. Inside
the block the targets take the place of w. When it is rounded, its codes are improved by coordinate descent on this form.

Arrays are held with columns first, so that one column of many rows is contiguous. Cost: ``n_rows * n_cols ** 2``
multiplications in matrix products, and about ten passes over every column.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from ..errors import ModelError
from ..records import Float32, Float64
from .formats import Blocks, Format, UInt8, inverse, joined

DEFAULT_DAMPING = 0.1
DEFAULT_SHRINKAGE = 0.0

_PANEL = 256  # columns of one matrix product over a triangle

# Finds blocks whose scales suit targets ``(n_rows, block)`` of some columns; their codes need not.
FindScales = Callable[[Float32, slice], Blocks]


@dataclass(frozen=True)
class Feedback:
    """The factors of one Hessian, for all matrices that have that input.

    Attributes:
        coefficients: ``(n_cols, n_cols)`` float32, U: unit upper triangular.
        variances: ``(n_cols,)`` float32, v: what remains of each column's moment given the columns right of it.
        importance: ``(n_cols,)`` float32, diagonal of H.

    """

    coefficients: Float32
    variances: Float32
    importance: Float32

    def row_errors(self, errors: Float32) -> Float64:
        """Return ``e^T H e`` of every row of errors: ``(n_rows, n_cols)`` float32 to ``(n_rows,)``."""
        total: Float64 = np.zeros(len(errors))
        for start in range(0, errors.shape[1], _PANEL):
            stop = min(start + _PANEL, errors.shape[1])
            reduced = errors[:, :stop] @ self.coefficients[:stop, start:stop]
            total += np.square(reduced, out=reduced) @ self.variances[start:stop]
        return total


def make_feedback(
    hessian: NDArray[np.floating], *, shrinkage: float = DEFAULT_SHRINKAGE, damping: float = DEFAULT_DAMPING
) -> Feedback:
    """Factor a Hessian.

    In memory: two float64 matrices of its size, and one of float32 that stays.

    Args:
        hessian: ``(n_cols, n_cols)``, symmetric, positive semidefinite but for rounding. It may be of low rank and hold
            columns of zeros.
        shrinkage: share by which everything off the diagonal is made smaller: what a Hessian of few tokens needs.
        damping: share of the mean of the diagonal that is added to the diagonal.

    Raises:
        ModelError: the Hessian is not finite, is zero, or not positive definite even with the damping.

    """
    h: Float64 = np.array(hessian, dtype=np.float64)
    diagonal = h.diagonal().copy()
    mean = float(diagonal.mean())
    if not np.isfinite(h).all() or mean <= 0:
        raise ModelError(f"Hessian: wanted finite numbers and a positive diagonal, got a diagonal of mean {mean:g}")
    h *= 1 - shrinkage
    np.fill_diagonal(h, diagonal + damping * mean)
    try:
        upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError as error:
        raise ModelError(f"Hessian: not positive definite with a damping of {damping:g}: {error}") from error
    pivots = upper.diagonal().copy()
    return Feedback(
        np.ascontiguousarray(upper / pivots, dtype=np.float32),
        np.square(pivots).astype(np.float32),
        (diagonal + damping * mean).astype(np.float32),
    )


def round_with_feedback(
    rows: Float32, format: Format, feedback: Feedback, find_scales: FindScales, n_descents: int
) -> Blocks:
    """Round rows, each block with the scales that are found for it.

    Args:
        rows: ``(n_rows, n_cols)`` float32.
        format: of the blocks.
        feedback: of the rows' input.
        find_scales: gives the scales of a block.
        n_descents: passes of coordinate descent over the codes of every block.

    """
    weights = np.ascontiguousarray(rows.T)
    errors = np.empty_like(weights)
    found = []
    for start in range(0, len(weights), format.block):
        columns = slice(start, start + format.block)
        triangle = feedback.coefficients[columns, columns]
        pull = feedback.coefficients[:start, columns].T @ errors[:start]
        pull = solve_triangular(triangle, pull, trans=1, unit_diagonal=True, check_finite=False)
        targets = weights[columns] + pull
        blocks = find_scales(np.ascontiguousarray(targets.T), columns)
        work = _Columns(targets, blocks, format)
        work.round(triangle)
        if n_descents:
            form = (triangle * feedback.variances[columns]) @ triangle.T
            for _ in range(n_descents):
                work.descend(form / form.diagonal()[:, None])
        errors[columns] = work.errors + (weights[columns] - targets)
        codes = np.ascontiguousarray(work.codes.T).reshape(blocks.codes.shape)
        found.append(replace(blocks, codes=codes))
    return joined(found)


class _Columns:
    """The columns of one block being rounded.

    Attributes:
        codes: ``(block, n_rows)`` uint8.
        errors: ``(block, n_rows)`` float32, targets less what they became.

    """

    def __init__(self, targets: Float32, blocks: Blocks, format: Format) -> None:
        """Take the targets, ``(block, n_rows)``, and the scales."""
        self.codes: UInt8 = np.empty(targets.shape, dtype=np.uint8)
        self.errors = np.empty_like(targets)
        self._targets, self._format = targets, format
        self._scale, self._offset = (np.ascontiguousarray(x[:, 0].T) for x in (blocks.scale, blocks.offset))
        self._inverse = inverse(self._scale)
        edges = range(0, format.block + 1, format.sub)
        self._subs = list(itertools.pairwise(edges))

    def round(self, triangle: Float32) -> None:
        """Round from left to right with feedback, ``(block, block)`` of U."""
        for sub, (first, last) in enumerate(self._subs):
            given = self._targets[first:last] + triangle[:first, first:last].T @ self.errors[:first]
            for j in range(first, last):
                self._round_column(sub, j, given[j - first] + triangle[first:j, j] @ self.errors[first:j])

    def descend(self, form: Float32) -> None:
        """Round every column again, all others given.

        ``e^T S e`` is least at ``e_j = -sum_{i != j} S_ji e_i / S_jj``; ``form`` has the rows of S over its diagonal.
        """
        for sub, (first, last) in enumerate(self._subs):
            before = self.errors[first:last].copy()
            pulls = form[first:last] @ self.errors
            for j in range(first, last):
                changes = self.errors[first:j] - before[: j - first]
                pull = pulls[j - first] + form[j, first:j] @ changes - before[j - first]
                self._round_column(sub, j, self._targets[j] + pull)

    def _round_column(self, sub: int, j: int, aim: Float32) -> None:
        """Give column j the code whose weight is nearest to ``aim``, ``(n_rows,)``, which is overwritten."""
        aim += self._offset[sub]
        aim *= self._inverse[sub]
        self.codes[j] = self._format.to_levels(aim)
        aim *= self._scale[sub]
        aim -= self._offset[sub]
        np.subtract(self._targets[j], aim, out=self.errors[j])
