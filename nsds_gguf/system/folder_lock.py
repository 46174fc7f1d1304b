"""The lock of a work folder: who holds it, whether they are alive, and what may be removed under it.

Layout of a work folder: ``lock``, which is locked and says who made the folder (JSON, one line); ``records``, finished
work that a later run can use; and whatever else a run puts beside them, which is temporary.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import secrets
import shutil
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import OutputError

PREFIX = ".nsds-gguf-"
REMOVED = PREFIX + "removed-"  # and a random name: its removal has begun
LOCK = "lock"
RECORDS = "records"
RECORD_SUFFIXES = (".record", ".journal")  # a record is complete when a file of such a name is there
FORMAT = "nsds-gguf work folder 1"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

_FAR = 1 << 30  # Windows locks bytes, which nobody else can read then: one behind the record

if sys.platform == "win32":
    import msvcrt

    def try_lock(descriptor: int) -> bool:
        """Lock an open file for this process, unless another has; raises ``OSError`` where there are no locks."""
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

else:
    import fcntl

    def try_lock(descriptor: int) -> bool:
        """Lock an open file for this process, unless another has; raises ``OSError`` where there are no locks."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def sign(lock: int, path: Path, name: str) -> None:
    """Say in the lock who made the folder, after checking that nobody else did."""
    found = read_owner(path / LOCK)
    others = any(entry.name != LOCK for entry in path.iterdir())
    if others and not (found and is_of_this_machine(found)):
        where = (
            f"files of a run on {found['host']}, which may still be going on" if found else "no temporary files of ours"
        )
        raise OutputError(f"{path}: is in the way: it holds {where}; move it away or choose another name")
    record = {"format": FORMAT, "output": name, "pid": os.getpid(), **_machine()}
    line = json.dumps(record).encode() + b"\n"
    os.lseek(lock, 0, os.SEEK_SET)
    os.write(lock, line)  # over the old line, which a full disk leaves whole
    os.ftruncate(lock, len(line))


def _machine() -> dict[str, str]:
    """Return what tells this machine from another: its name, and on Linux the boot of its kernel."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return {"host": platform.node(), "boot": boot}


def is_of_this_machine(record: dict[str, Any]) -> bool:
    """Tell whether a record was made here: locks of other machines may not be seen on shared file systems.

    A container has a name of its own but the kernel of its host; a machine that was started again keeps its name.
    """
    here = _machine()
    return bool(record["host"] == here["host"] or (here["boot"] and record["boot"] == here["boot"]))


def read_owner(file: Path) -> dict[str, Any] | None:
    """Return what a lock says, ``None`` when it is not one of ours."""
    try:
        record = json.loads(file.read_bytes().partition(b"\n")[0])
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(record, dict) and record.get("format") == FORMAT and {"host", "boot", "pid"} <= record.keys()
    return record if is_ours else None


def is_own_folder(path: Path) -> bool:
    """Tell whether a path is a folder, and no link to one, of the user who runs this."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return True  # gone in between: it will be made again
    return stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid())


def open_lock(path: Path, flags: int = 0) -> int:
    """Open the lock of a work folder; raises ``OSError``, for a link too."""
    return os.open(path / LOCK, os.O_RDWR | flags | getattr(os, "O_NOFOLLOW", 0), 0o600)


def is_at(descriptor: int, file: Path) -> bool:
    """Tell whether an open file is still the one that its path names: it may have been removed and made anew."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def holds_records(path: Path) -> bool:
    """Tell whether a work folder holds at least one complete record."""
    try:
        return any(entry.name.endswith(RECORD_SUFFIXES) for entry in (path / RECORDS).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False


def n_bytes_below(path: Path) -> int:
    """Return the bytes of the files below a folder, without locks."""
    n_bytes = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            n_bytes += 0 if file.is_dir() or file.name == LOCK else file.lstat().st_size
    return n_bytes


def remove(path: Path) -> None:
    """Remove a folder whose lock this process holds: out of the way first, the lock last, so that it stays known."""
    with suppress(OSError):  # Windows does not rename folders with open files
        path = path.rename(path.with_name(REMOVED + secrets.token_hex(8)))
    empty(path, (LOCK,))
    if sys.platform != "win32":  # which keeps open files; whoever closes the lock removes it there
        (path / LOCK).unlink(missing_ok=True)
        path.rmdir()


def empty(path: Path, but: Sequence[str]) -> None:
    """Remove what is in a folder, but for some names."""
    for entry in list(path.iterdir()):
        if entry.name in but:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def size_text(n_bytes: int) -> str:
    """Return bytes for people."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
