"""GPTQ rounding in numpy, column after column: the oracle of the compiled loop.

Arrays of one block have columns first: the values of many rows in one column are contiguous. The scales of a block are
those that ggml's quantizer finds for its targets.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from nsds_gguf.llamacpp import ggml
from nsds_gguf.quantize.formats import FORMATS, Blocks, Format, UInt8, joined
from nsds_gguf.quantize.hessian_factors import HessianFactors
from nsds_gguf.records import Float32

_STEPS = (-3, -2, -1, 0, 1, 2, 3)  # of s, tried in a descent
_DETERMINED = 1e-6  # a determinant below this share of the product of the diagonal counts as 0


def round_rows(rows: Float32, type_name: str, factors: HessianFactors, n_descents: int) -> Blocks:
    """Round rows, ``(n_rows, n_cols)`` float32, with ``n_descents`` passes of descent over every block."""
    format = FORMATS[type_name]
    weights = np.ascontiguousarray(rows[:, factors.order].T)
    errors = np.empty_like(weights)
    rounded = []
    for start in range(0, len(weights), format.block):
        columns = slice(start, start + format.block)
        triangle, variances = factors.upper[columns, columns], factors.variances[columns]
        pull = factors.upper[:start, columns].T @ errors[:start]
        pull = solve_triangular(triangle, pull, trans=1, unit_diagonal=True, check_finite=False)
        targets = weights[columns] + pull
        work = _Columns(targets, scaled(targets.T, type_name, variances), format)
        work.round(triangle)
        form = (triangle * variances) @ triangle.T
        for _ in range(n_descents):
            work.descend(form)
        errors[columns] = work.errors - pull
        rounded.append(work.blocks())
    return in_place(joined(rounded), factors.order, format)


def scaled(targets: Float32, type_name: str, variances: Float32) -> Blocks:
    """Return blocks with the scales that the targets get, ``(n_rows, n_cols)``: those of ggml, where it searches."""
    blocks = FORMATS[type_name].unpack(ggml.quantize(targets, type_name, variances))
    if type_name == "Q2_0":
        with np.errstate(over="ignore"):
            blocks.d[...] = to_float16(few_levels(targets.reshape(*blocks.d.shape, -1), variances))
    return blocks


def few_levels(x: Float32, w: Float32) -> Float32:
    """Return the scale of levels -1 to 2 of every block, ``(n_rows, n_blocks, 64)`` to ``(n_rows, n_blocks)``."""
    w = w.reshape(x.shape[1:])
    largest = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)
    scale, best = np.zeros_like(x[..., 0]), np.zeros_like(x[..., 0])
    for step in (*range(-26, -5), *range(6, 27)):
        with np.errstate(divide="ignore", invalid="ignore"):
            levels = np.clip(np.rint(np.float32(0.1) * np.float32(step) / largest * x), -1, 2)
            lx, ll = (w * levels * x).sum(-1), (w * levels * levels).sum(-1)
            better = (ll > 0) & (lx * lx > best * ll)
            scale, best = np.where(better, lx / ll, scale), np.where(better, lx / ll * lx, best)
    return np.where(np.abs(largest[..., 0]) < 1e-15, np.float32(0), scale)


def order_of(columns: list[int], diagonal: Float32, sizes: tuple[int, ...] = (256, 64, 32, 16)) -> list[int]:
    """Return columns in the order of rounding: blocks of the first size by falling mean, and so on within each."""
    if not sizes:
        return sorted(columns, key=lambda j: -diagonal[j])
    size, *smaller = sizes
    if len(columns) % size:
        return order_of(columns, diagonal, tuple(smaller))
    groups = [columns[i : i + size] for i in range(0, len(columns), size)]
    groups.sort(key=lambda group: -sum(diagonal[j] for j in group))
    return [j for group in groups for j in order_of(group, diagonal, tuple(smaller))]


def in_place(blocks: Blocks, order: NDArray[np.int64], format: Format) -> Blocks:
    """Return blocks whose columns are in the order of rounding with every column where the matrix has it."""
    found = Blocks(*(np.empty_like(x) for x in (blocks.codes, blocks.s, blocks.m, blocks.d, blocks.dmin)))
    for place, column in enumerate(order):
        (to, within), (at, rounded) = divmod(column, format.block), divmod(place, format.block)
        (sub, j), (other, i) = divmod(within, format.sub), divmod(rounded, format.sub)
        found.codes[:, to, sub, j] = blocks.codes[:, at, other, i]
        found.s[:, to, sub], found.m[:, to, sub] = blocks.s[:, at, other], blocks.m[:, at, other]
        found.d[:, to], found.dmin[:, to] = blocks.d[:, at], blocks.dmin[:, at]
    return found


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
        self.codes[j] = to_levels(self._format, aim)
        aim *= scale
        aim -= offset
        np.subtract(self._targets[j], aim, out=self.errors[j])


def _dots(a: Float32, b: Float32) -> Float32:
    """Return the products of each column of one array with that of the other."""
    dots: Float32 = np.einsum("ij,ij->j", a, b)
    return dots


def to_levels(format: Format, x: Float32) -> UInt8:
    """Replace each value by the nearest level, in place, and return the codes."""
    low, high = format.levels[0], format.levels[-1]
    if not format.has_even_levels:
        codes: UInt8 = np.searchsorted((format.levels[1:] + format.levels[:-1]) / np.float32(2), x).astype(np.uint8)
        x[...] = format.levels[codes]
        return codes
    np.rint(x, out=x)
    np.minimum(x, high, out=x)
    np.maximum(x, low, out=x)  # keeps NaN, of weights beyond any scale
    return (x - low).astype(np.uint8)


def inverse(scale: Float32) -> Float32:
    """Return 1 / scale, and 0 where the scale is 0 and all levels are the same weight."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def determined(aa: Float32, ab: Float32, bb: Float32) -> Float32:
    """Return the determinants of normal equations in two unknowns, and 0 where they are nearly singular."""
    determinant = aa * bb - ab * ab
    return np.where(determinant > _DETERMINED * aa * bb, determinant, np.float32(0))


def to_float16(x: Float32) -> Float32:
    """Round to float16."""
    return x.astype(np.float16).astype(np.float32)
