"""GPTQ: the columns to the right of a column compensate its rounding error.

With the second moment ``H = E[x x^T]`` of a matrix's input, the errors e of a row (original minus rounded) cause a mean
squared output error of ``e^T H e``. With ``H = U diag(v) U^T``, U unit upper triangular, and columns rounded from
left to right,

    e^T H e = sum_j v_j (t_j - q_j)^2,   t_j = w_j + sum_{i < j} U_ij e_i,

so the best choice for column j, given the columns to its left, is to round t_j instead of w_j. This is GPTQ (Frantar et
al., arXiv 2210.17323) in the form LDLQ (Chee et al., arXiv 2307.13304, section 3.1), which needs no inverse.

Columns are rounded block by block. With a for all columns to the left of block b, the share of b in the sum is

    (g_b - q_b)^T S_b (g_b - q_b),   S_b = U_bb diag(v_b) U_bb^T,   g_b = w_b + U_bb^-T U_ab^T e_a,

so the block's scales have to fit the *targets* g_b: ggml searches for them, with column weights v. After rounding,
coordinate descent lowers this form further, over d and dmin, then s and m of each sub-block, then the codes.

A type without an entry in ``formats.FORMATS``, and a tensor without Hessian factors, are rounded to nearest.

Arrays of one block have columns first: the values of many rows in one column are contiguous. Cost per row:
``n_cols ** 2`` multiplications in matrix products, and about ten passes over every column.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular

from ..errors import GgmlError
from ..llamacpp import ggml
from ..records import Float32, Float64, Tensor
from .formats import FORMATS, Blocks, Format, UInt8, determined, inverse, joined, to_float16
from .hessian_factors import HessianFactors
from .quantizer import Quantizer, Rounding
from .rtn import make_rtn

# Rows are rounded in tiles: rows ``k * ROW_TILE`` and following of a tensor, with zeros for rows outside the request.
# The last bits of a matrix product depend on its shape and on the position of a row in it, so both are fixed.
ROW_TILE = 256

_STEPS = (-3, -2, -1, 0, 1, 2, 3)  # of s, tried in a descent


@dataclass(frozen=True)
class GptqQuantizer:
    """Rounds the rows of one tensor by GPTQ: less error in the matrix's output than ggml's quantizers, same bytes.

    A row's error is ``(x - q)^T H (x - q)``, its squared norm ``sum_j H_jj x_j**2``. The same BLAS on one thread gives
    the same bytes; callers set the number of threads. In memory, beside the result: five float32 copies of a tile.

    Attributes:
        factors: of the Hessian H of the matrix's input.
        n_descents: passes of descent over the scales and codes of each block.

    """

    factors: HessianFactors
    n_descents: int = 1
    tile_rows: int = ROW_TILE

    def quantize(self, rows: Float32, type_name: str, first_row: int = 0) -> UInt8:
        """See ``Quantizer``; also raises ``GgmlError`` when the factors have another number of columns."""
        n_rows, n_cols = rows.shape
        if len(self.factors.diagonal) != n_cols:
            raise GgmlError(f"Hessian factors: wanted {n_cols} columns, got {len(self.factors.diagonal)}")
        if type_name not in FORMATS:
            return ggml.quantize(rows, type_name, self.factors.diagonal)
        out = np.empty((n_rows, ggml.row_bytes(type_name, n_cols)), dtype=np.uint8)
        with np.errstate(over="ignore", invalid="ignore"):  # scales beyond float16 become infinite, as ggml's do
            for start, stop, place in _tiles(n_rows, first_row):
                tile = np.zeros((ROW_TILE, n_cols), dtype=np.float32)
                within = slice(place, place + stop - start)
                tile[within] = rows[start:stop]
                blocks = round_rows(tile, type_name, self.factors, self.n_descents)
                out[start:stop] = FORMATS[type_name].pack(blocks)[within]
        return out

    def errors(self, rows: Float32, type_name: str, first_row: int = 0) -> Float64:
        """See ``Quantizer``."""
        data = self.quantize(rows, type_name, first_row)
        return self.factors.row_errors(rows - ggml.dequantize(data, type_name, rows.shape[1]))

    def squared_norms(self, rows: Float32, first_row: int = 0) -> Float64:
        """See ``Quantizer``."""
        return (np.square(rows) @ self.factors.diagonal).astype(np.float64)


def make_gptq(tensor: Tensor, weights: Float32 | None, factors: HessianFactors | None) -> Quantizer:
    """Return a quantizer for the tensor: round-to-nearest where there are no Hessian factors."""
    return make_rtn(tensor, weights, None) if factors is None else GptqQuantizer(factors)


ROUNDING = Rounding("gptq", "GPTQ: the columns to the right compensate each column's rounding error", True, make_gptq,
                    ROW_TILE)  # fmt: skip


def _tiles(n_rows: int, first_row: int) -> Iterator[tuple[int, int, int]]:
    """Yield the first and last row of each tile, and the position of the first row in the tile."""
    start = 0
    while start < n_rows:
        place = (first_row + start) % ROW_TILE
        stop = min(n_rows, start + ROW_TILE - place)
        yield start, stop, place
        start = stop


def round_rows(rows: Float32, type_name: str, factors: HessianFactors, n_descents: int) -> Blocks:
    """Round rows, ``(n_rows, n_cols)`` float32, with ``n_descents`` passes of descent over every block."""
    format = FORMATS[type_name]
    weights = np.ascontiguousarray(rows.T)
    errors = np.empty_like(weights)
    rounded = []
    for start in range(0, len(weights), format.block):
        columns = slice(start, start + format.block)
        triangle, variances = factors.upper[columns, columns], factors.variances[columns]
        pull = factors.upper[:start, columns].T @ errors[:start]
        pull = solve_triangular(triangle, pull, trans=1, unit_diagonal=True, check_finite=False)
        targets = weights[columns] + pull
        work = _Columns(targets, format.unpack(ggml.quantize(targets.T, type_name, variances)), format)
        work.round(triangle)
        form = (triangle * variances) @ triangle.T
        for _ in range(n_descents):
            work.descend(form)
        errors[columns] = work.errors - pull
        rounded.append(work.blocks())
    return joined(rounded)


class _Columns:
    """The columns of one block being rounded.

    Attributes:
        codes: ``(block, n_rows)`` uint8.
        s, m: ``(n_sub, n_rows)`` float32, integers.
        d, dmin: ``(n_rows,)`` float32, values of float16.
        errors: ``(block, n_rows)`` float32, targets minus rounded values.

    """

    def __init__(self, targets: Float32, blocks: Blocks, format: Format) -> None:
        """Take the targets, ``(block, n_rows)``, and the scales of one block of every row."""
        self.codes: UInt8 = np.empty(targets.shape, dtype=np.uint8)
        self.errors = np.empty_like(targets)
        self.s, self.m = (np.ascontiguousarray(x[:, 0].T, dtype=np.float32) for x in (blocks.s, blocks.m))
        self.d, self.dmin = blocks.d[:, 0], blocks.dmin[:, 0]
        self._targets, self._format = targets, format
        self._subs = list(itertools.pairwise(range(0, format.block + 1, format.sub)))

    def blocks(self) -> Blocks:
        """Return the result: one block of every row."""
        codes = np.ascontiguousarray(self.codes.T).reshape(len(self.d), 1, self._format.n_sub, -1)
        s, m = (x.T.astype(np.int16)[:, None] for x in (self.s, self.m))
        return Blocks(codes, s, m, self.d[:, None], self.dmin[:, None])

    def round(self, triangle: Float32) -> None:
        """Round from left to right and propagate the errors by ``triangle``, the ``(block, block)`` part of U."""
        for sub, (first, last) in enumerate(self._subs):
            aims = self._targets[first:last] + triangle[:first, first:last].T @ self.errors[:first]
            scales = self._scales(sub)
            for j in range(first, last):
                aim = aims[j - first] + triangle[first:j, j] @ self.errors[first:j]
                self._round_column(j, aim, scales)

    def descend(self, form: Float32) -> None:
        """Lower ``e^T S e``, ``(block, block)`` S: d and dmin, then in each sub-block s and m, and code after code.

        In column j it is least at ``e_j = -sum_{i != j} S_ji e_i / S_jj``.
        """
        self._move_block_scales(form)
        over_diagonal = 1 / form.diagonal()
        for sub, (first, last) in enumerate(self._subs):
            within = form[first:last, first:last]
            pulls = form[first:last] @ self.errors
            if self._format.has_s:
                pulls += within @ self._move_sub_scales(sub, within, pulls)
            scales = self._scales(sub)
            before = self.errors[first:last].copy()
            for j in range(first, last):
                aim = pulls[j - first] + form[j, first:j] @ (self.errors[first:j] - before[: j - first])
                aim *= over_diagonal[j]
                aim += self._targets[j]
                aim -= self.errors[j]
                self._round_column(j, aim, scales)

    def _move_block_scales(self, form: Float32) -> None:
        """Fit d and dmin by least squares under the form, all else fixed; keep float16 values that are better."""
        a = np.repeat(self.s, self._format.sub, axis=0) * self._format.levels[self.codes]
        b = -np.repeat(self.m, self._format.sub, axis=0)
        fa, fb, fe = form @ a, form @ b, form @ self.errors
        aa, ab, bb, ae, be = _dots(fa, a), _dots(fa, b), _dots(fb, b), _dots(fe, a), _dots(fe, b)
        over = inverse(determined(aa, ab, bb))
        x: Float32 = np.where(over > 0, (ae * bb - be * ab) * over, ae * inverse(aa))  # a alone where there is no b
        x = to_float16(self.d + x) - self.d
        y: Float32 = (be * aa - ae * ab) * over
        y = to_float16(self.dmin + y) - self.dmin
        gain = x * (2 * ae - x * aa) + y * (2 * be - y * bb) - 2 * x * y * ab
        x, y = np.where(gain > 0, x, np.float32(0)), np.where(gain > 0, y, np.float32(0))
        self.d, self.dmin = self.d + x, self.dmin + y
        self.errors -= x * a + y * b

    def _move_sub_scales(self, sub: int, within: Float32, pulls: Float32) -> Float32:
        """Move s and m of a sub-block to the best integers nearby, all else fixed, and return the change in errors.

        ``within`` is the form restricted to the sub-block, ``pulls`` its rows of the form times the errors.
        """
        first, last = self._subs[sub]
        s, m, m_max = self.s[sub], self.m[sub], self._format.m_max
        # raising s by 1 subtracts a from the errors, raising m by 1 adds b
        a, b = self.d * self._format.levels[self.codes[first:last]], self.dmin
        fa = within @ a
        aa, ab, bb = _dots(fa, a), b * fa.sum(0), b * b * within.sum()
        ae, be = _dots(pulls, a), b * pulls.sum(0)
        over = inverse(bb)
        best, best_x, best_y = np.zeros_like(s), np.zeros_like(s), np.zeros_like(s)
        for step in _STEPS:
            x = np.clip(s + step, *self._format.s_range) - s
            y = np.clip(np.rint(m + (x * ab - be) * over), 0, m_max) - m if m_max else best_y
            gain = x * (2 * ae - x * aa) - y * (2 * be + y * bb - 2 * x * ab)
            better = gain > best
            best, best_x, best_y = (np.where(better, *pair) for pair in ((gain, best), (x, best_x), (y, best_y)))
        self.s[sub] += best_x
        self.m[sub] += best_y
        change: Float32 = best_y * b - best_x * a
        self.errors[first:last] += change
        return change

    def _scales(self, sub: int) -> tuple[Float32, Float32, Float32]:
        """Return scale, offset and 1 / scale of a sub-block, ``(n_rows,)`` each."""
        scale = self.d * self.s[sub]
        return scale, self.dmin * self.m[sub], inverse(scale)

    def _round_column(self, j: int, aim: Float32, scales: tuple[Float32, Float32, Float32]) -> None:
        """Set column j to the codes nearest to ``aim``, ``(n_rows,)``, which is overwritten."""
        scale, offset, over_scale = scales
        aim += offset
        aim *= over_scale
        self.codes[j] = self._format.to_levels(aim)
        aim *= scale
        aim -= offset
        np.subtract(self._targets[j], aim, out=self.errors[j])


def _dots(a: Float32, b: Float32) -> Float32:
    """Return the products of each column of one array with that of the other."""
    dots: Float32 = np.einsum("ij,ij->j", a, b)
    return dots
