"""The hidden folder that holds a run's records and temporary files, locked for as long as the run lives.

It lies beside the file that the run writes and is called ``.nsds-gguf-`` and a digest of that file's name, so that two
runs that write one file meet there, and the second is refused. The system drops the lock with the process, however
that ends: a folder whose lock can be taken is a dead run's. The next run to the same file takes over its records; the
next run to another file in the same place removes it, unless it holds records of the last days.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import TracebackType

from ..errors import ClusterError, GgmlError, NsdsError, OutputError, add_note
from .folder_lock import (
    LOCK,
    NO_LOCKS,
    PREFIX,
    RECORDS,
    empty,
    holds_records,
    is_at,
    is_own_folder,
    n_bytes_below,
    open_lock,
    read_owner,
    remove,
    sign,
    size_text,
    try_lock,
)
from .leftovers import Leftovers, remove_stale

_TRIES, _PAUSE_S = 20, 0.05  # a lock may be held for a moment by a run that looks whether its owner is dead
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WorkFolder:
    """The files of one run beside its output: made and locked when first needed, removed when the ``with`` block ends.

    Records outlive the death of the process and a block that an exception ends, but for errors that would recur.

    Attributes:
        folder: where it lies.
        outputs: names of the files that the run writes there; no other run may write them meanwhile.

    """

    def __init__(
        self,
        folder: Path,
        outputs: Sequence[str] = (),
        say: Callable[[str], None] | None = None,
        resume: bool | None = None,
    ) -> None:
        """Take the folder and the names of the outputs.

        Args:
            folder: the folder of the outputs.
            outputs: their names; a run without any keeps no records.
            say: told what was found of earlier runs; ``None`` leaves what dead runs to other outputs left.
            resume: ``True`` takes over the records of an interrupted run to the first output, ``False`` removes them;
                both leave their own when interrupted. ``None``: this run has no records, and leaves those it finds.

        """
        self.folder, self.outputs, self._say, self._resume = folder, tuple(outputs), say, resume
        self._claims: list[_Claim] = []

    @property
    def path(self) -> Path:
        """The folder for temporary files; raises ``OutputError`` when it cannot be made."""
        self.open()
        return self._claims[0].path

    @property
    def records(self) -> Path:
        """The folder for records; raises ``OutputError`` when it cannot be made, ``ValueError`` in a run without."""
        if not self.has_records:
            raise ValueError("a run that neither resumes nor starts anew has no records")
        path = self.path / RECORDS
        try:
            if not path.is_dir():
                path.mkdir()
                self._claims[0].sync()
        except OSError as error:
            raise output_error(path, error) from error
        return path

    @property
    def has_records(self) -> bool:
        """Whether this run keeps records."""
        return self._resume is not None and bool(self.outputs)

    @property
    def is_open(self) -> bool:
        """Whether the folder is there already."""
        return bool(self._claims)

    def open(self) -> None:
        """Make the folder, or take over that of an interrupted run, and remove what other dead runs left.

        Raises ``OutputError`` when another run writes one of the outputs, or nothing can be written there.
        """
        if self._claims:
            return
        try:
            left = remove_stale(self.folder) if self._say is not None else Leftovers()
            for name in self.outputs or (secrets.token_hex(8),):
                self._claims.append(_claim(self.folder, name))
                self._claims[-1].clear(with_records=self._resume is False)
            self._tell(left)
        except OSError as error:
            self._release(keep=True)
            wanted = self.folder / self.outputs[0] if self.outputs else self.folder
            if error.errno in _FULL:
                raise output_error(wanted, error) from error
            raise OutputError(
                f"{wanted}: cannot be written: {error.strerror}; choose another name or folder"
            ) from error
        except BaseException:
            self._release(keep=True)
            raise

    def _tell(self, left: Leftovers) -> None:
        if self._say is None:
            return
        for note in (*left.notes, *left.kept_notes([claim.path for claim in self._claims])):
            self._say(note)
        path = self._claims[0].path
        if self._resume and holds_records(path):
            self._say(f"Going on from {size_text(n_bytes_below(path))} of finished work that an interrupted run left.")

    def close(self) -> None:
        """Remove the folder with all that is in it: the run has succeeded."""
        self._release(keep=self._resume is None)

    def _release(self, keep: bool) -> None:
        while self._claims:
            self._claims.pop().release(keep)

    def __enter__(self) -> WorkFolder:
        """Return itself."""
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Close, or after an exception keep the records and note that on it.

        Where somebody else removed the folder, an error says that instead of what followed from it.
        """
        is_gone = self.is_open and not self._claims[0].path.is_dir()
        if error is None or _would_recur(error):
            self.close()
        else:
            note = _kept_note(self._claims) if self._resume is not None else ""
            self._release(keep=True)
            if note:
                add_note(error, note)
        if is_gone and isinstance(error, NsdsError | OSError):
            what = "the temporary files" if self.folder.is_dir() else "it"
            raise OutputError(f"{self.folder}: {what} disappeared while the run wrote there: run again") from error


def release_all() -> str:
    """Release the work folders of this process, from whatever thread, keeping records; return what the user must know.

    That is empty when nothing is left of them.
    """
    with _guard:
        claims = list(_held)
    note = _kept_note(claims)
    for claim in claims:
        claim.release(keep=True)
    is_clean = not any(claim.path.exists() and not holds_records(claim.path) for claim in claims)
    return note if is_clean else "temporary files are left, which the next run removes"


def _would_recur(error: BaseException | None) -> bool:
    """Tell whether the same command would end the same way: neither stopped nor short of disk, memory or a process."""
    if not isinstance(error, NsdsError) or isinstance(error, OutputError | GgmlError | ClusterError):
        return False
    while error is not None and not isinstance(error, OSError):  # the system could not read the model just now
        error = error.__cause__
    return error is None


def _kept_note(claims: Sequence[_Claim]) -> str:
    """Return what to say of the records that folders will keep; empty when there are none."""
    with suppress(OSError):  # somebody else removes them
        for claim in claims:
            if claim.is_locked and holds_records(claim.path):
                size = size_text(n_bytes_below(claim.path / RECORDS))
                return f"{size} of finished work is kept in {claim.path.name}: the same command goes on from there"
    return ""


def output_error(path: Path, error: OSError) -> OutputError:
    """Return what an error of the system means for a file that was to be written: a full disk, or something else."""
    folder = next((parent.parent for parent in path.parents if parent.name.startswith(PREFIX)), path.parent)
    if error.errno in _FULL:
        return OutputError(f"{folder}: disk full or file too large while writing: {os.strerror(error.errno)}")
    return OutputError(f"{folder}: cannot write: {error.strerror or error}")


class _Claim:
    """A work folder of this process and the lock on it; ``None`` where the file system has no locks."""

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path, self._lock = path, lock
        with _guard:
            _held.add(self)

    @property
    def is_locked(self) -> bool:
        """Whether a later run can tell that this one is dead."""
        return self._lock is not None

    def sync(self) -> None:
        """Write the lock's own record to the disk: after a power loss a folder without it is nobody's."""
        if self._lock is not None:
            os.fsync(self._lock)

    def clear(self, with_records: bool) -> None:
        """Remove what a dead run left in the folder."""
        empty(self.path, (LOCK,) if with_records else (LOCK, RECORDS))

    def release(self, keep: bool) -> None:
        """Remove the folder, then let go of the lock; what cannot be removed is for the next run.

        With ``keep`` a folder that holds records stays, with nothing else in it.
        """
        with _guard:
            if self not in _held:
                return
            _held.remove(self)
        with suppress(OSError):
            keep = keep and self.is_locked and holds_records(self.path)
            if keep:
                empty(self.path, (LOCK, RECORDS))
            else:
                remove(self.path)
        if self._lock is not None:
            os.close(self._lock)
            if sys.platform == "win32" and not keep:  # where the open lock could not go
                shutil.rmtree(self.path, ignore_errors=True)


_held: set[_Claim] = set()  # by this process
_guard = Lock()  # of the set


def _claim(folder: Path, name: str) -> _Claim:
    """Make and lock the work folder of an output; raises ``OutputError`` when another run has it."""
    path = folder / (PREFIX + hashlib.sha256(os.fsencode(os.path.normcase(name))).hexdigest()[:16])
    for _ in range(_TRIES):
        path.mkdir(mode=0o700, exist_ok=True)
        if not is_own_folder(path):
            raise OutputError(f"{path}: is in the way of temporary files and not of this user; move it away")
        try:
            lock = open_lock(path, os.O_CREAT)
        except FileNotFoundError:  # removed by another run between the two
            continue
        try:
            if try_lock(lock) and is_at(lock, path / LOCK):
                sign(lock, path, name)
                return _Claim(path, lock)
        except OSError as error:
            if error.errno in NO_LOCKS:
                os.close(lock)
                return _unlocked(path)
            _Claim(path, lock).release(keep=True)  # locked, but there is no room for the record
            raise
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        time.sleep(_PAUSE_S)
    owner = read_owner(path / LOCK)
    who = f"another run (process {owner['pid']} on {owner['host']})" if owner else "another run"
    raise OutputError(f"{folder / name}: {who} is writing it; wait for that run, or choose another name")


def _unlocked(path: Path) -> _Claim:
    """Return a folder that no other run takes for its own, where locks cannot tell runs apart."""
    own = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=path.parent))
    (own / LOCK).touch()
    with suppress(OSError):  # another run may be doing the same
        if not holds_records(path):
            remove(path)
    return _Claim(own, None)
