"""What every layer reads, kept in a temporary file without a name: it is gone when the process is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from ..records import Float32
from ..system.resources import check_disk
from ..system.workfolder import output_error


class LayerFile:
    """Arrays of one shape, one after another, in a file of a folder."""

    def __init__(self, stream: IO[bytes], folder: Path) -> None:
        """Take an unbuffered file: what a full disk refuses is told at once, and not once more when it is closed."""
        self._stream, self._folder = stream, folder

    def append(self, values: Float32) -> None:
        """Write an array; raises ``OutputError`` when the disk is full."""
        data = np.ascontiguousarray(values).data.cast("B")
        try:
            while data:
                data = data[self._stream.write(data) :]
        except OSError as error:
            raise output_error(self._folder / "layers", error) from error

    def read(self, index: int, like: Float32) -> Float32:
        """Return an array, counted from 0, of the shape and dtype of another."""
        values = np.empty_like(like)
        view, at = values.data.cast("B"), 0
        self._stream.seek(index * values.nbytes)
        while at < len(view):
            at += self._stream.readinto(view[at:])  # type: ignore[attr-defined]
        return values


@contextmanager
def layer_file(folder: Path | None, n_bytes: int) -> Iterator[LayerFile]:
    """Give an empty file in a folder, or that of the system for temporary files, that ``n_bytes`` are to go to.

    Raises ``OutputError`` when it cannot be made or has no room.
    """
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    check_disk(folder, n_bytes, "what layers read")
    try:
        stream = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  closed below
    except OSError as error:
        raise output_error(folder / "layers", error) from error
    with stream:
        yield LayerFile(stream, folder)
