"""What dead runs left in a folder: removed, except for records of the last days and for what may be somebody else's."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .folder_lock import (
    LOCK,
    NO_LOCKS,
    PREFIX,
    RECORDS,
    REMOVED,
    empty,
    holds_records,
    is_at,
    is_of_this_machine,
    is_own_folder,
    n_bytes_below,
    open_lock,
    read_owner,
    remove,
    size_text,
    try_lock,
)

DAYS_KEPT = 7  # records of another output, since they last changed


@dataclass(frozen=True)
class Kept:
    """The folder of an interrupted run, the output that goes on from it, and what it takes on disk."""

    path: Path
    output: str
    n_bytes: int


@dataclass
class Leftovers:
    """What dead runs had left in a folder: what was removed, left alone and kept."""

    n_bytes: int = 0
    n_runs: int = 0
    left_alone: list[str] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What the user must know of files that were removed or left alone, one sentence each."""
        if not self.n_runs:
            return self.left_alone
        runs = "an interrupted run" if self.n_runs == 1 else f"{self.n_runs} interrupted runs"
        return [*self.left_alone, f"Removed {size_text(self.n_bytes)} of temporary files left by {runs}."]

    def kept_notes(self, own: Collection[Path]) -> list[str]:
        """Return one sentence about the folders that are kept, besides a run's own; none where there are none."""
        others = [found for found in self.kept if found.path not in own]
        if not others:
            return []
        size, names = size_text(sum(found.n_bytes for found in others)), ", ".join(found.output for found in others)
        return [f"Kept {size} of finished work for interrupted runs to {names}, up to {DAYS_KEPT} days; if you do not "
                f"want to run them again, remove {', '.join(str(found.path) for found in others)}."]  # fmt: skip


def remove_stale(folder: Path) -> Leftovers:
    """Remove what dead runs left in a folder, except for records of the last days.

    Folders of live runs are passed over; those that may be somebody else's are left alone and named.
    """
    left = Leftovers()
    with suppress(OSError):  # a folder that cannot be listed has nothing that could be removed
        for path in sorted(folder.glob(PREFIX + "*")):
            reason = _clear_dead(path, left)
            if reason:
                left.left_alone.append(f"{path}: left alone: {reason}.")
    return left


def _clear_dead(path: Path, left: Leftovers) -> str:
    """Remove a dead run's folder, or all but its records, and count that; return why one is left alone."""
    if not is_own_folder(path):
        return "no folder of this user"
    try:
        lock = open_lock(path)
    except FileNotFoundError:  # a run is just making it, or has just ended; or not ours
        with suppress(OSError):
            path.rmdir()
        return "it holds no lock of ours" if path.exists() else ""
    except OSError as error:
        return str(error.strerror)
    is_removed = False
    try:
        if not try_lock(lock) or not is_at(lock, path / LOCK):
            return ""
        record = read_owner(path / LOCK)
        if record is None and any(entry.name != LOCK for entry in path.iterdir()):
            return "it holds no lock of ours"
        if record is not None and not is_of_this_machine(record):
            size = size_text(n_bytes_below(path))
            return f"a run on {record['host']} made it; if none is going on there, remove it ({size})"
        is_removed = _clear_locked(path, record, left)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return "its file system has no locks; if no run is going on, remove it"
        return str(error.strerror)
    finally:
        os.close(lock)
        if sys.platform == "win32" and is_removed:  # where the open lock could not go
            shutil.rmtree(path, ignore_errors=True)
    return ""


def _clear_locked(path: Path, record: dict[str, Any] | None, left: Leftovers) -> bool:
    """Remove a folder whose lock this process holds, or all but its records where somebody may go on from them.

    Returns whether it was removed whole.
    """
    n_bytes, keep = n_bytes_below(path), record is not None and _is_worth_keeping(path)
    if not keep or record is None:
        remove(path)
    else:
        n_kept = n_bytes_below(path / RECORDS)
        n_bytes -= n_kept
        left.kept.append(Kept(path, str(record.get("output")), n_kept))
        empty(path, (LOCK, RECORDS))
    left.n_bytes += n_bytes
    left.n_runs += n_bytes > 0 or not keep
    return not keep


def _is_worth_keeping(path: Path) -> bool:
    """Tell whether a dead run's folder holds records that changed in the last days."""
    if path.name.startswith(REMOVED) or not holds_records(path):
        return False
    changed = max(entry.lstat().st_mtime for entry in (path / RECORDS).iterdir())
    return time.time() - changed < DAYS_KEPT * 24 * 3600
