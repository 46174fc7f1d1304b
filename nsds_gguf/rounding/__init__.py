"""Rounding to block formats with less error than ggml's quantizers leave, in the same bytes.

Two ways, one on top of the other: ``search`` finds scales that fit better, with column importance or without;
``feedback`` lets later columns make good what earlier ones do wrong, and needs the second moment of the matrix's input.
``formats`` knows the bytes. ggml's own result is where both start, and what a row keeps where it is better.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import ggml
from ..errors import GgmlError
from ..records import Float32
from .feedback import Feedback, make_feedback, round_with_feedback
from .formats import FORMATS, Blocks
from .search import refine

__all__ = ["COVERED_TYPES", "ROW_TILE", "Feedback", "make_feedback", "quantize"]

COVERED_TYPES = tuple(FORMATS)

# Rows are rounded in tiles of this many, the last one filled up with zeros: matrix products then have the same shapes
# and the same sums however rows are cut into slabs. A multiple of it wastes nothing.
ROW_TILE = 256


def quantize(
    rows: Float32,
    type_name: str,
    importance: Float32 | None = None,
    feedback: Feedback | None = None,
    *,
    n_rounds: int = 2,
    n_descents: int = 1,
) -> NDArray[np.uint8]:
    """Quantize rows as ``ggml.quantize`` does, with less error.

    The same rows give the same bytes however they are cut into slabs, as long as BLAS runs on the same number of
    threads: callers hold it at one. In memory, beside the result: two float32 copies of a tile.

    Args:
        rows: ``(n_rows, n_cols)`` float32, finite.
        type_name: one of ``COVERED_TYPES``.
        importance: ``(n_cols,)`` float32, weight of each column's squared error, or ``None``; with feedback, which has
            its own, it is not needed.
        feedback: of the matrix's input, or ``None``.
        n_rounds: turns of the search for scales.
        n_descents: passes of coordinate descent over the codes; without feedback there is nothing to descend.

    Returns:
        ``(n_rows, row_bytes)`` uint8.

    Raises:
        GgmlError: the type or the row length is not covered, or the importance or the feedback has other columns.

    """
    if type_name not in FORMATS:
        raise GgmlError(f"cannot round to {type_name}; wanted one of {', '.join(COVERED_TYPES)}")
    n_rows, n_cols = rows.shape
    if feedback is not None:
        if feedback.importance.shape != (n_cols,):
            raise GgmlError(f"feedback: wanted {n_cols} columns, got {len(feedback.importance)}")
        importance = feedback.importance
    out = np.empty((n_rows, ggml.row_bytes(type_name, n_cols)), dtype=np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):  # scales beyond float16: ggml's rows are kept there
        for start in range(0, n_rows, ROW_TILE):
            tile = np.zeros((ROW_TILE, n_cols), dtype=np.float32)
            part = rows[start : start + ROW_TILE]
            tile[: len(part)] = part
            data = _quantized_tile(tile, type_name, importance, feedback, n_rounds, n_descents)
            out[start : start + ROW_TILE] = data[: len(part)]
    return out


def _quantized_tile(
    rows: Float32,
    type_name: str,
    importance: Float32 | None,
    feedback: Feedback | None,
    n_rounds: int,
    n_descents: int,
) -> NDArray[np.uint8]:
    format = FORMATS[type_name]
    plain = ggml.quantize(rows, type_name, importance)
    if feedback is None:
        return format.pack(refine(rows, importance, format.unpack(plain), format, n_rounds))

    def find_scales(targets: Float32, columns: slice) -> Blocks:
        weights = feedback.variances[columns]
        start = format.unpack(ggml.quantize(targets, type_name, weights))
        return refine(targets, weights, start, format, n_rounds) if n_rounds else start

    data = format.pack(round_with_feedback(rows, format, feedback, find_scales, n_descents))
    plain_errors, errors = (
        feedback.row_errors(ggml.dequantize(each, type_name, rows.shape[1]) - rows) for each in (plain, data)
    )
    return np.where((errors < plain_errors)[:, None], data, plain)
