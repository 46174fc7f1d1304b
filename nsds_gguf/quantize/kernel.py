"""The compiled rounding loop (``native/``): calls it with arrays, and makes blocks of what it returns."""

from __future__ import annotations

import numpy as np

from ..records import Float32, Float64
from ._rounding import round_rows as _round_rows
from ._rounding import variants as _variants
from .formats import FORMATS, Blocks
from .hessian_factors import HessianFactors


def round_rows(
    rows: Float32, type_name: str, factors: HessianFactors, n_descents: int, variant: str = ""
) -> tuple[Blocks, Float64]:
    """Round rows by GPTQ; see ``gptq`` for the method.

    Each row's result depends on no other row. Releases the GIL; uses one thread. In memory, beside the result: a
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
    format = FORMATS[type_name]
    n_rows, n_cols = rows.shape
    if len(factors.order) != n_cols:
        raise ValueError(f"wanted factors of {n_cols} columns, got {len(factors.order)}")
    n_blocks = n_cols // format.block
    codes = np.empty((n_rows, n_blocks, format.n_sub, format.sub), dtype=np.uint8)
    s, m = (np.empty((n_rows, n_blocks, format.n_sub), dtype=np.int16) for _ in range(2))
    d, dmin = (np.empty((n_rows, n_blocks), dtype=np.float32) for _ in range(2))
    errors, ordered = np.zeros(n_rows), np.take(rows, factors.order, axis=1)
    x, upper, variances = (
        np.ascontiguousarray(each, dtype=np.float32) for each in (ordered, factors.upper, factors.variances)
    )
    _round_rows(x, upper, variances, type_name, n_descents, codes, s, m, d, dmin, errors, variant)
    return Blocks(codes, s, m, d, dmin).reordered(factors.order), errors


def variants() -> list[str]:
    """Return the names of the instruction sets that this processor runs the loop with, best first."""
    return _variants()
