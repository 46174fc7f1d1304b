"""What this process and the one that runs llama.cpp say to one another, and the memory that they share.

A message is a pickle with its large buffers beside it, so that arrays cross the pipe without a copy::

    | bytes | what                                                        |
    | 8     | n, number of buffers, little-endian                         |
    | 8 n   | bytes of each                                               |
    |       | the buffers: the pickle first, then what it refers to       |

Pickles go between two processes of one program only; nothing from outside is ever unpickled.
"""

from __future__ import annotations

import mmap
import os
import pickle
import secrets
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

_COUNT = struct.Struct("<Q")


def send(stream: BinaryIO, message: Any) -> None:
    """Write a message and flush; raises ``OSError`` (``BrokenPipeError``) when nobody reads."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(data), *(buffer.raw() for buffer in buffers)]
    stream.write(struct.pack(f"<{1 + len(parts)}Q", len(parts), *(part.nbytes for part in parts)))
    for part in parts:
        stream.write(part)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """Read a message; raises ``EOFError`` when the other side has ended."""
    (n,) = _COUNT.unpack(_read(stream, _COUNT.size))
    sizes = struct.unpack(f"<{n}Q", _read(stream, n * _COUNT.size))
    data, *buffers = (_read(stream, size) for size in sizes)
    return pickle.loads(data, buffers=buffers)


def _read(stream: BinaryIO, n_bytes: int) -> bytearray:
    data = bytearray(n_bytes)
    view, done = memoryview(data), 0
    while done < n_bytes:
        n_read = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not n_read:
            raise EOFError("the other process has ended")
        done += n_read
    return data


class SharedBuffer:
    """Memory that both processes see, for logits. Pages take memory once they are written to.

    Attributes:
        path: what the other process opens: ``map_shared``.
        data: the mapped bytes.

    """

    def __init__(self, n_bytes: int) -> None:
        """Create and map ``n_bytes``; raises ``OSError`` when the system refuses.

        On Linux and Windows the memory belongs to no file system (containers give ``/dev/shm`` 64 MiB); elsewhere it
        is a temporary file.
        """
        self._fd: int | None = None
        self._file: Path | None = None
        if sys.platform == "win32":  # a file could not be removed while it is mapped
            name = f"nsds-gguf-logits-{secrets.token_hex(8)}"
            self.path = f"{name}:{max(n_bytes, 1)}"
            self.data = mmap.mmap(-1, max(n_bytes, 1), tagname=name)
            return
        if sys.platform == "linux" and Path("/proc/self/fd").is_dir():
            self._fd = os.memfd_create("nsds-gguf-logits")
            self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        else:
            self._fd, self.path = tempfile.mkstemp(prefix="nsds-gguf-logits-")
            self._file = Path(self.path)
        try:
            os.ftruncate(self._fd, max(n_bytes, 1))
            self.data = mmap.mmap(self._fd, max(n_bytes, 1))
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Give the memory back; arrays that look into it keep their part until they go."""
        if self._fd is not None:
            os.close(self._fd)
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def map_shared(path: str) -> mmap.mmap:
    """Map the buffer that the other process made."""
    if sys.platform == "win32":
        name, _, n_bytes = path.partition(":")
        return mmap.mmap(-1, int(n_bytes), tagname=name)
    with open(path, "r+b") as stream:  # noqa: PTH123 - /proc/N/fd/N is no path to a file with a name
        return mmap.mmap(stream.fileno(), 0)
