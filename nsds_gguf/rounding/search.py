"""Scales that fit better than ggml's: alternating least squares over the whole numbers that a format stores.

ggml searches the scale of each sub-block by itself and rounds it afterwards to what the format stores. Here the rounded
numbers are what is searched, in turns, from ggml's on:

* d and dmin of a block are fitted to its codes, s and m: least squares with two unknowns, rounded to float16;
* s and m of a sub-block are tried at whole numbers around the least-squares fit to its codes, and beside those it has.

Every trial rounds the weights anew, and is kept where it lowers the weighted squared error.
"""

from __future__ import annotations

import numpy as np

from ..records import Float32
from .formats import Blocks, Format, UInt8, determined, inverse, to_float16


def refine(rows: Float32, importance: Float32 | None, blocks: Blocks, format: Format, n_rounds: int) -> Blocks:
    """Return blocks whose weighted squared error is lower, or the same.

    Args:
        rows: ``(n_rows, n_cols)`` float32.
        importance: ``(n_cols,)`` float32, weight of each column's squared error, or ``None`` for equal weights.
        blocks: scales to start from; their codes are made anew.
        format: of the blocks.
        n_rounds: turns of the search; each takes about as long as ggml's whole search.

    """
    search = _Search(rows, importance, blocks, format)
    for _ in range(n_rounds):
        search.fit_blocks()
        if format.has_s:
            search.try_sub_blocks()
    return search.blocks()


class _Search:
    """The best scales so far: ``s``, ``m`` and ``costs`` of sub-blocks, ``d`` and ``dmin`` of blocks, ``codes``."""

    def __init__(self, rows: Float32, importance: Float32 | None, blocks: Blocks, format: Format) -> None:
        """Round the weights with the scales given."""
        shape = blocks.codes.shape
        self.format = format
        self.x = rows.reshape(shape)
        self.w = np.ones(shape[1:], np.float32) if importance is None else importance.reshape(shape[1:])
        self.wx = self.w * self.x
        self.s, self.m = blocks.s.astype(np.float32), blocks.m.astype(np.float32)
        self.d, self.dmin = blocks.d, blocks.dmin
        self.codes, self.costs = self._rounded(self.d, self.dmin, self.s, self.m)

    def blocks(self) -> Blocks:
        """Return the result."""
        return Blocks(self.codes, self.s.astype(np.int16), self.m.astype(np.int16), self.d, self.dmin)

    def fit_blocks(self) -> None:
        """Fit d and dmin to the codes, by least squares."""
        scaled = self.s[..., None] * self.format.levels[self.codes]
        weighted = self.w * scaled
        aa, ax = (weighted * scaled).sum((-1, -2)), (self.wx * scaled).sum((-1, -2))
        if self.format.m_max:
            ab = -(weighted.sum(-1) * self.m).sum(-1)
            bb = (self.w.sum(-1) * self.m * self.m).sum(-1)
            bx = -(self.wx.sum(-1) * self.m).sum(-1)
            over = inverse(determined(aa, ab, bb))
            d = np.where(over > 0, (ax * bb - bx * ab) * over, self.d)
            dmin = np.where(over > 0, (bx * aa - ax * ab) * over, self.dmin)
        else:
            d, dmin = np.where(aa > 0, ax * inverse(aa), self.d), self.dmin
        d, dmin = to_float16(d), to_float16(dmin)
        codes, costs = self._rounded(d, dmin, self.s, self.m)
        better = costs.sum(-1) < self.costs.sum(-1)
        self.d, self.dmin = np.where(better, d, self.d), np.where(better, dmin, self.dmin)
        self.costs = np.where(better[..., None], costs, self.costs)
        self.codes = np.where(better[..., None, None], codes, self.codes)

    def try_sub_blocks(self) -> None:
        """Try other whole numbers for s and m."""
        level = self.format.levels[self.codes]
        weighted = self.w * level
        w, wx, wl = self.w.sum(-1), self.wx.sum(-1), weighted.sum(-1)
        wll, wlx = (weighted * level).sum(-1), (self.wx * level).sum(-1)
        d, dmin = self.d[..., None], self.dmin[..., None]
        if self.format.m_max:
            over = inverse(determined(wll, wl, w))
            fitted = np.floor(np.where(over > 0, (wlx * w - wx * wl) * over * inverse(d), self.s))
        else:
            fitted = np.floor(np.where(wll > 0, wlx * inverse(wll) * inverse(d), self.s))
        for s in (fitted, fitted + 1, self.s - 1, self.s + 1):
            s = np.clip(s, *self.format.s_range)
            # the best m for this s: what is taken off makes the means equal
            m = np.rint((d * s * wl - wx) * inverse(w * dmin)) if self.format.m_max else self.m
            self._try(s, np.clip(m, 0, self.format.m_max))
        if self.format.m_max:
            for step in (-1, 1):
                self._try(self.s, np.clip(self.m + step, 0, self.format.m_max))

    def _try(self, s: Float32, m: Float32) -> None:
        codes, costs = self._rounded(self.d, self.dmin, s, m)
        better = costs < self.costs
        self.s, self.m = np.where(better, s, self.s), np.where(better, m, self.m)
        self.costs = np.where(better, costs, self.costs)
        self.codes = np.where(better[..., None], codes, self.codes)

    def _rounded(self, d: Float32, dmin: Float32, s: Float32, m: Float32) -> tuple[UInt8, Float32]:
        """Return the best codes, and the weighted squared error of each sub-block."""
        scale, offset = (d[..., None] * s)[..., None], (dmin[..., None] * m)[..., None]
        q = self.x + offset
        q *= inverse(scale)
        codes = self.format.to_levels(q)
        q *= scale
        q -= offset
        q -= self.x
        q *= q
        q *= self.w
        costs: Float32 = q.sum(-1)
        return codes, costs
