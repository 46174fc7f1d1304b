"""The memory that Linux control groups leave a process: containers and batch systems limit it by them.

Files: Linux kernel, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class _Files(NamedTuple):
    """Where a version of control groups states a limit, what counts against it, and the part that is page cache."""

    mount: str
    limit: str
    usage: str
    cache: tuple[str, ...]


_VERSION_1 = _Files("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                    ("total_inactive_file", "total_active_file"))  # fmt: skip
_VERSION_2 = _Files("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file"))


def memory_left_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes that the tightest control group above this process leaves it; ``None`` without a limit.

    Page cache counts as free: the kernel drops it before it refuses memory.

    Args:
        root: the folder that holds ``proc`` and ``sys``.

    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux, or no /proc
        return None
    return min((left for line in lines for left in _left_of(root, line)), default=None)


def _left_of(root: Path, line: str) -> Iterator[int]:
    """Yield what is left in the group of a line ``ID:CONTROLLERS:PATH`` and in every group above it."""
    _, controllers, path = line.split(":", 2)
    if controllers not in ("", "memory"):
        return
    files = _VERSION_1 if controllers else _VERSION_2
    group = PurePosixPath(path.lstrip("/"))
    for relative in (group, *group.parents):
        with suppress(OSError, ValueError):  # a group that is not mounted here, or one without a limit ("max")
            yield _left_in(root / files.mount / relative, files)


def _left_in(folder: Path, files: _Files) -> int:
    """Return what one group leaves, at least 0; raises ``OSError`` or ``ValueError`` where it has no limit."""
    limit = int((folder / files.limit).read_text(encoding="ascii"))
    usage = int((folder / files.usage).read_text(encoding="ascii"))
    pairs = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    cache = sum(int(value) for name, value in pairs if name in files.cache)
    return max(0, limit - usage + cache)
