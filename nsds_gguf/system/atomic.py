"""Files that appear under their name only when they are complete: written to a hidden folder, synced and renamed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError, VerifyError
from .store import file_name, sync
from .workfolder import WorkFolder, output_error


@contextmanager
def unfinished(
    path: Path, files: WorkFolder | None = None, keep_failed: bool = False, resumable: bool = False
) -> Iterator[Path]:
    """Give a hidden path on the file system of ``path``, renamed to it on success and removed on any failure.

    Args:
        path: what the file will be called.
        files: the work folder beside it; ``None`` for one of its own.
        keep_failed: leave what was written as ``path`` + ``.failed`` when an ordinary error ends the block.
        resumable: the path is that of a ``PartFile`` among the records of ``files``, and stays after a failure.

    Raises:
        OutputError: the file cannot be given its name, or another run is writing it.

    """
    if files is None:
        with WorkFolder(path.parent, [path.name]) as own, unfinished(path, own, keep_failed) as temporary:
            yield temporary
        return
    temporary = files.records / f"{file_name(path.name)}.part" if resumable else files.path / path.name
    try:
        yield temporary
        _publish(temporary, path)
    except Exception as error:
        if resumable and isinstance(error, VerifyError) and not keep_failed:
            temporary.unlink(missing_ok=True)  # it is complete, and wrong
        if keep_failed and temporary.exists():
            _publish(temporary, path.with_name(path.name + ".failed"))
        raise
    finally:
        if not resumable:
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    try:
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error) from error


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return  # Windows cannot open folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def small_file(path: Path) -> Iterator[Path]:
    """Give a path to write a small file to, which gets its name when it is complete; pipes and devices get it at once.

    Raises ``OutputError`` when it cannot be written.
    """
    target = Path(os.path.realpath(path))  # a link stays, what it leads to is replaced
    try:
        if target.exists() and not target.is_file():
            yield target
            return
        with unfinished(target) as temporary:
            yield temporary
            if target.exists():
                shutil.copymode(target, temporary)
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror}") from error


def write_small(path: Path, text: str) -> None:
    """Write a small UTF-8 file as ``small_file`` does, line ends as they are in the text."""
    with small_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
