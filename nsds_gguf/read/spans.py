"""Read bytes of weight files without mapping them: accessing a mapped file that has shrunk kills the process.

Every read opens the file again, so that a model of many shards holds no file descriptors and threads share none.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError


def read_spans(file: Path, name: str, spans: Iterable[tuple[int, int]], n_bytes: int) -> NDArray[np.uint8]:
    """Read spans of a file into one fresh ``(n_bytes,)`` uint8 array.

    Args:
        file: the file.
        name: tensor name, for messages.
        spans: offset and size of every span.
        n_bytes: total size of all spans.

    Raises:
        ModelError: the file cannot be read, or is too short.

    """
    data = np.empty(n_bytes, np.uint8)
    view, at = data.data, 0
    try:
        with file.open("rb", buffering=0) as stream:
            for offset, n in spans:
                stream.seek(offset)
                end = at + n
                while at < end:  # one system call reads at most 2 GiB
                    n_read = stream.readinto(view[at:end])
                    if not n_read:
                        raise ModelError(
                            f"{file}: tensor {name} can no longer be read: the file ends before byte {offset + n}, "
                            "it was truncated after it was opened: run again when it is complete"
                        )
                    at += n_read
    except OSError as error:
        raise ModelError(f"{file}: tensor {name} can no longer be read: {error.strerror}") from error
    return data


def row_runs(rows: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Group sorted distinct row numbers into runs of consecutive rows: first row and length."""
    if not len(rows):
        return []
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    counts = np.diff(starts, append=len(rows))
    return list(zip(rows[starts].tolist(), counts.tolist(), strict=True))
