"""Cholesky factors of large matrices in place, in all threads, with the same bits for any number of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from scipy.linalg import blas, lapack

from ..records import Float64

_PANEL = 512  # columns of a panel, and rows of a job


def cholesky(a: Float64, n_threads: int = 1) -> int:
    """Replace a symmetric positive definite matrix by its lower Cholesky factor, zeros above the diagonal.

    Left-looking (Golub and Van Loan, Matrix Computations, section 4.2.5): a panel of columns takes the products of all
    panels to its left, stripes of rows as jobs, so that every entry is written twice in all.

    Args:
        a: ``(n, n)`` float64, rows contiguous; the lower triangle is read.
        n_threads: of BLAS, one per job; the caller limits BLAS to one thread.

    Returns:
        0, or the number, from 1, of the first column at which the matrix is not positive definite.

    """
    with ThreadPoolExecutor(n_threads) as pool:

        def each(function: Callable[[slice], None], first: int) -> None:
            for _ in pool.map(function, (slice(at, at + _PANEL) for at in range(first, len(a), _PANEL))):
                pass

        for start in range(0, len(a), _PANEL):
            panel = slice(start, min(start + _PANEL, len(a)))

            def subtract(rows: slice, panel: slice = panel) -> None:
                a[rows, panel] -= a[rows, : panel.start] @ a[panel, : panel.start].T

            if start:
                each(subtract, start)
            square, info = lapack.dpotrf(a[panel, panel], lower=1, clean=1)
            if info:
                return int(start + info)
            a[panel, panel], a[panel, panel.stop :] = square, 0.0

            def solve(rows: slice, panel: slice = panel, square: Float64 = square) -> None:
                a[rows, panel] = blas.dtrsm(1.0, square, a[rows, panel], side=1, lower=1, trans_a=1)

            each(solve, panel.stop)
    return 0
