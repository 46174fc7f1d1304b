"""GPTQ rounding and Hessian factors on a PyTorch device: the algorithm of ``gptq``, all rows of a tile at once.

``gptq`` explains the formulas and ``formats`` the layouts; the steps are those of native/rounding.h. Scales come from
``scales_torch``, so the search runs on the device too. Importing this module imports torch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..compute.torch_backend import exact_products, is_finite, reports_full_memory
from ..errors import GgmlError
from ..llamacpp import ggml
from ..records import Float32, Float64, Tensor
from .formats import FORMATS, Blocks, Format, UInt8, joined
from .hessian_factors import DAMPING, SHRINKAGE, HessianFactors, check_factorable, not_definite, rounding_order
from .quantizer import Quantizer
from .rtn import make_rtn
from .scales_torch import find_scales

ROW_TILE = 4096  # most rows of a tile: a GPU works on them at once
# A determinant below this share of the product of the diagonal counts as 0, as in native/rounding.h.
_DETERMINED = 1e-6
_STEPS = (-3, -2, -1, 0, 1, 2, 3)  # of s, tried in a descent
_KEPT_FACTORS = 2  # on the device


def factor_hessian_on(
    device: str, hessian: NDArray[np.floating], *, shrinkage: float = SHRINKAGE, damping: float = DAMPING
) -> HessianFactors:
    """Factor a Hessian in float64 on a device; arguments, result and errors are those of ``factor_hessian``."""
    with reports_full_memory():
        order = rounding_order(hessian.diagonal())
        h = torch.from_numpy(hessian[np.ix_(order, order)]).to(device).double()
        diagonal = h.diagonal().clone()
        mean = float(diagonal.mean())
        check_factorable(is_finite(h), mean)
        diagonal += damping * mean
        h *= 1 - shrinkage
        h.diagonal().copy_(diagonal)
        lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
        if int(info):
            raise not_definite(shrinkage, damping, order[len(order) - int(info)])
        upper = lower.flip(0, 1)
        pivots = upper.diagonal().clone()
        found, variances = (part.float().cpu().numpy() for part in (upper / pivots, pivots.square()))
    kept = (hessian.diagonal() + damping * mean).astype(np.float32)
    return HessianFactors(found, variances, kept, order)


@dataclass(frozen=True)
class TorchGptqQuantizer:
    """A ``Quantizer`` like ``gptq.GptqQuantizer``, on a device; tiles run there one after another.

    On the device: the factors of two tensors, and about ten float32 copies of a tile.

    Attributes:
        factors: of the Hessian H of the matrix's input.
        device: PyTorch's name of the device.
        tile_rows: rows that are rounded together; as a matrix product's last bits depend on its shape, each tile has
            as many, with zeros for rows outside the request.
        n_descents: passes of descent over the scales and codes of each block.

    """

    factors: HessianFactors
    device: str
    tile_rows: int = ROW_TILE
    n_descents: int = 1

    def quantize(self, rows: Float32, type_name: str, first_row: int = 0) -> UInt8:
        """See ``Quantizer``; also raises ``GgmlError`` when the factors have another number of columns."""
        return self._rounded(rows, type_name, first_row)[0]

    def errors(self, rows: Float32, type_name: str, first_row: int = 0) -> Float64:
        """See ``Quantizer``."""
        return self._rounded(rows, type_name, first_row)[1]

    def squared_norms(self, rows: Float32, first_row: int = 0) -> Float64:
        """See ``Quantizer``."""
        return (np.square(rows) @ self.factors.diagonal).astype(np.float64)

    def _rounded(self, rows: Float32, type_name: str, first_row: int) -> tuple[UInt8, Float64]:
        """Return bytes and squared errors of rows."""
        n_rows, n_cols = rows.shape
        if len(self.factors.diagonal) != n_cols:
            raise GgmlError(f"Hessian factors: wanted {n_cols} columns, got {len(self.factors.diagonal)}")
        if type_name not in FORMATS:
            data = ggml.quantize(rows, type_name, self.factors.diagonal)
            return data, self.factors.row_errors(rows - ggml.dequantize(data, type_name, n_cols))
        out, squared = np.empty((n_rows, ggml.row_bytes(type_name, n_cols)), np.uint8), np.empty(n_rows)
        start = 0
        while start < n_rows:
            place = (first_row + start) % self.tile_rows
            stop = min(n_rows, start + self.tile_rows - place)
            tile = np.zeros((self.tile_rows, n_cols), np.float32)
            within = slice(place, place + stop - start)
            tile[within] = rows[start:stop]
            blocks, errors = self._round_tile(tile, type_name)
            out[start:stop], squared[start:stop] = FORMATS[type_name].pack(blocks)[within], errors[within]
            start = stop
        return out, squared

    def _round_tile(self, tile: Float32, type_name: str) -> tuple[Blocks, Float64]:
        with _on_device, reports_full_memory(), exact_products(), torch.no_grad():
            factors = _factors_on(self.device, self.factors)
            weights = torch.from_numpy(tile.T[self.factors.order]).to(self.device)
            blocks, errors = round_columns(weights, type_name, factors, self.n_descents)
            reduced = factors.upper.T @ errors
            squared: Float64 = (factors.variances.double() @ reduced.double().square_()).cpu().numpy()
        return blocks.reordered(self.factors.order), squared


def make_gptq_on(device: str, tensor: Tensor, weights: Float32 | None, factors: HessianFactors | None) -> Quantizer:
    """Return a quantizer for the tensor on a device; a tile is a matrix of the tensor, or a part of a large one.

    Tensors without Hessian factors are rounded to nearest, by ggml.
    """
    if factors is None:
        return make_rtn(tensor, weights, None)
    return TorchGptqQuantizer(factors, device, min(ROW_TILE, tensor.n_matrix_rows))


@dataclass(frozen=True)
class DeviceFactors:
    """``HessianFactors`` as tensors on a device."""

    upper: Any
    variances: Any


_on_device = threading.Lock()  # held while a tile is rounded: one tile on the device at a time
_kept: OrderedDict[int, tuple[HessianFactors, DeviceFactors]] = OrderedDict()


def _factors_on(device: str, factors: HessianFactors) -> DeviceFactors:
    """Return factors on the device; the last ones stay there. Call it with ``_on_device`` held."""
    if id(factors) not in _kept:
        while len(_kept) >= _KEPT_FACTORS:
            _kept.popitem(last=False)
        parts = (torch.from_numpy(part).to(device) for part in (factors.upper, factors.variances))
        _kept[id(factors)] = factors, DeviceFactors(*parts)
    _kept.move_to_end(id(factors))
    return _kept[id(factors)][1]


def round_columns(weights: Any, type_name: str, factors: DeviceFactors, n_descents: int) -> tuple[Blocks, Any]:
    """Round rows, given as columns ``(n_cols, n_rows)``; return their blocks, and their errors in the same shape."""
    format, errors, rounded = FORMATS[type_name], torch.empty_like(weights), []
    for start in range(0, len(weights), format.block):
        columns = slice(start, start + format.block)
        triangle, variances = factors.upper[columns, columns], factors.variances[columns]
        pull = factors.upper[:start, columns].T @ errors[:start]
        pull = torch.linalg.solve_triangular(triangle.T, pull, upper=False, unitriangular=True)
        targets = weights[columns] + pull
        work = _Columns(targets, find_scales(targets.T, type_name, variances, format.sub), format)
        work.round(triangle)
        form = (triangle * variances) @ triangle.T
        for _ in range(n_descents):
            work.descend(form)
        errors[columns] = work.errors - pull
        rounded.append(work.blocks())
    return joined(rounded), errors


class _Columns:
    """The columns of one block being rounded.

    Attributes:
        codes: ``(block, n_rows)`` uint8.
        errors: ``(block, n_rows)`` float32, targets minus rounded values.
        d, dmin: ``(n_rows,)`` float32, values of float16.
        s, m: ``(n_sub, n_rows)`` float32, integers.

    """

    def __init__(self, targets: Any, scales: tuple[Any, Any, Any, Any], format: Format) -> None:
        """Take the targets, ``(block, n_rows)``, and the scales of one block of every row."""
        self.codes, self.errors = torch.empty_like(targets, dtype=torch.uint8), torch.empty_like(targets)
        self.d, self.dmin, s, m = scales
        self.s, self.m = s.T.contiguous(), m.T.contiguous()
        self._targets, self._format = targets, format
        self._levels = torch.from_numpy(format.levels).to(targets.device)
        self._midpoints = (self._levels[1:] + self._levels[:-1]) / 2
        self._subs = [(first, first + format.sub) for first in range(0, format.block, format.sub)]

    def blocks(self) -> Blocks:
        """Return the result on the CPU: one block of every row."""
        codes = self.codes.T.contiguous().cpu().numpy().reshape(len(self.d), 1, self._format.n_sub, -1)
        s, m = (x.T.to(torch.int16).contiguous().cpu().numpy()[:, None] for x in (self.s, self.m))
        return Blocks(codes, s, m, self.d.cpu().numpy()[:, None], self.dmin.cpu().numpy()[:, None])

    def round(self, triangle: Any) -> None:
        """Round from left to right and propagate the errors by the ``(block, block)`` part of U."""
        for sub, (first, last) in enumerate(self._subs):
            aims = self._targets[first:last] + triangle[:first, first:last].T @ self.errors[:first]
            self._round_sub(sub, aims, triangle[first:last, first:last].T, torch.zeros_like(aims))

    def descend(self, form: Any) -> None:
        """Lower ``e^T S e``: d and dmin, then in each sub-block s and m, and code after code."""
        self._move_block_scales(form)
        over_diagonal = 1 / form.diagonal()
        for sub, (first, last) in enumerate(self._subs):
            within, pulls = form[first:last, first:last], form[first:last] @ self.errors
            if self._format.has_s:
                pulls += within @ self._move_sub_scales(sub, within, pulls)
            over, before = over_diagonal[first:last, None], self.errors[first:last].clone()
            self._round_sub(sub, pulls * over + self._targets[first:last] - before, within * over, before)

    def _move_block_scales(self, form: Any) -> None:
        """Fit d and dmin by least squares under the form, all else fixed; keep float16 values that are better."""
        a = self.s.repeat_interleave(self._format.sub, 0) * self._levels[self.codes.int()]
        b = -self.m.repeat_interleave(self._format.sub, 0)
        fa, fb, fe = form @ a, form @ b, form @ self.errors
        aa, ab, bb, ae, be = _dots(fa, a), _dots(fa, b), _dots(fb, b), _dots(fe, a), _dots(fe, b)
        determinant = aa * bb - ab * ab
        over = _inverse(torch.where(determinant > _DETERMINED * aa * bb, determinant, 0.0))
        x = torch.where(over > 0, (ae * bb - be * ab) * over, ae * _inverse(aa))  # a alone where there is no b
        x = (self.d + x).half().float() - self.d
        y = (self.dmin + (be * aa - ae * ab) * over).half().float() - self.dmin
        gain = x * (2 * ae - x * aa) + y * (2 * be - y * bb) - 2 * x * y * ab
        x, y = torch.where(gain > 0, x, 0.0), torch.where(gain > 0, y, 0.0)
        self.d, self.dmin = self.d + x, self.dmin + y
        self.errors -= x * a + y * b

    def _move_sub_scales(self, sub: int, within: Any, pulls: Any) -> Any:
        """Move s and m of a sub-block to the best integers nearby, all else fixed, and return the change in errors."""
        first, last = self._subs[sub]
        s, m, m_max = self.s[sub], self.m[sub], self._format.m_max
        a, b = self.d * self._levels[self.codes[first:last].int()], self.dmin
        fa = within @ a
        aa, ab, bb = _dots(fa, a), b * fa.sum(0), b * b * within.sum()
        ae, be = _dots(pulls, a), b * pulls.sum(0)
        over = _inverse(bb)
        best = best_x = best_y = torch.zeros_like(s)
        for step in _STEPS:
            x = (s + step).clamp(*self._format.s_range) - s
            y = torch.round(m + (x * ab - be) * over).clamp(0, m_max) - m if m_max else torch.zeros_like(s)
            gain = x * (2 * ae - x * aa) - y * (2 * be + y * bb - 2 * x * ab)
            better = gain > best
            best, best_x = torch.where(better, gain, best), torch.where(better, x, best_x)
            best_y = torch.where(better, y, best_y)
        self.s[sub] += best_x
        self.m[sub] += best_y
        change = best_y * b - best_x * a
        self.errors[first:last] += change
        return change

    def _round_sub(self, sub: int, aims: Any, feedback: Any, before: Any) -> None:
        """Round columns of a sub-block from left to right: j to ``aim_j + sum_{i < j} feedback_ji (e_i - before_i)``.

        The loop computes in units of the scale, so that it takes few operations: starting them is what a GPU waits for.

        Args:
            sub: number of the sub-block.
            aims: ``(sub, n_rows)``.
            feedback: ``(sub, sub)``, of which the part left of the diagonal counts.
            before: ``(sub, n_rows)``.

        """
        first, last = self._subs[sub]
        scale, offset = self.d * self.s[sub], self.dmin * self.m[sub]
        over, shifted = _inverse(scale), self._targets[first:last] + offset
        aims, moved, levels = (aims + offset) * over, torch.empty_like(aims), torch.empty_like(aims)
        columns = zip(aims, (shifted - before) * over, levels, moved, strict=True)
        for j, (aim, centre, level, move) in enumerate(columns):
            self._nearest(torch.addmv(aim, moved[:j].T, feedback[j, :j]), level)
            torch.sub(centre, level, out=move)
        self.errors[first:last] = torch.where(scale != 0, moved * scale + before, shifted)
        self.codes[first:last] = self._codes_of(levels)

    def _nearest(self, values: Any, out: Any) -> None:
        """Write the level nearest to each value."""
        if self._format.has_even_levels:
            torch.clamp(values.round_(), float(self._format.levels[0]), float(self._format.levels[-1]), out=out)
        else:
            torch.index_select(self._levels, 0, torch.bucketize(values, self._midpoints), out=out)

    def _codes_of(self, levels: Any) -> Any:
        """Return the numbers of levels, uint8."""
        if self._format.has_even_levels:
            return (levels - self._levels[0]).to(torch.uint8)
        return torch.bucketize(levels.contiguous(), self._midpoints).to(torch.uint8)


def _dots(a: Any, b: Any) -> Any:
    """Return the products of each column of one array with that of the other."""
    return (a * b).sum(0)


def _inverse(scale: Any) -> Any:
    """Return 1 / scale, and 0 where the scale is 0."""
    return torch.where(scale != 0, 1 / scale, 0.0)
