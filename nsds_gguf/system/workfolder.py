"""The hidden folder that holds a run's temporary files, locked for as long as the run lives.

It lies beside the file that the run writes and is called ``.nsds-gguf-`` and a digest of that file's name, so that two
runs that write one file meet there, and the second is refused. The system drops the lock with the process, however
that ends: a folder whose lock can be taken is a dead run's, and the next run in the same place removes it.

Layout: ``lock``, which is locked and says who made the folder (JSON), and whatever the run puts beside it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from ..errors import NsdsError, OutputError

PREFIX = ".nsds-gguf-"
LOCK = "lock"
FORMAT = "nsds-gguf work folder 1"

_TRIES, _PAUSE_S = 20, 0.05  # a lock may be held for a moment by a run that looks whether its owner is dead
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FAR = 1 << 30  # Windows locks bytes, which nobody else can read then: one behind the record

if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        """Lock an open file for this process, unless another has; raises ``OSError`` where there are no locks."""
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        """Lock an open file for this process, unless another has; raises ``OSError`` where there are no locks."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class WorkFolder:
    """The temporary files of one run: made and locked when first needed, removed when the ``with`` block ends.

    Attributes:
        folder: where it lies.
        outputs: names of the files that the run writes there; no other run may write them meanwhile.

    """

    def __init__(self, folder: Path, outputs: Sequence[str] = (), say: Callable[[str], None] | None = None) -> None:
        """Take the folder and the names; ``say`` hears what dead runs left, which is removed; ``None``: it is not."""
        self.folder, self.outputs, self._say = folder, tuple(outputs), say
        self._claims: list[_Claim] = []

    @property
    def path(self) -> Path:
        """The folder for temporary files; raises ``OutputError`` when it cannot be made."""
        self.open()
        return self._claims[0].path

    @property
    def is_open(self) -> bool:
        """Whether the folder is there already."""
        return bool(self._claims)

    def open(self) -> None:
        """Remove what dead runs left and make the folder.

        Raises ``OutputError`` when another run writes one of the outputs, or nothing can be written there.
        """
        if self._claims:
            return
        try:
            if self._say is not None:
                for note in remove_stale(self.folder):
                    self._say(note)
            for name in self.outputs or (secrets.token_hex(8),):
                self._claims.append(_claim(self.folder, name))
        except OSError as error:
            self.close()
            wanted = self.folder / self.outputs[0] if self.outputs else self.folder
            if error.errno in _FULL:
                raise output_error(wanted, error) from error
            raise OutputError(
                f"{wanted}: cannot be written: {error.strerror}; choose another name or folder"
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the folder with all that is in it."""
        while self._claims:
            self._claims.pop().release()

    def __enter__(self) -> WorkFolder:
        """Return itself."""
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Close; where somebody else removed the folder, an error says that instead of what followed from it."""
        is_gone = self.is_open and not self._claims[0].path.is_dir()
        self.close()
        if is_gone and isinstance(error, NsdsError | OSError):
            what = "the temporary files" if self.folder.is_dir() else "it"
            raise OutputError(f"{self.folder}: {what} disappeared while the run wrote there: run again") from error


def release_all() -> bool:
    """Remove the work folders of this process, from whatever thread; return whether nothing is left of them."""
    with _guard:
        claims = list(_held)
    for claim in claims:
        claim.release()
    return not any(claim.path.exists() for claim in claims)


def remove_stale(folder: Path) -> list[str]:
    """Remove work folders of dead runs from a folder, and return what the user must know, one sentence each.

    Folders of live runs are passed over; those that may be somebody else's are left alone and named.
    """
    n_bytes = n_removed = 0
    notes: list[str] = []
    with suppress(OSError):  # a folder that cannot be listed has nothing that could be removed
        for path in sorted(folder.glob(PREFIX + "*")):
            found = _removed_bytes(path)
            if isinstance(found, str):
                notes.append(f"{path}: left alone: {found}.")
            elif found is not None:
                n_bytes, n_removed = n_bytes + found, n_removed + 1
    if n_removed:
        runs = "an interrupted run" if n_removed == 1 else f"{n_removed} interrupted runs"
        notes.append(f"Removed {size_text(n_bytes)} of temporary files left by {runs}.")
    return notes


def size_text(n_bytes: int) -> str:
    """Return bytes for people."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


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

    def release(self) -> None:
        """Remove the folder, then let go of the lock; what cannot be removed is for the next run."""
        with _guard:
            if self not in _held:
                return
            _held.remove(self)
        with suppress(OSError):
            _remove(self.path)
        if self._lock is not None:
            _unlock(self._lock, self.path, is_done=True)


_held: set[_Claim] = set()  # by this process
_guard = Lock()  # of the set


def _claim(folder: Path, name: str) -> _Claim:
    """Make and lock the work folder of an output; raises ``OutputError`` when another run has it."""
    path = folder / (PREFIX + hashlib.sha256(os.fsencode(os.path.normcase(name))).hexdigest()[:16])
    for _ in range(_TRIES):
        path.mkdir(mode=0o700, exist_ok=True)
        if not _is_own_folder(path):
            raise OutputError(f"{path}: is in the way of temporary files and not of this user; move it away")
        try:
            lock = _open_lock(path, os.O_CREAT)
        except FileNotFoundError:  # removed by another run between the two
            continue
        try:
            if _try_lock(lock) and _is_at(lock, path / LOCK):
                _sign(lock, path, name)
                return _Claim(path, lock)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                os.close(lock)
                return _unlocked(path)
            _Claim(path, lock).release()  # locked, but there is no room for the record
            raise
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        time.sleep(_PAUSE_S)
    owner = _read_record(path / LOCK)
    who = f"another run (process {owner['pid']} on {owner['host']})" if owner else "another run"
    raise OutputError(f"{folder / name}: {who} is writing it; wait for that run, or choose another name")


def _unlocked(path: Path) -> _Claim:
    """Return a folder that no other run takes for its own, where locks cannot tell runs apart."""
    own = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=path.parent))
    (own / LOCK).touch()
    with suppress(OSError):  # another run may be doing the same
        _remove(path)
    return _Claim(own, None)


def _sign(lock: int, path: Path, name: str) -> None:
    """Say in the lock who made the folder, after checking that nobody else did."""
    found = _read_record(path / LOCK)
    others = any(entry.name != LOCK for entry in path.iterdir())
    if others and not (found and _is_of_this_machine(found)):
        where = f"of a run on {found['host']}, which may still be going on" if found else "no temporary files of ours"
        raise OutputError(f"{path}: is in the way: it holds {where}; move it away or choose another name")
    record = {"format": FORMAT, "output": name, "pid": os.getpid(), **_machine()}
    os.ftruncate(lock, 0)
    os.lseek(lock, 0, os.SEEK_SET)
    os.write(lock, json.dumps(record).encode())


def _machine() -> dict[str, str]:
    """Return what tells this machine from another: its name, and on Linux the boot of its kernel."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return {"host": platform.node(), "boot": boot}


def _is_of_this_machine(record: dict[str, Any]) -> bool:
    """Tell whether a record was made here: locks of other machines may not be seen on shared file systems.

    A container has a name of its own but the kernel of its host; a machine that was started again keeps its name.
    """
    here = _machine()
    return bool(record["host"] == here["host"] or (here["boot"] and record["boot"] == here["boot"]))


def _read_record(file: Path) -> dict[str, Any] | None:
    """Return what a lock says, ``None`` when it is not one of ours."""
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(record, dict) and record.get("format") == FORMAT and {"host", "boot", "pid"} <= record.keys()
    return record if is_ours else None


def _is_own_folder(path: Path) -> bool:
    """Tell whether a path is a folder, and no link to one, of the user who runs this."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return True  # gone in between: it will be made again
    return stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid())


def _open_lock(path: Path, flags: int = 0) -> int:
    return os.open(path / LOCK, os.O_RDWR | flags | getattr(os, "O_NOFOLLOW", 0), 0o600)


def _is_at(descriptor: int, file: Path) -> bool:
    """Tell whether an open file is still the one that its path names: it may have been removed and made anew."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _removed_bytes(path: Path) -> int | str | None:
    """Remove a dead run's folder and return its bytes; ``None`` for a live one, a reason for one that is left."""
    if not _is_own_folder(path):
        return "no folder of this user"
    try:
        lock = _open_lock(path)
    except FileNotFoundError:  # a run is just making it, or has just ended; or not ours
        with suppress(OSError):
            path.rmdir()
        return "it holds no lock of ours" if path.exists() else None
    except OSError as error:
        return str(error.strerror)
    is_done = False
    try:
        if not _try_lock(lock) or not _is_at(lock, path / LOCK):
            return None
        n_bytes = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir() and file.name != LOCK)
        record = _read_record(path / LOCK)
        if record is None and any(entry.name != LOCK for entry in path.iterdir()):
            return "it holds no lock of ours"
        if record is not None and not _is_of_this_machine(record):
            return f"a run on {record['host']} made it; if none is going on there, remove it ({size_text(n_bytes)})"
        _remove(path)
        is_done = True
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return "its file system has no locks; if no run is going on, remove it"
        return str(error.strerror)
    finally:
        _unlock(lock, path, is_done)
    return n_bytes


def _unlock(lock: int, path: Path, is_done: bool) -> None:
    """Let go of a lock; on Windows, which keeps open files, remove it now with its folder when that is to go."""
    os.close(lock)
    if sys.platform == "win32" and is_done:
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a folder whose lock this process holds: out of the way first, the lock last, so that it stays known."""
    with suppress(OSError):  # Windows does not rename folders with open files
        path = path.rename(path.with_name(f"{PREFIX}removed-{secrets.token_hex(8)}"))
    for entry in list(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()
    if sys.platform != "win32":
        (path / LOCK).unlink(missing_ok=True)
        path.rmdir()
