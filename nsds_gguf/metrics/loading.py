"""Reading weights for scoring: float32, checked to be finite, in slabs where the whole would be too large."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import ModelError
from ..records import Float32, Tensor

# Weights of one slab of a large tensor: 16 MiB in float32.
SLAB_ENTRIES = 2**22


def load_matrix(tensor: Tensor) -> Float32:
    """Return a tensor as a float32 matrix (n_rows, n_cols); raises ``ModelError`` when weights are not finite."""
    matrix = tensor.read_rows(0, tensor.n_rows)
    _check_finite(tensor, matrix)
    return matrix


def read_slabs(tensor: Tensor) -> Iterator[Float32]:
    """Yield a tensor's rows in order, in slabs (n, n_cols); raises ``ModelError`` when weights are not finite."""
    for slab in _slabs(tensor):
        _check_finite(tensor, slab)
        yield slab


def _slabs(tensor: Tensor) -> Iterator[Float32]:
    n_rows = max(1, SLAB_ENTRIES // tensor.n_cols)
    for start in range(0, tensor.n_rows, n_rows):
        yield tensor.read_rows(start, min(start + n_rows, tensor.n_rows))


def _check_finite(tensor: Tensor, weights: Float32) -> None:
    if not np.isfinite(weights).all():
        n_bad = sum(int(np.count_nonzero(~np.isfinite(slab))) for slab in _slabs(tensor))
        raise ModelError(
            f"{tensor.name} (checkpoint: {tensor.source}): {n_bad} of {tensor.n_weights} weights are NaN or infinite, "
            "wanted finite numbers only; the checkpoint is damaged, fetch it again"
        )
