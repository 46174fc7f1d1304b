"""Upper triangles of square matrices, row after row without the zeros or the mirror image below: half the disk."""

from __future__ import annotations

import math

import numpy as np

from ..records import Float32

_PANEL = 256  # columns that are mirrored at a time


def packed(matrix: Float32) -> Float32:
    """Return the upper triangle of a matrix, ``(n, n)``, with its diagonal, as ``(n * (n + 1) / 2,)``."""
    values = np.empty(n_packed(len(matrix)), np.float32)
    start = 0
    for index, row in enumerate(matrix):
        stop = start + len(row) - index
        values[start:stop] = row[index:]
        start = stop
    return values


def unpacked(values: Float32) -> Float32:
    """Return the matrix, ``(n, n)``, whose upper triangle ``packed`` returned; zeros below the diagonal."""
    n = math.isqrt(2 * len(values))
    matrix = np.zeros((n, n), np.float32)
    start = 0
    for index, row in enumerate(matrix):
        stop = start + n - index
        row[index:] = values[start:stop]
        start = stop
    return matrix


def mirrored(matrix: Float32) -> Float32:
    """Copy the upper triangle of a matrix below its diagonal, in place, and return the matrix."""
    for start in range(0, len(matrix), _PANEL):
        stop = min(start + _PANEL, len(matrix))
        square = np.triu(matrix[start:stop, start:stop])
        matrix[start:stop, start:stop] = square + np.triu(square, 1).T
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return matrix


def n_packed(n: int) -> int:
    """Return the number of values in the triangle of an ``(n, n)`` matrix."""
    return n * (n + 1) // 2
