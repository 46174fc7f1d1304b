"""What tests do to the workers of a cluster, in the workers: functions that a client runs there."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from nsds_gguf.system import cluster


def die_once(module: str, name: str, flag: Path) -> None:
    """Let the next task of a function kill its process, once in all processes: it takes the flag away."""
    home = importlib.import_module(module)
    function = getattr(home, name)

    def deadly(task: object) -> object:
        try:
            flag.unlink()
        except FileNotFoundError:
            return function(task)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    setattr(home, name, deadly)


def fail_twice(module: str, name: str, folder: Path) -> None:
    """Let two tasks of a function fail as they do when the system cannot read: each takes a flag from a folder."""
    home = importlib.import_module(module)
    function = getattr(home, name)

    def failing(task: object) -> object:
        for flag in folder.iterdir():
            flag.unlink()
            raise OSError(5, "Input/output error")
        return function(task)

    setattr(home, name, failing)


_real_stat = os.stat


def hide(path: Path, hidden: bool = True) -> None:
    """Hide a file or folder and all below from ``stat``, or show it again; forget what fitted."""

    def stat(asked: Any, *args: Any, **options: Any) -> os.stat_result:
        if isinstance(asked, str | Path) and str(asked).startswith(str(path)):
            raise FileNotFoundError(2, "No such file or directory", str(asked))
        return _real_stat(asked, *args, **options)

    os.stat = stat if hidden else _real_stat
    cluster._fits.clear()


def set_numpy(version: str) -> str:
    """Pretend to have another numpy; return the version before."""
    before, np.__version__ = np.__version__, version
    return before


def set_version(version: str) -> str:
    """Pretend to be another version of nsds-gguf; return the version before."""
    metrics = importlib.import_module("nsds_gguf.metrics")
    before, metrics.__version__ = metrics.__version__, version
    return str(before)


def no_package(needed: bytes) -> str:
    """Fail as a worker without nsds-gguf does."""
    raise ModuleNotFoundError("No module named 'nsds_gguf'")
