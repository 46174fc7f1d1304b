"""GPTQ: the columns to the right of a column compensate its rounding error.

With the second moment ``H = E[x x^T]`` of a matrix's input, the errors e of a row (original minus rounded) cause a mean
squared output error of ``e^T H e``. With ``H = U diag(v) U^T``, U unit upper triangular, and columns rounded from
left to right,

    e^T H e = sum_j v_j (t_j - q_j)^2,   t_j = w_j + sum_{i < j} U_ij e_i,

so the best choice for column j, given the columns to its left, is to round t_j instead of w_j. This is GPTQ (Frantar et
al., arXiv 2210.17323) in the form LDLQ (Chee et al., arXiv 2307.13304, section 3.1), which needs no inverse.

Columns are rounded block by block, in an order of the factors (``rounding_order``), by which left and right are meant.
With a for all columns to the left of block b, the share of b in the sum is

    (g_b - q_b)^T S_b (g_b - q_b),   S_b = U_bb diag(v_b) U_bb^T,   g_b = w_b + U_bb^-T U_ab^T e_a,

so the block's scales have to fit the *targets* g_b: ggml's search finds them, with column weights v. After rounding,
coordinate descent lowers this form further, over d and dmin, then s and m of each sub-block, then the codes.

A type without an entry in ``formats.FORMATS``, and a tensor without Hessian factors, are rounded to nearest.

The loop over columns is compiled (``kernel``). Cost per row: ``n_cols ** 2 / 2`` multiplications, and about 640 per
weight within blocks of 256 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import GgmlError
from ..llamacpp import ggml
from ..records import Float32, Float64, Tensor
from . import kernel
from .formats import FORMATS, Blocks, UInt8
from .hessian_factors import HessianFactors
from .quantizer import Quantizer, Rounding
from .rtn import make_rtn

ROW_TILE = 256  # rows that share the work of preparing the factors


@dataclass(frozen=True)
class GptqQuantizer:
    """Rounds the rows of one tensor by GPTQ: less error in the matrix's output than ggml's quantizers, same bytes.

    A row's error is ``(x - q)^T H (x - q)``, its squared norm ``sum_j H_jj x_j**2``. The bytes and the error of a row
    depend on no other row; processors with other vector instructions may differ in last bits. In memory, besides the
    result: two float32 copies of the rows.

    Attributes:
        factors: of the Hessian H of the matrix's input.
        n_descents: passes of descent over the scales and codes of each block.

    """

    factors: HessianFactors
    n_descents: int = 1
    tile_rows: int = ROW_TILE

    def quantize(self, rows: Float32, type_name: str, first_row: int = 0) -> UInt8:
        """See ``Quantizer``; also raises ``GgmlError`` when the factors have another number of columns."""
        self._check(rows, type_name)
        if type_name not in FORMATS:
            return ggml.quantize(rows, type_name, self.factors.diagonal)
        blocks, _ = self._round(rows, type_name)
        with np.errstate(over="ignore", invalid="ignore"):  # scales beyond float16 become infinite, as ggml's do
            return FORMATS[type_name].pack(blocks)

    def errors(self, rows: Float32, type_name: str, first_row: int = 0) -> Float64:
        """See ``Quantizer``."""
        self._check(rows, type_name)
        if type_name in FORMATS:
            return self._round(rows, type_name)[1]
        data = ggml.quantize(rows, type_name, self.factors.diagonal)
        with np.errstate(invalid="ignore"):  # weights beyond the range of F16 have infinite errors
            return self.factors.row_errors(rows - ggml.dequantize(data, type_name, rows.shape[1]))

    def squared_norms(self, rows: Float32, first_row: int = 0) -> Float64:
        """See ``Quantizer``."""
        return (np.square(rows) @ self.factors.diagonal).astype(np.float64)

    def _check(self, rows: Float32, type_name: str) -> None:
        n_cols = rows.shape[1]
        if len(self.factors.diagonal) != n_cols:
            raise GgmlError(f"Hessian factors: wanted {n_cols} columns, got {len(self.factors.diagonal)}")
        if type_name in FORMATS:
            ggml.row_bytes(type_name, n_cols)

    def _round(self, rows: Float32, type_name: str) -> tuple[Blocks, Float64]:
        return kernel.round_rows(rows, type_name, self.factors, self.n_descents)


def make_gptq(tensor: Tensor, weights: Float32 | None, factors: HessianFactors | None) -> Quantizer:
    """Return a quantizer for the tensor: round-to-nearest where there are no Hessian factors."""
    return make_rtn(tensor, weights, None) if factors is None else GptqQuantizer(factors)


ROUNDING = Rounding("gptq", "GPTQ: the columns to the right compensate each column's rounding error", True, make_gptq,
                    ROW_TILE)  # fmt: skip
