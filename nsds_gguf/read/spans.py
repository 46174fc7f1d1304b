"""Bytes of weight files, read and not mapped: a mapped file that shrinks kills whoever touches what is no longer there.

Files are opened anew for every read, so that a model of many shards holds no descriptors and threads share none.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError


def read_spans(file: Path, name: str, spans: Iterable[tuple[int, int]], n_bytes: int) -> NDArray[np.uint8]:
    """Return stretches of a file one after another, as a fresh ``(n_bytes,)`` uint8 array.

    Args:
        file: the file.
        name: the tensor that it is about, for messages.
        spans: offset and bytes of every stretch.
        n_bytes: of all stretches.

    Raises:
        ModelError: the file cannot be read, or ends before.

    """
    data = np.empty(n_bytes, np.uint8)
    view, at = data.data, 0
    try:
        with file.open("rb", buffering=0) as stream:
            for offset, n in spans:
                stream.seek(offset)
                end = at + n
                while at < end:  # the system reads 2 GiB at a time at most
                    n_read = stream.readinto(view[at:end])
                    if not n_read:
                        raise ModelError(
                            f"{file}: tensor {name} can no longer be read: the file ends before byte {offset + n}, "
                            "it was cut short meanwhile: run again when it is complete"
                        )
                    at += n_read
    except OSError as error:
        raise ModelError(f"{file}: tensor {name} can no longer be read: {error.strerror}") from error
    return data


def row_runs(rows: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Return runs of neighbours, as first row and their number, of sorted row numbers without duplicates."""
    if not len(rows):
        return []
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    counts = np.diff(starts, append=len(rows))
    return list(zip(rows[starts].tolist(), counts.tolist(), strict=True))
