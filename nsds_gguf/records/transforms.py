"""Transforms from stored weights to a GGUF tensor: permute, slice, reshape, transpose, rescale, pad with zeros.

A step reads the rows that it needs from the matrix below it: the stored tensor or another step. All steps pickle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .sources import Float32, Rows, Weights, joined, matrices_of

# The row or column below of each row or column, negative for zeros.
Order = NDArray[np.intp]


class Transform(ABC):
    """One step: computes rows of its result from the matrix below."""

    @abstractmethod
    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return some rows and columns of the result, like ``Weights.values``."""


@dataclass(frozen=True)
class Transformed(Weights):
    """A matrix after one step."""

    below: Weights
    step: Transform

    def values(self, rows: Rows, columns: slice) -> Float32:
        """Return rows and columns of the result."""
        return self.step.values(self.below, rows, columns)


# --- rearranging ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TakeRows(Transform):
    """Rows permuted or selected: row ``i`` is row ``order[i]`` below."""

    order: NDArray[np.intp] = field(repr=False, compare=False)

    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return the rows that ``order`` names."""
        return below.values(self.order[rows], columns)


@dataclass(frozen=True)
class TakeColumns(Transform):
    """Columns permuted or selected: column ``i`` is column ``order[i]`` below."""

    order: NDArray[np.intp] = field(repr=False, compare=False)

    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return the columns that ``order`` names."""
        needed = below.values(rows, slice(0, int(self.order.max()) + 1))
        return np.take(needed, self.order[columns], axis=1)


@dataclass(frozen=True)
class SliceRows(Transform):
    """Rows ``start`` to ``stop``."""

    start: int
    stop: int

    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return the rows, offset by ``start``."""
        moved = slice(rows.start + self.start, rows.stop + self.start) if isinstance(rows, slice) else rows + self.start
        return below.values(moved, columns)


@dataclass(frozen=True)
class SliceColumns(Transform):
    """Columns ``start`` to ``stop``."""

    start: int
    stop: int

    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return the columns, offset by ``start``."""
        return below.values(rows, slice(columns.start + self.start, columns.stop + self.start))


@dataclass(frozen=True)
class Reshape(Transform):
    """One row, reshaped to a matrix of ``shape``."""

    shape: tuple[int, int]

    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return rows of the matrix; reads the whole row below."""
        n_rows, n_cols = self.shape
        matrix = below.values(slice(0, 1), slice(0, n_rows * n_cols)).reshape(self.shape)
        return np.array(matrix[rows, columns], order="C")


@dataclass(frozen=True)
class SplitRows(Transform):
    """Each row cut into ``n`` rows of ``n_cols`` columns."""

    n: int
    n_cols: int

    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return rows of the result; reads the whole rows below between the first and the last."""
        first, last = (rows.start, rows.stop) if isinstance(rows, slice) else (int(rows.min()), int(rows.max()) + 1)
        start = first // self.n
        whole = below.values(slice(start, -(-last // self.n)), slice(0, self.n * self.n_cols)).reshape(-1, self.n_cols)
        offset = start * self.n
        taken = slice(first - offset, last - offset) if isinstance(rows, slice) else rows - offset
        return np.array(whole[taken, columns], order="C")


@dataclass(frozen=True)
class Transpose(Transform):
    """Each matrix of a stack transposed: ``shape`` is ``(n, n_rows, n_cols)`` of the result, ``n`` 1 for one matrix."""

    shape: tuple[int, int, int]

    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return rows, which are columns below; row numbers read everything from the first to the last."""
        _, n_rows, n_cols = self.shape
        if not isinstance(rows, slice):
            first = int(rows.min())
            between = self.values(below, slice(first, int(rows.max()) + 1), columns)
            taken: Float32 = np.take(between, rows - first, axis=0)
            return taken
        pieces = []
        for i, some in matrices_of(rows, n_rows):
            matrix = below.values(slice(i * n_cols + columns.start, i * n_cols + columns.stop), some)
            pieces.append(np.ascontiguousarray(matrix.T))
        return joined(pieces)


# --- changing values --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlusOne(Transform):
    """``w + 1`` in float32: gains stored as their difference from 1."""

    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return the values plus one."""
        values = below.values(rows, columns)
        values += np.float32(1)
        return values


@dataclass(frozen=True)
class MinusExp(Transform):
    """``-exp(w)`` in float32: the state matrix A of Mamba, stored as ``A_log``."""

    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return minus the exponential of the values."""
        with np.errstate(over="ignore"):  # infinite values are reported by the finite check
            found: Float32 = -np.exp(below.values(rows, columns))
        return found


@dataclass(frozen=True)
class ScaleByPowersOfTwo(Transform):
    """Weights times powers of two; ``rows`` ``(n_rows,)`` and ``columns`` ``(n_cols,)`` are exponents."""

    rows: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)
    columns: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)

    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return the products, exact unless they leave the range of float32."""
        values = below.values(rows, columns)
        if self.columns is not None:
            values = np.ldexp(values, self.columns[columns])
        if self.rows is not None:
            values = np.ldexp(values, self.rows[rows, np.newaxis])
        return values


@dataclass(frozen=True)
class Scale(Transform):
    """Weights times a factor, in float32."""

    factor: float

    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return the products."""
        values = below.values(rows, columns)
        values *= np.float32(self.factor)
        return values


@dataclass(frozen=True)
class ScaleRows(Transform):
    """Every row times its own factor, in float32; ``factors`` is ``(n_rows,)`` float32."""

    factors: Float32 = field(repr=False, compare=False)

    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return the products."""
        values = below.values(rows, columns)
        values *= self.factors[rows, np.newaxis]
        return values


# --- padding with zeros -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpreadRows(Transform):
    """Row ``i`` is row ``order[i]`` below, or zeros where it is negative."""

    order: Order = field(repr=False, compare=False)

    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return the rows that ``order`` names among zeros."""
        wanted = self.order[rows]
        out: Float32 = np.zeros((len(wanted), columns.stop - columns.start), np.float32)
        stored = np.flatnonzero(wanted >= 0)
        if len(stored):
            out[stored] = below.values(wanted[stored], columns)
        return out


@dataclass(frozen=True)
class SpreadColumns(Transform):
    """Column ``i`` is column ``order[i]`` below, or zeros where it is negative."""

    order: Order = field(repr=False, compare=False)

    def values(self, below: Weights, rows: Rows, columns: slice) -> Float32:
        """Return the columns that ``order`` names among zeros."""
        wanted = self.order[columns]
        n_rows = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        out: Float32 = np.zeros((n_rows, len(wanted)), np.float32)
        stored = wanted >= 0
        if stored.any():
            needed = below.values(rows, slice(0, int(wanted.max()) + 1))
            out[:, stored] = needed[:, wanted[stored]]
        return out
