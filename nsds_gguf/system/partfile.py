"""A large file that is written piece by piece, and goes on behind its last complete piece after an interruption.

Beside the file lies a journal: a sealed line for the key, then one for each complete piece with its name, where it ends
and its CRC-32. A piece's line is written after its bytes. Nothing is synced before ``finish``: the death of the process
loses nothing that was written, and after a power loss the checksums tell which pieces reached the disk.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from .store import seal, sync, unseal
from .workfolder import output_error

FORMAT = "nsds-gguf part file 1"
JOURNAL = ".journal"  # suffix

_CHUNK_BYTES = 1 << 20

Buffer = bytes | bytearray | memoryview


class PartFile:
    """An unfinished file and its journal.

    Attributes:
        path: where the file lies; the journal is beside it.
        names: the complete pieces, in order.
        n_bytes: bytes of the complete pieces.

    """

    def __init__(
        self,
        path: Path,
        key: str,
        say: Callable[[str], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Open the file behind the last piece that is complete and whole; what follows it is cut off.

        Args:
            path: where it lies, or will.
            key: what its bytes depend on; a file of another key is written anew.
            say: told when pieces must be written again, other than one that was never complete.
            progress: called while pieces are checked, with bytes done and bytes in all.

        Raises:
            OutputError: the file or the journal cannot be written.

        """
        self.path, self.names, self.n_bytes = path, list[str](), 0
        self._key, self._journal_path, self._crc32 = key, path.with_name(path.name + JOURNAL), 0
        self._files: list[IO[bytes]] = []
        try:
            n_journal, problem = self._resume(progress or _no_progress)
            self._data = self._opened(path, self.n_bytes)
            self._journal = self._opened(self._journal_path, n_journal)
            if not n_journal:
                self._append(self._journal, seal({"format": FORMAT, "key": key}))
        except OSError as error:
            self.close()
            raise output_error(path, error) from error
        if problem and say is not None:
            say(problem)

    def write(self, data: Buffer) -> None:
        """Append bytes to the current piece; closes and raises ``OutputError`` when the disk is full."""
        self._append(self._data, data)
        self._crc32 = zlib.crc32(data, self._crc32)

    def complete(self, name: str) -> None:
        """End the current piece; closes and raises ``OutputError`` when that cannot be recorded."""
        end = self._data.tell()
        self._append(self._journal, seal({"name": name, "end": end, "crc32": self._crc32}))
        self.names.append(name)
        self.n_bytes, self._crc32 = end, 0

    def finish(self) -> None:
        """Write everything to the disk and close; raises ``OutputError`` when that fails."""
        try:
            sync(self._data.fileno())
        except OSError as error:
            raise output_error(self.path, error) from error
        finally:
            self.close()

    def close(self) -> None:
        """Close, and leave what is there to the next run."""
        while self._files:
            self._files.pop().close()

    def __enter__(self) -> PartFile:
        """Return itself."""
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _resume(self, progress: Callable[[int, int], None]) -> tuple[int, str]:
        """Take over complete pieces; return the bytes of the journal that hold, and what is wrong with the rest."""
        lines = self._journal_path.read_bytes().splitlines(keepends=True) if self._journal_path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):  # the process died while it wrote that
            lines.pop()
        if not lines:
            return 0, ""
        try:
            head = unseal(lines[0])
            is_own = head["format"] == FORMAT and head["key"] == self._key
        except (ValueError, KeyError, TypeError):
            return 0, "Recomputed: the record of finished tensors is damaged."
        if not is_own:
            return 0, "Recomputed: the record of finished tensors is of another model or other options."
        n_journal = len(lines[0])
        with self.path.open("rb", buffering=0) if len(lines) > 1 and self.path.exists() else _nothing() as data:
            total = os.fstat(data.fileno()).st_size
            for line in lines[1:]:
                piece = _checked(line, data, self.n_bytes)
                if piece is None:
                    return n_journal, f"Recomputed: finished tensors are damaged, from number {len(self.names) + 1} on."
                self.names.append(piece["name"])
                self.n_bytes, n_journal = piece["end"], n_journal + len(line)
                progress(self.n_bytes, total)
        return n_journal, ""

    def _opened(self, path: Path, n_bytes: int) -> IO[bytes]:
        """Open a file for writing behind its first bytes and cut off the rest."""
        stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b", 0)
        self._files.append(stream)
        stream.truncate(n_bytes)
        stream.seek(n_bytes)
        return stream

    def _append(self, stream: IO[bytes], data: Buffer) -> None:
        left = memoryview(data).cast("B")
        try:
            while left:
                left = left[stream.write(left) :]
        except OSError as error:
            self.close()
            raise output_error(self.path, error) from error


class PlainFile:
    """A file that is written in one go, with the calls of ``PartFile``: without a journal."""

    def __init__(self, path: Path) -> None:
        """Create the file; raises ``OutputError`` when that cannot be."""
        self.path, self.names = path, list[str]()
        try:
            self._data = path.open("wb")
        except OSError as error:
            raise output_error(path, error) from error

    def write(self, data: Buffer) -> None:
        """Append bytes; raises ``OutputError`` when the disk is full."""
        try:
            self._data.write(data)
        except OSError as error:
            raise output_error(self.path, error) from error

    def complete(self, name: str) -> None:
        """End a piece."""
        self.names.append(name)

    def finish(self) -> None:
        """Write everything to the disk and close; raises ``OutputError`` when that fails."""
        try:
            self._data.flush()
            sync(self._data.fileno())
            self._data.close()
        except OSError as error:
            raise output_error(self.path, error) from error

    def __enter__(self) -> PlainFile:
        """Return itself."""
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Close; what cannot be written any more was told already."""
        with suppress(OSError):
            self._data.close()


def _checked(line: bytes, data: IO[bytes], start: int) -> dict[str, Any] | None:
    """Return a piece that the journal names when its bytes, from ``start``, are whole; ``None`` otherwise."""
    try:
        piece = unseal(line)
        left, crc32 = piece["end"] - start, 0
        while left > 0 and (chunk := data.read(min(left, _CHUNK_BYTES))):
            left, crc32 = left - len(chunk), zlib.crc32(chunk, crc32)
        is_whole = left == 0 and crc32 == piece["crc32"] and isinstance(piece["name"], str)
    except (ValueError, KeyError, TypeError, OSError):
        return None
    return piece if is_whole else None


def _nothing() -> IO[bytes]:
    return open(os.devnull, "rb", buffering=0)  # noqa: PTH123  devnull is a name and no path


def _no_progress(_done: int, _total: int) -> None:
    pass
