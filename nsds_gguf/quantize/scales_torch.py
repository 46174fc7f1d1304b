"""The scales of blocks, searched on a PyTorch device: ggml's searches, many rows at once.

Source: ggml-quants.c, ``make_qx_quants``, ``make_qkx3_quants``, ``make_qp_quants`` and the ``quantize_row_*_impl`` that
call them with column weights. Sums run in another order than ggml's, so a candidate that is as good as another to the
last bits may win. Importing this module imports torch.

In the functions ``x`` is ``(..., n)``: the last dimension shares a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_ZERO = 1e-15  # ggml's GROUP_MAX_EPS: below it all values count as 0
_TRIES = 5  # passes of ``positive`` over the codes

# d, dmin: (n_rows,); s, m: (n_rows, n_sub); all float32, integers in s and m
Scales = tuple[Any, Any, Any, Any]


def find_scales(targets: Any, type_name: str, variances: Any, sub: int) -> Scales:
    """Return d, dmin, s and m of one block of every row.

    Args:
        targets: ``(n_rows, block)`` float32.
        type_name: a key of ``formats.FORMATS``.
        variances: ``(block,)`` float32, the column weights.
        sub: weights of a sub-block.

    """
    x, w = (part.unflatten(-1, (-1, sub)) for part in (targets, variances))
    return _SEARCHES[type_name](x, w)


def signed(x: Any, n_max: int, w: Any) -> tuple[Any, Any]:
    """Return the scale of codes from ``-n_max`` to ``n_max - 1`` with the least weighted error, and the codes."""
    largest = _largest(x)
    is_zero = largest.abs() < _ZERO
    best_scale = best = best_codes = None
    for step in (0, *range(-9, 0), *range(1, 10)):
        codes = torch.round(-(n_max + 0.1 * step) / largest * x).clamp(-n_max, n_max - 1)
        lx, l2 = (w * x * codes).sum(-1, keepdim=True), (w * codes * codes).sum(-1, keepdim=True)
        scale = _ratio(lx, l2)
        if best is None:
            best_scale, best, best_codes = scale, scale * lx, codes
            continue
        better = (l2 > 0) & (lx * lx > best * l2)
        best_scale, best = torch.where(better, scale, best_scale), torch.where(better, scale * lx, best)
        best_codes = torch.where(better, codes, best_codes)
    return torch.where(is_zero, 0.0, best_scale)[..., 0], torch.where(is_zero, -float(n_max), best_codes)


def shifted(x: Any, n_max: int, w: Any) -> tuple[Any, Any]:
    """Return scale and offset of codes from 0 to ``n_max`` with the least weighted error, ``scale code - offset``."""
    offset, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    is_flat, scale = high <= offset, (high - offset) / n_max
    sum_w, sum_x = w.expand_as(x).sum(-1, keepdim=True), (w * x).sum(-1, keepdim=True)
    codes = torch.round(n_max / (high - offset) * (x - offset)).clamp(0, n_max)
    best = (w * (scale * codes + offset - x) ** 2).sum(-1, keepdim=True)
    for step in range(37):  # from the best offset so far, as ggml does
        codes = torch.round((-0.9 + 0.05 * step + n_max) / (high - offset) * (x - offset)).clamp(0, n_max)
        wl = w * codes
        l1, l2, lx = (part.sum(-1, keepdim=True) for part in (wl, wl * codes, wl * x))
        determinant = sum_w * l2 - l1 * l1
        this_scale = (sum_w * lx - sum_x * l1) / determinant
        this_offset = (l2 * sum_x - l1 * lx) / determinant
        is_above = this_offset > 0
        this_scale, this_offset = torch.where(is_above, lx / l2, this_scale), this_offset.clamp(max=0)
        error = (w * (this_scale * codes + this_offset - x) ** 2).sum(-1, keepdim=True)
        better = (determinant > 0) & (error < best)
        best, scale = torch.where(better, error, best), torch.where(better, this_scale, scale)
        offset = torch.where(better, this_offset, offset)
    return torch.where(is_flat, 0.0, scale)[..., 0], -offset[..., 0]


def positive(x: Any, n_max: int, w: Any) -> tuple[Any, Any]:
    """Return the scale of codes from 0 to ``n_max`` for values that are not negative, and the codes."""
    largest = x.amax(-1, keepdim=True).clamp(min=0)
    factor = n_max / largest
    best = (w * (x - torch.round(factor * x) / factor) ** 2).sum(-1, keepdim=True)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        other = (0.1 * step + n_max) / largest
        error = (w * (x - torch.round(other * x).clamp(max=n_max) / other) ** 2).sum(-1, keepdim=True)
        better = error < best
        best, factor = torch.where(better, error, best), torch.where(better, other, factor)
    codes = torch.round(factor * x).clamp(max=n_max)
    scale = _descended(x, n_max, w, codes)
    is_zero = largest < _ZERO
    return torch.where(is_zero, 0.0, scale)[..., 0], torch.where(is_zero, 0.0, codes)


def _descended(x: Any, n_max: int, w: Any, codes: Any) -> Any:
    """Move one code after another, in place, to what is best for the scale that then fits best; return that scale."""
    lx, l2 = (w * x * codes).sum(-1), (w * codes * codes).sum(-1)
    for _ in range(_TRIES):
        before = codes.clone()
        for i in range(x.shape[-1]):
            xi, wi, code = x[..., i], w[..., i], codes[..., i]
            lx_rest, l2_rest = lx - wi * xi * code, l2 - wi * code * code
            new = torch.round(xi * l2_rest / lx_rest).clamp(max=n_max)
            lx_new, l2_new = lx_rest + wi * xi * new, l2_rest + wi * new * new
            better = (lx_rest > 0) & (l2_rest > 0) & (new != code) & (lx_new * lx_new * l2 > lx * lx * l2_new)
            codes[..., i] = torch.where(better, new, code)
            lx, l2 = torch.where(better, lx_new, lx), torch.where(better, l2_new, l2)
        if torch.equal(before, codes):
            break
    return _ratio(lx, l2)[..., None]


def _with_minimum(n_max: int, s_max: int, spread: float) -> Callable[[Any, Any], Scales]:
    """Return the search of Q2_K, Q4_K and Q5_K: scale and offset of every sub-block, in integers of ``s_max``."""

    def search(x: Any, w: Any) -> Scales:
        weights = _by_size(x, w, spread)
        scales, offsets = shifted(x, n_max, weights)
        totals = weights.sum(-1)
        (d, s), (dmin, m) = positive(scales, s_max, totals), positive(offsets, s_max, totals)
        return _half(d), _half(dmin), s, m

    return search


def _q3_k(x: Any, w: Any) -> Scales:
    weights = _by_size(x, w, 2.0)
    scales, _ = signed(x, 4, weights)
    d, s = signed(scales, 32, weights.sum(-1))
    return _half(d), torch.zeros_like(d), s, torch.zeros_like(s)


def _q6_k(x: Any, w: Any) -> Scales:
    scales, _ = signed(x, 32, w)
    largest = _largest(scales)
    factor = torch.where(largest.abs() < _ZERO, 0.0, -128 / largest)
    d = torch.where(largest.abs() < _ZERO, 0.0, 1 / factor)[..., 0]
    s = torch.round(factor * scales).clamp(max=127)
    return _half(d), torch.zeros_like(d), s, torch.zeros_like(s)


def _one_scale(n_max: int) -> Callable[[Any, Any], Scales]:
    """Return the search of Q4_0 and Q5_0."""

    def search(x: Any, w: Any) -> Scales:
        return _plain(signed(x, n_max, _by_size(x, w, 1.0))[0])

    return search


def _q5_1(x: Any, w: Any) -> Scales:
    scale, offset = shifted(x, 31, _by_size(x, w, 1.0))
    d, _, s, _ = _plain(scale)
    return d, _half(offset[..., 0]), s, torch.ones_like(s)


def _q8_0(x: Any, w: Any) -> Scales:
    return _plain(x.abs().amax(-1) / 127)


def _q2_0(x: Any, w: Any) -> Scales:
    largest = _largest(x)
    scale = best = torch.zeros_like(largest)
    for step in (*range(-26, -5), *range(6, 27)):  # the scales that give the largest value 0.6 to 2.6 times a level
        q = torch.round(0.1 * step / largest * x).clamp(-1, 2)
        qx, q2 = (w * q * x).sum(-1, keepdim=True), (w * q * q).sum(-1, keepdim=True)
        found = _ratio(qx, q2)
        better = (q2 > 0) & (qx * qx > best * q2)
        scale, best = torch.where(better, found, scale), torch.where(better, found * qx, best)
    return _plain(torch.where(largest.abs() < _ZERO, 0.0, scale)[..., 0])


def _iq4_nl(x: Any, w: Any) -> Scales:
    levels = torch.tensor(_IQ4_NL, device=x.device, dtype=torch.float32)
    midpoints = (levels[1:] + levels[:-1]) / 2
    weights, largest = _by_size(x, w, 2.0), _largest(x)
    scale = best = None
    for first in (-_IQ4_NL[0], *(_IQ4_NL[0] + step for step in range(-7, 8))):
        q = levels[torch.bucketize((first / largest * x).contiguous(), midpoints)]
        qx, q2 = (weights * q * x).sum(-1, keepdim=True), (weights * q * q).sum(-1, keepdim=True)
        found = _ratio(qx, q2)
        if best is None:
            scale, best = found, found * qx
            continue
        better = (q2 > 0) & (qx * qx > best * q2)
        scale, best = torch.where(better, found, scale), torch.where(better, found * qx, best)
    return _plain(torch.where(largest.abs() < _ZERO, 0.0, scale)[..., 0])


def _plain(scale: Any) -> Scales:
    """Return the scales of a block of one sub-block, ``(n_rows, 1)``: s is 1 and there is no m."""
    d = _half(scale[..., 0])
    return d, torch.zeros_like(d), torch.ones_like(scale), torch.zeros_like(scale)


def _by_size(x: Any, w: Any, spread: float) -> Any:
    """Return column weights times ``sqrt(spread * mean square + x^2)``, which favours large weights."""
    mean_square = x.square().mean((-2, -1), keepdim=True)
    return w * torch.sqrt(spread * mean_square + x * x)


def _largest(x: Any) -> Any:
    """Return the value of largest magnitude, the first of equal ones, ``(..., 1)``."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def _ratio(a: Any, b: Any) -> Any:
    return torch.where(b != 0, a / b, 0.0)


def _half(x: Any) -> Any:
    """Round to float16."""
    return x.half().float()


# kvalues_iq4nl of ggml-common.h
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_SEARCHES: dict[str, Callable[[Any, Any], Scales]] = {
    "Q2_K": _with_minimum(3, 15, 1.0),
    "Q3_K": _q3_k,
    "Q4_K": _with_minimum(15, 63, 2.0),
    "Q5_K": _with_minimum(31, 63, 2.0),
    "Q6_K": _q6_k,
    "Q4_0": _one_scale(8),
    "IQ4_NL": _iq4_nl,
    "Q5_0": _one_scale(16),
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_0": _q2_0,
}
