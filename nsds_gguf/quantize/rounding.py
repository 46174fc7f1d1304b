"""Rounding to block formats with less error than ggml's quantizers leave, in the same bytes.

``feedback`` lets later columns make good what earlier ones do wrong; it needs the second moment of the matrix's input,
and starts from the scales that ggml finds. ``formats`` knows the bytes. Without a second moment nothing is gained here:
scales that fit better than ggml's in weighted error were not better in divergence (docs/log.md, 2026-11-25).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..errors import GgmlError
from ..llamacpp import ggml
from ..records import Float32
from .formats import FORMATS
from .gptq import Feedback, make_feedback, round_with_feedback
from .hessian_factors import Feedbacks

__all__ = ["COVERED_TYPES", "ROW_TILE", "Feedback", "Feedbacks", "make_feedback", "quantize"]

COVERED_TYPES = tuple(FORMATS)

# Rows are rounded in tiles: rows ``k * ROW_TILE`` and following of a matrix, with zeros in place of what is not asked
# for. The last bits of a matrix product depend on its shape and on where in it a row stands, so both are fixed.
ROW_TILE = 256


def quantize(
    rows: Float32,
    type_name: str,
    feedback: Feedback,
    *,
    first_row: int = 0,
    n_descents: int = 1,
) -> NDArray[np.uint8]:
    """Quantize rows to the same format as ``ggml.quantize``, with less error of what the matrix puts out.

    A row becomes the same bytes however its matrix is cut into slabs and whatever threads work on slabs, with one and
    the same BLAS on one thread: callers set that. Slabs that begin at multiples of ``ROW_TILE`` and hold whole tiles
    waste nothing. In memory, beside the result: five float32 copies of a tile.

    Args:
        rows: ``(n_rows, n_cols)`` float32, finite.
        type_name: one of ``COVERED_TYPES``.
        feedback: of the matrix's input.
        first_row: number of the first row in its matrix.
        n_descents: passes of descent over the scales and codes of each block.

    Returns:
        ``(n_rows, row_bytes)`` uint8.

    Raises:
        GgmlError: the type or the row length is not covered, or the feedback has other columns.

    """
    if type_name not in FORMATS:
        raise GgmlError(f"cannot round to {type_name}; wanted one of {', '.join(COVERED_TYPES)}")
    n_rows, n_cols = rows.shape
    if len(feedback.importance) != n_cols:
        raise GgmlError(f"feedback: wanted {n_cols} columns, got {len(feedback.importance)}")
    out = np.empty((n_rows, ggml.row_bytes(type_name, n_cols)), dtype=np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):  # scales beyond float16 become infinite, as ggml's do
        for start, stop, place in _tiles(n_rows, first_row):
            tile = np.zeros((ROW_TILE, n_cols), dtype=np.float32)
            within = slice(place, place + stop - start)
            tile[within] = rows[start:stop]
            blocks = round_with_feedback(tile, type_name, feedback, n_descents)
            out[start:stop] = FORMATS[type_name].pack(blocks)[within]
    return out


def _tiles(n_rows: int, first_row: int) -> Iterator[tuple[int, int, int]]:
    """Yield where the rows of each tile start and stop, and the place of the first in the tile."""
    start = 0
    while start < n_rows:
        place = (first_row + start) % ROW_TILE
        stop = min(n_rows, start + ROW_TILE - place)
        yield start, stop, place
        start = stop
