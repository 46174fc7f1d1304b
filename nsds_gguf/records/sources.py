"""Sources of weights: the interface through which rows are read, and the finite check.

A source is plain data and pickles: another process reads the same bytes. File formats are in ``read``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# Rows of a matrix: a slice with both ends and step 1, or their numbers in any order.
Rows = slice | NDArray[np.intp]

SLAB_BYTES = 4 << 20  # default slab, in float32; the last bits of sums over slabs depend on it


class Weights(ABC):
    """A matrix ``(n_rows, n_cols)`` of weights, read on demand; stacks are flattened, a vector is one row."""

    @abstractmethod
    def values(self, rows: Rows, columns: slice) -> Float32:
        """Return some rows and columns as a fresh C-contiguous float32 matrix, finite or not.

        Args:
            rows: a slice with both ends and step 1, or ``(n,)`` row numbers.
            columns: a slice with both ends and step 1.

        Raises:
            ModelError: the file has shrunk since it was opened, or cannot be read.

        """


class Source(Weights):
    """Weights as stored."""

    @property
    @abstractmethod
    def where(self) -> str:
        """File and name of the tensor, for messages."""

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """Number of rows: the product of all sizes but the last."""

    @property
    @abstractmethod
    def n_cols(self) -> int:
        """Number of weights in a row."""

    @property
    def parts(self) -> Sequence[Source]:
        """The stored tensors that make up this one."""
        return (self,)

    def rows(self, index: Rows) -> Float32:
        """Return rows as a fresh ``(n, n_cols)`` float32 matrix; raises ``ModelError`` for NaN and infinite weights.

        ``index`` is a slice of step 1, whose ends may be left out, or ``(n,)`` row numbers.
        """
        wanted = bounded(index, self.n_rows)
        if wanted is None:
            return np.empty((0, self.n_cols), np.float32)
        return finite(self.values(wanted, slice(0, self.n_cols)), self)

    def stored_rows(self, rows: Rows) -> NDArray[np.uint8]:
        """Return rows as stored, ``(n, row bytes)`` uint8; sources in GGUF files only."""
        raise ValueError(f"{self.where}: its rows are read as float32 only")


@dataclass(frozen=True)
class Stack(Source):
    """Matrices of one shape, stacked by rows, or vectors as the rows of a matrix."""

    members: tuple[Source, ...]

    @property
    def where(self) -> str:
        """The first member, for messages."""
        return self.members[0].where

    @property
    def n_rows(self) -> int:
        """Number of rows of all members."""
        return len(self.members) * self.members[0].n_rows

    @property
    def n_cols(self) -> int:
        """Weights of a row."""
        return self.members[0].n_cols

    @property
    def parts(self) -> Sequence[Source]:
        """The members."""
        return self.members

    def values(self, rows: Rows, columns: slice) -> Float32:
        """Return some rows and columns, each from its member."""
        n = self.members[0].n_rows
        if isinstance(rows, slice):
            return joined([self.members[i].values(some, columns) for i, some in matrices_of(rows, n)])
        owners, within = np.divmod(rows, n)
        out: Float32 = np.empty((len(rows), columns.stop - columns.start), np.float32)
        for owner in np.unique(owners):
            out[owners == owner] = self.members[owner].values(within[owners == owner], columns)
        return out


@dataclass(frozen=True)
class FromArray(Source):
    """Weights in memory: ``array`` is float32."""

    name: str
    array: Float32 = field(repr=False, compare=False)

    @property
    def where(self) -> str:
        """Name of the tensor."""
        return f"tensor {self.name}"

    @property
    def n_rows(self) -> int:
        """Number of rows, leading dimensions flattened."""
        return self.array.size // self.n_cols

    @property
    def n_cols(self) -> int:
        """Weights of a row."""
        n: int = self.array.shape[-1]
        return n

    def values(self, rows: Rows, columns: slice) -> Float32:
        """Return a copy of some rows and columns."""
        matrix = self.array.reshape(self.n_rows, self.n_cols)
        return np.array(matrix[rows, columns], order="C")


def bounded(index: Rows, n_rows: int) -> Rows | None:
    """Return a slice with both ends for contiguous rows, row numbers for others, ``None`` for no rows.

    Raises ``IndexError`` for a step other than 1 and for row numbers out of range.
    """
    if isinstance(index, slice):
        start, stop, step = index.indices(n_rows)
        if step != 1:
            raise IndexError(f"wanted rows with step 1, got step {step}")
        return slice(start, stop) if start < stop else None
    if not len(index):
        return None
    if index.min() < 0 or index.max() >= n_rows:
        raise IndexError(f"wanted rows 0 to {n_rows - 1}, got {index.min()} to {index.max()}")
    if index[-1] - index[0] == len(index) - 1 and (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def matrices_of(rows: slice, n_rows: int) -> list[tuple[int, slice]]:
    """Return the matrices of ``n_rows`` that a slice of stacked rows covers, each with the slice of its own rows."""
    touched = range(rows.start // n_rows, -(-rows.stop // n_rows))
    return [(i, slice(max(rows.start - i * n_rows, 0), min(rows.stop - i * n_rows, n_rows))) for i in touched]


def joined(pieces: Sequence[Float32]) -> Float32:
    """Concatenate matrices by rows; return a single one unchanged."""
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def finite(values: Float32, source: Source) -> Float32:
    """Return finite values; else raise ``ModelError`` with the counts of NaN and infinite weights in the source."""
    if np.isfinite(values).all():
        return values
    for part in source.parts:
        n_nan, n_infinite = _count(part)
        if n_nan or n_infinite:
            raise ModelError(
                f"{part.where}: {n_nan} NaN and {n_infinite} infinite of {part.n_rows * part.n_cols} weights; "
                "wanted finite numbers: the file is damaged, download it again"
            )
    raise ModelError(
        f"{source.where}: its weights are finite, but overflow float32 when transformed for GGUF: the file is damaged, "
        "download it again"
    )


def row_slices(n_rows: int, n_cols: int, max_bytes: int = SLAB_BYTES) -> Iterator[slice]:
    """Yield slices that cover the rows of a matrix in order: ``max_bytes`` of float32 each, at least one row."""
    step = max(1, max_bytes // (4 * max(1, n_cols)))
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def _count(source: Source) -> tuple[int, int]:
    """Return the number of NaN and of infinite weights."""
    n_nan = n_infinite = 0
    for some in row_slices(source.n_rows, source.n_cols):
        rows = source.values(some, slice(0, source.n_cols))
        n_nan += int(np.isnan(rows).sum())
        n_infinite += int(np.isinf(rows).sum())
    return n_nan, n_infinite
