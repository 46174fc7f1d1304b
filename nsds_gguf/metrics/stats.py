"""Statistics for the metrics: kurtosis in three forms, entropy, robust aggregation.

Pure numpy. Inputs are float32 or float64, results float64; large inputs are processed in row tiles, without copies of
their full size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..records import Float32, Float64

Matrix = NDArray[np.floating[Any]]

# Entries of a row tile: 1 MiB in float32, which stays in a core's second-level cache between passes.
TILE_ENTRIES = 2**18

# Rounding noise of a float32 product, relative to the spread of its entries, above which the product is computed in
# float64. Noise of relative size e changes a kurtosis by about 6 e**2: less than 1e-7 at this bound.
MAX_RELATIVE_NOISE = 1e-4

# Spread relative to the mean below which entries count as constant: float32 weights cannot express less than 6e-8.
CONSTANT_SPREAD = 1e-6

# Scales the MAD of normal deviates to their standard deviation: 1 / (the normal distribution's third quartile).
MAD_TO_STD = 1.4826

# Added to the scaled MAD: keeps z finite when most layers agree, and stops rounding noise from deciding when all do.
MAD_EPSILON = 1e-8


def row_tiles(matrix: Matrix, n_entries: int | None = None) -> Iterator[Float64]:
    """Yield the rows of ``matrix`` (n, m) in order, as fresh float64 tiles in C order.

    A tile has at most ``n_entries`` entries (default: ``TILE_ENTRIES``), or one row.
    """
    n_rows = max(1, (n_entries or TILE_ENTRIES) // matrix.shape[1])
    for start in range(0, matrix.shape[0], n_rows):
        yield matrix[start : start + n_rows].astype(np.float64, order="C")


def sum_of_squares(rows: Matrix) -> Float64:
    """Return ``sum(x**2)`` of each row of ``rows`` (n, m): float64 (n,).

    Sums per row keep float32 sums short; the caller adds the rows in float64.
    """
    sums: Float64 = np.einsum("ij,ij->i", rows, rows).astype(np.float64)
    return sums


def excess_kurtosis(mean: float, m2: float, m4: float) -> float:
    """Return Fisher's biased kurtosis ``m4 / m2**2 - 3`` from central moments (NSDS, numerical vulnerability).

    Returns 0 for entries that are constant up to rounding: they have no tails.
    """
    return m4 / m2**2 - 3.0 if is_spread(mean, m2) else 0.0


def is_spread(mean: float, m2: float) -> bool:
    """Return whether entries of this mean and variance differ by more than rounding."""
    return m2 > (CONSTANT_SPREAD * mean) ** 2


def matrix_mean(matrix: Matrix) -> float:
    """Return the mean over all entries of ``matrix`` (n, m)."""
    return sum(float(tile.sum()) for tile in row_tiles(matrix)) / matrix.size


def matrix_kurtosis(matrix: Matrix) -> float:
    """Return the excess kurtosis over all entries of ``matrix`` (n, m)."""
    mean = matrix_mean(matrix)
    m2 = m4 = 0.0
    for tile in row_tiles(matrix):
        tile -= mean
        tile *= tile
        m2 += float(tile.sum())
        m4 += float(sum_of_squares(tile).sum())
    return excess_kurtosis(mean, m2 / matrix.size, m4 / matrix.size)


def column_kurtosis(vectors: Float64) -> Float64:
    """Return the excess kurtosis of each column of ``vectors`` (d, k): float64 (k,)."""
    parts = []
    for rows in row_tiles(vectors.T):
        mean = rows.mean(axis=1)
        squares = (rows - mean[:, None]) ** 2
        m2 = squares.mean(axis=1)
        m4 = sum_of_squares(squares) / vectors.shape[0]
        parts.append([excess_kurtosis(*moments) for moments in zip(mean, m2, m4, strict=True)])
    return np.concatenate(parts)


def product_kurtosis(
    left: Float32, right: Float32, squared_norm: float, fourth_powers: Callable[[Matrix, Matrix], float] | None = None
) -> float:
    """Return the excess kurtosis over all entries of ``left @ right`` without storing the product.

    Column sums give the mean, ``squared_norm`` the variance; with a column appended to the factors, every tile of the
    product is standardized when it leaves the matrix multiplication.

    Args:
        left: float32 (n, r).
        right: float32 (r, m).
        squared_norm: ``sum((left @ right)**2)``, the sum of its squared singular values.
        fourth_powers: returns ``sum((left @ right)**4)``; default: by numpy.
    """
    n_entries = left.shape[0] * right.shape[1]
    mean = float(left.sum(axis=0, dtype=np.float64) @ right.sum(axis=1, dtype=np.float64)) / n_entries
    m2 = squared_norm / n_entries - mean**2
    if not is_spread(mean, m2):
        return 0.0
    std = math.sqrt(m2)
    dtype = product_dtype(left, right, std)
    scaled: Matrix = np.column_stack([left.astype(dtype), np.full(left.shape[0], -mean, dtype)]) / std
    padded: Matrix = np.vstack([right.astype(dtype), np.ones(right.shape[1], dtype)])
    m4 = (fourth_powers or sum_of_fourth_powers)(scaled, padded) / n_entries
    return excess_kurtosis(0.0, 1.0, m4)


def product_dtype(left: Float32, right: Float32, std: float) -> np.dtype[np.floating[Any]]:
    """Return the dtype in which ``left @ right`` is accurate for entries of standard deviation ``std``.

    Rounding leaves noise of about ``eps * |left_i| * |right_j|`` in entry (i, j), whatever the entry's size. Where
    terms cancel, or the mean exceeds the spread, float32 is not enough.
    """
    norms = float(np.linalg.norm(left.astype(np.float64)) * np.linalg.norm(right.astype(np.float64)))
    noise = np.finfo(np.float32).eps * norms / math.sqrt(left.shape[0] * right.shape[1])
    return np.dtype(np.float32 if noise <= MAX_RELATIVE_NOISE * std else np.float64)


def sum_of_fourth_powers(left: Matrix, right: Matrix) -> float:
    """Return ``sum((left @ right)**4)`` over row tiles, accumulated in float64."""
    n_rows = max(1, TILE_ENTRIES // right.shape[1])
    buffer = np.empty((n_rows, right.shape[1]), dtype=left.dtype)
    total = 0.0
    for start in range(0, left.shape[0], n_rows):
        rows = left[start : start + n_rows]
        tile = np.matmul(rows, right, out=buffer[: len(rows)])
        np.multiply(tile, tile, out=tile)
        total += float(sum_of_squares(tile).sum())
    return total


def entropy(p: Float64) -> float:
    """Return ``-sum(p ln p)`` in nats of a distribution, with ``0 ln 0 = 0``."""
    positive = p[p > 0]
    return float(-(positive * np.log(positive)).sum())


def robust_z(values: Float64) -> Float64:
    """Return ``(r - median) / (1.4826 MAD + eps)`` of ``values`` (n,) (NSDS, robust aggregation)."""
    deviation = values - float(np.median(values))
    mad = float(np.median(np.abs(deviation)))
    return deviation / (MAD_TO_STD * mad + MAD_EPSILON)


def sigmoid(z: Float64) -> Float64:
    """Return ``1 / (1 + exp(-z))``, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * z))


def soft_or(p: Float64) -> float:
    """Return ``1 - exp(mean(ln(1 - p)))`` of probabilities (n,): NSDS's soft-OR; 1 if any of them is 1."""
    with np.errstate(divide="ignore"):
        return float(-np.expm1(np.log1p(-p).mean()))
