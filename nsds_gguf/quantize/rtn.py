"""Round to nearest: the result of ggml's own quantizers, with column weights in the search for scales.

Each column is rounded on its own. The bytes equal those of llama-quantize with the same importance matrix. ggml's own
functions make them, except K-quants with column weights: the compiled loop (``kernel``) makes the same bytes in about
an eighth of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..llamacpp import ggml
from ..records import Float32, Float64, Tensor
from .formats import FORMATS
from .hessian_factors import HessianFactors
from .kernel import NEAREST_TYPES, OWN_SEARCH, nearest_rows
from .quantizer import Rounding


@dataclass(frozen=True)
class RtnQuantizer:
    """Rounds the rows of one tensor to nearest; a row's error is ``sum w (x - q)**2``, its squared norm ``sum w x**2``.

    Attributes:
        weights: ``(n_cols,)`` float32 column weights w, ``(n_matrices, n_cols)`` where stacked matrices differ;
            ``None`` for columns of equal weight.
        rows_per_matrix: rows of one matrix of a stack.

    """

    weights: Float32 | None
    rows_per_matrix: int
    tile_rows: int = 1

    def quantize(self, rows: Float32, type_name: str, first_row: int = 0) -> NDArray[np.uint8]:
        """See ``Quantizer``."""
        weights = self._searched_with(rows, type_name, first_row)
        if weights is None or type_name not in NEAREST_TYPES:
            return ggml.quantize(rows, type_name, weights)
        ggml.row_bytes(type_name, rows.shape[1])
        return _packed(rows, type_name, weights)

    def errors(self, rows: Float32, type_name: str, first_row: int = 0) -> Float64:
        """See ``Quantizer``."""
        weights = self._searched_with(rows, type_name, first_row)
        if weights is not None and type_name in NEAREST_TYPES:
            ggml.row_bytes(type_name, rows.shape[1])
            return nearest_rows(rows, type_name, weights)[1]
        delta = ggml.dequantize(self.quantize(rows, type_name, first_row), type_name, rows.shape[1])
        delta -= rows
        return self._weighted(np.square(delta, out=delta), first_row)

    def squared_norms(self, rows: Float32, first_row: int = 0) -> Float64:
        """See ``Quantizer``."""
        return self._weighted(np.square(rows), first_row)

    def _searched_with(self, rows: Float32, type_name: str, first_row: int) -> Float32 | None:
        """Return the column weights for the search for scales; ``None`` where ggml searches without."""
        if self.weights is None and type_name in OWN_SEARCH:
            return np.ones(rows.shape[1], np.float32)
        return self._weights_at(first_row)

    def _weights_at(self, row: int) -> Float32 | None:
        if self.weights is None or self.weights.ndim == 1:
            return self.weights
        matrix: Float32 = self.weights[row // self.rows_per_matrix]
        return matrix

    def _weighted(self, squares: Float32, row: int) -> Float64:
        weights = self._weights_at(row)
        sums = squares @ (np.ones(squares.shape[1], dtype=np.float32) if weights is None else weights)
        return sums.astype(np.float64)


def _packed(rows: Float32, type_name: str, weights: Float32) -> NDArray[np.uint8]:
    """Return the bytes of rows.

    Blocks with a scale that is 0 or not finite go through ggml, which keeps codes of an earlier step there.
    """
    format, blocks = FORMATS[type_name], nearest_rows(rows, type_name, weights)[0]
    with np.errstate(over="ignore", invalid="ignore"):  # scales beyond float16 become infinite
        data = format.pack(blocks)
    left = (blocks.scale == 0).any(axis=2) | ~np.isfinite(blocks.d + blocks.dmin)  # (n_rows, n_blocks)
    shaped = data.reshape(*left.shape, -1)
    for index in np.flatnonzero(left.any(axis=0)):
        some, columns = np.flatnonzero(left[:, index]), slice(index * format.block, (index + 1) * format.block)
        shaped[some, index] = ggml.quantize(np.ascontiguousarray(rows[some, columns]), type_name, weights[columns])
    return data


def make_rtn(tensor: Tensor, weights: Float32 | None, factors: HessianFactors | None) -> RtnQuantizer:
    """Return a quantizer for the tensor; Hessian factors are ignored."""
    return RtnQuantizer(weights, tensor.n_matrix_rows)


ROUNDING = Rounding("rtn", "round to nearest, with ggml's quantizers and column weights", False, make_rtn)
