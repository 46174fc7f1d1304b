"""Second moments of the inputs of matrices: sums over rows, batch by batch.

The diagonal, the mean square of every column's input, is the content of llama.cpp's importance matrices. The full
matrix ``X^T X / n`` is the Hessian of a row's squared output error, up to a factor (GPTQ, arXiv 2210.17323, section 3).

First positions are summed separately: they are attention sinks, with activations unlike those of other positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..records import Float32, Float64


@dataclass(frozen=True)
class Moments:
    """Second moments of the input of one weight tensor.

    Attributes:
        mean_squares: float64 mean square of the input of each column: ``(n_cols,)``, for stacked matrices (experts,
            heads) ``(n_matrices, n_cols)``; 0 for a matrix that no token was routed to.
        counts: number of input rows of each matrix, ``(n_matrices,)`` int64.
        full: ``E[x x^T]``, not centred, ``(n_cols, n_cols)``; default: not collected.
        names: the tensors that share this input.

    """

    mean_squares: Float64
    counts: NDArray[np.int64]
    full: Float64 | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recording:
    """The sums that a forward pass collects.

    Attributes:
        hessians: stored names of the matrices for which to sum ``X^T X``; stacks have none.
        first_positions: whether the first position of every sequence counts in ``X^T X``.
        column_squares: whether to compute the squared norms of the columns of the weights too.

    """

    hessians: frozenset[str] = frozenset()
    first_positions: bool = False
    column_squares: bool = False


@dataclass(frozen=True)
class InputSums:
    """Sums over the input rows of the matrices ``names``, which share the same input.

    Attributes:
        names: stored names.
        squares: ``(2, n_matrices, n_cols)`` float64 sums of squares: of first positions, and of all others.
        counts: ``(2, n_matrices)`` int64 numbers of rows, split the same way.
        is_stack: whether they are stacked matrices.

    """

    names: tuple[str, ...]
    squares: Float64
    counts: NDArray[np.int64]
    is_stack: bool

    def moments(self, first_positions: bool) -> Moments:
        """Return the means, with or without first positions."""
        squares = self.squares.sum(axis=0) if first_positions else self.squares[1]
        counts = self.counts.sum(axis=0) if first_positions else self.counts[1]
        means = squares / np.maximum(counts, 1)[:, np.newaxis]
        return Moments(means if self.is_stack else means[0], counts, names=self.names)

    def copy(self) -> InputSums:
        """Return a copy of the sums."""
        return replace(self, squares=self.squares.copy(), counts=self.counts.copy())


# Stored names of the matrices that share an input, and its ``E[x x^T]``, ``(n_cols, n_cols)`` float32.
NamedHessian = tuple[tuple[str, ...], Float32]
