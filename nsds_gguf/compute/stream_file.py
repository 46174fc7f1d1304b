"""The residual stream between layers, in an unnamed temporary file that disappears with the process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from ..records import Float32
from ..system.resources import check_disk
from ..system.workfolder import output_error


class Streams(Protocol):
    """The streams of all batches between layers: before the layer of an index, or after the last one."""

    def write(self, index: int, batch: int, values: Float32) -> None:
        """Write a stream; raises ``OutputError`` when the disk is full."""

    def read(self, index: int, batch: int = 0) -> Float32:
        """Return a stream; those of the first batch stay, for a backward pass."""

    def drop(self, index: int) -> None:
        """Drop the streams of all batches but the first."""


class FileStreams:
    """``Streams`` in a file: the first batch has a slot for every layer, the others one each."""

    def __init__(self, file: StreamFile, n_layers: int) -> None:
        """Take a file with ``n_layers + n_batches`` slots."""
        self._file, self._n_layers = file, n_layers

    def write(self, index: int, batch: int, values: Float32) -> None:
        """See ``Streams``."""
        self._file.write(self._slot(index, batch), values)

    def read(self, index: int, batch: int = 0) -> Float32:
        """See ``Streams``."""
        return self._file.read(self._slot(index, batch))

    def drop(self, index: int) -> None:
        """Do nothing: the next streams take their slots."""

    def _slot(self, index: int, batch: int) -> int:
        return index if batch == 0 else self._n_layers + batch


class StreamFile:
    """Float32 arrays of at most ``slot_bytes`` each, by slot number; a slot can be overwritten."""

    def __init__(self, stream: IO[bytes], folder: Path, slot_bytes: int) -> None:
        """Take an unbuffered file: a full disk raises on writing, not on closing."""
        self._stream, self._folder, self._slot_bytes = stream, folder, slot_bytes
        self._shapes: dict[int, tuple[int, ...]] = {}

    def write(self, slot: int, values: Float32) -> None:
        """Write an array; raises ``OutputError`` when the disk is full."""
        if values.nbytes > self._slot_bytes:
            raise ValueError(f"wanted at most {self._slot_bytes} bytes a slot, got {values.nbytes}")
        self._shapes[slot] = values.shape
        data = np.ascontiguousarray(values).data.cast("B")
        try:
            self._stream.seek(slot * self._slot_bytes)
            while data:
                data = data[self._stream.write(data) :]
        except OSError as error:
            raise output_error(self._folder / "layers", error) from error

    def read(self, slot: int) -> Float32:
        """Return the array last written to a slot."""
        values = np.empty(self._shapes[slot], dtype=np.float32)
        view, at = values.data.cast("B"), 0
        self._stream.seek(slot * self._slot_bytes)
        while at < len(view):
            at += self._stream.readinto(view[at:])  # type: ignore[attr-defined]
        return values


@contextmanager
def stream_file(folder: Path | None, n_slots: int, slot_bytes: int) -> Iterator[StreamFile]:
    """Open an empty file in a folder (default: the system's temporary folder).

    Raises ``OutputError`` when it cannot be created or the disk has no room for ``n_slots``.
    """
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    check_disk(folder, n_slots * slot_bytes, "the residual stream of every layer")
    try:
        stream = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  closed below
    except OSError as error:
        raise output_error(folder / "layers", error) from error
    with stream:
        yield StreamFile(stream, folder, slot_bytes)
