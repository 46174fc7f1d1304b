"""Second moments of what matrices multiply: sums over the rows of their inputs, batch by batch.

The diagonal, the mean square of every column's input, is what llama.cpp calls an importance matrix. The full matrix
``X^T X / n`` is the Hessian of a row's squared output error, up to a factor (GPTQ, arXiv 2210.17323, section 3).

First positions are counted apart: they are attention sinks, whose activations are like no other position's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..records import Float32, Float64


@dataclass(frozen=True)
class Moments:
    """What one weight tensor multiplied.

    Attributes:
        mean_squares: float64 mean square of the input of each column: ``(n_cols,)``, of stacked matrices (experts,
            heads) ``(n_matrices, n_cols)``; 0 for a matrix that no token was routed to.
        counts: rows that each matrix multiplied, ``(n_matrices,)`` int64.
        full: ``E[x x^T]``, not centred, ``(n_cols, n_cols)``; ``None`` unless asked for.
        names: the tensors that multiply this input.

    """

    mean_squares: Float64
    counts: NDArray[np.int64]
    full: Float64 | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recording:
    """What a forward pass sums up of every input.

    Attributes:
        hessians: stored names of the matrices whose ``X^T X`` is wanted; stacks have none.
        first_positions: whether the first position of every sequence counts in ``X^T X``.
        column_squares: whether the squared norms of the matrices' own columns are wanted too.

    """

    hessians: frozenset[str] = frozenset()
    first_positions: bool = False
    column_squares: bool = False


@dataclass(frozen=True)
class InputSums:
    """Sums over the input rows of the matrices ``names``, which all multiply the same rows.

    Attributes:
        names: stored names.
        squares: ``(2, n_matrices, n_cols)`` float64 sums of squares: of first positions, and of all others.
        counts: ``(2, n_matrices)`` int64 rows likewise.
        is_stack: whether they are stacked matrices.

    """

    names: tuple[str, ...]
    squares: Float64
    counts: NDArray[np.int64]
    is_stack: bool

    def moments(self, first_positions: bool) -> Moments:
        """Return the means, with or without those of first positions."""
        squares = self.squares.sum(axis=0) if first_positions else self.squares[1]
        counts = self.counts.sum(axis=0) if first_positions else self.counts[1]
        means = squares / np.maximum(counts, 1)[:, np.newaxis]
        return Moments(means if self.is_stack else means[0], counts, names=self.names)

    def copy(self) -> InputSums:
        """Return the sums as they are now."""
        return replace(self, squares=self.squares.copy(), counts=self.counts.copy())


# Stored names of the matrices with one input, and ``E[x x^T]`` of that, ``(n_cols, n_cols)`` float32.
NamedHessian = tuple[tuple[str, ...], Float32]
