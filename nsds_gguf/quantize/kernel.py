"""The compiled rounding loop (``native/``): calls it with arrays, and makes blocks of what it returns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..records import Float32, Float64
from ._rounding import nearest_rows as _nearest_rows
from ._rounding import round_rows as _round_rows
from ._rounding import variants as _variants
from .formats import FORMATS, Blocks
from .hessian_factors import HessianFactors

NEAREST_TYPES = frozenset({"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q2_0"})
OWN_SEARCH = frozenset({"Q2_0"})  # of these types, for whose scales ggml does not search


def round_rows(
    rows: Float32, type_name: str, factors: HessianFactors, n_descents: int, variant: str = ""
) -> tuple[Blocks, Float64]:
    """Round rows by GPTQ; see ``gptq`` for the method.

    Each row's result depends on no other row. Releases the GIL; uses one thread. In memory, besides the result: a
    float32 copy of the rows.

    Args:
        rows: ``(n_rows, n_cols)`` float32, whole blocks of the type.
        type_name: one of ``FORMATS``.
        factors: Hessian factors of ``n_cols`` columns.
        n_descents: passes of descent over every block.
        variant: one of ``variants()``; empty for the best.

    Returns:
        The blocks, and ``e^T H e`` of every row, ``(n_rows,)`` float64.

    Raises:
        ValueError: arrays of sizes that do not match.

    """
    if len(factors.order) != rows.shape[1]:
        raise ValueError(f"wanted factors of {rows.shape[1]} columns, got {len(factors.order)}")
    blocks, errors = _empty(rows, type_name)
    ordered = np.take(rows, factors.order, axis=1)
    x, upper, variances = (
        np.ascontiguousarray(each, dtype=np.float32) for each in (ordered, factors.upper, factors.variances)
    )
    _round_rows(x, upper, variances, type_name, n_descents, *_arrays(blocks), errors, variant)
    return blocks.reordered(factors.order), errors


def nearest_rows(rows: Float32, type_name: str, columns: Float32, variant: str = "") -> tuple[Blocks, Float64]:
    """Round rows to nearest, in a K-quant to the scales and codes of ggml's quantizer with column weights.

    In Q2_0 ggml does not search for scales; those found here leave a quarter of its error.

    Rows with a scale of 0, or of no finite value, may have other codes than ggml's (``FORMATS`` packs them to other
    bytes of the same value). Releases the GIL; uses one thread.

    Args:
        rows: ``(n_rows, n_cols)`` float32, whole blocks of the type.
        type_name: one of ``NEAREST_TYPES``.
        columns: ``(n_cols,)`` float32 column weights.
        variant: one of ``variants()``; empty for the best.

    Returns:
        The blocks, and ``sum columns (x - q)^2`` of every row, ``(n_rows,)`` float64.

    Raises:
        ValueError: arrays of sizes that do not match.

    """
    blocks, errors = _empty(rows, type_name)
    x, weights = (np.ascontiguousarray(a, dtype=np.float32) for a in (rows, columns))
    _nearest_rows(x, weights, type_name, *_arrays(blocks), errors, variant)
    return blocks, errors


def _empty(rows: Float32, type_name: str) -> tuple[Blocks, Float64]:
    """Return blocks to be filled, and errors of 0."""
    format = FORMATS[type_name]
    n_rows, n_cols = rows.shape
    n_blocks = n_cols // format.block
    codes = np.empty((n_rows, n_blocks, format.n_sub, format.sub), dtype=np.uint8)
    s, m = (np.empty((n_rows, n_blocks, format.n_sub), dtype=np.int16) for _ in range(2))
    d, dmin = (np.empty((n_rows, n_blocks), dtype=np.float32) for _ in range(2))
    return Blocks(codes, s, m, d, dmin), np.zeros(n_rows)


def _arrays(blocks: Blocks) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    return blocks.codes, blocks.s, blocks.m, blocks.d, blocks.dmin


def variants() -> list[str]:
    """Return the names of the instruction sets that this processor runs the loop with, best first."""
    return _variants()
