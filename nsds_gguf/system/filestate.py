"""Whether input files are what they were when they were opened: weights are read again and again until the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError, NsdsError


@dataclass(frozen=True)
class FileState:
    """Size and time of the last change of a file."""

    path: Path
    n_bytes: int
    mtime_ns: int

    def change(self) -> str:
        """Return what happened to the file since, empty when nothing did."""
        try:
            found = self.path.stat()
        except OSError as error:
            return f"can no longer be read: {error.strerror}"
        if found.st_size != self.n_bytes:
            return f"changed while it was read: it had {self.n_bytes} bytes, it has {found.st_size}"
        return "" if found.st_mtime_ns == self.mtime_ns else "was written again while it was read"


def file_states(paths: Iterable[Path]) -> tuple[FileState, ...]:
    """Return the states of files, each once, in order; raises ``OSError`` when one is not there."""
    states = []
    for path in dict.fromkeys(paths):
        found = path.stat()
        states.append(FileState(path, found.st_size, found.st_mtime_ns))
    return tuple(states)


def check_unchanged(states: Sequence[FileState]) -> None:
    """Raise ``ModelError`` when a file has changed: what was made of it is of two models."""
    for state in states:
        change = state.change()
        if change:
            raise ModelError(f"{state.path}: {change}; run again when the model is complete")


@contextmanager
def unchanged(states: Sequence[FileState]) -> Iterator[None]:
    """Check that files do not change during a block; an error of the block that a change explains becomes that."""
    try:
        yield
    except NsdsError as error:
        try:
            check_unchanged(states)
        except ModelError as change:
            raise change from error
        raise
    check_unchanged(states)
