"""What this machine has: disk and memory, asked before work starts rather than found out in the middle, and threads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import threadpoolctl

from ..errors import OutputError
from .cgroups import memory_left_bytes

# Width of the residual stream from which a matrix product is worth more than one BLAS thread. Below it, threads that
# spin for one another on a busy machine cost far more than they save: 33 s against 1.4 s at d 256 (docs/log.md).
THREADED_WIDTH = 1024

_GIB = 2**30
_NVIDIA_SECONDS = 20  # a driver that sleeps takes seconds to answer


def available_memory_bytes() -> int:
    """Return the memory that this process can still take: what the machine has free, or less where a limit is set."""
    found = (int(psutil.virtual_memory().available), memory_left_bytes(), _address_space_left())
    return min(n_bytes for n_bytes in found if n_bytes is not None)


def free_nvidia_bytes() -> int | None:
    """Return the free memory of the NVIDIA GPU that has most of it, ``None`` where ``nvidia-smi`` has no answer."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_NVIDIA_SECONDS)
        return max(int(line) for line in done.stdout.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _address_space_left() -> int | None:
    """Return what a limit on the address space (``ulimit -v``) leaves, ``None`` without one.

    Where that runs out, BLAS hangs or ends the process without an error that Python could see. Linux alone holds
    processes to it.
    """
    if sys.platform != "linux":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else max(0, limit - int(psutil.Process().memory_info().vms))


def check_disk(folder: Path, n_bytes: int, what: str) -> None:
    """Raise ``OutputError`` when ``folder`` has less than ``n_bytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise OutputError(
            f"{folder}: {what} takes {n_bytes / _GIB:.2f} GiB, the disk has {free / _GIB:.2f} GiB free: "
            "make room or choose another folder"
        )


def lacks_memory(n_bytes: int) -> str:
    """Return what is wanted and what there is when less than ``n_bytes`` of memory are available, or nothing."""
    available = available_memory_bytes()
    if available >= n_bytes:
        return ""
    return f"{n_bytes / _GIB:.2f} GiB of memory, {available / _GIB:.2f} GiB are available"


def check_memory(n_bytes: int, what: str, remedy: str) -> None:
    """Raise ``OutputError`` when less than ``n_bytes`` of memory are available."""
    lacking = lacks_memory(n_bytes)
    if lacking:
        raise OutputError(f"{what} takes {lacking}: {remedy}")


def blas_threads(n_threads: int) -> AbstractContextManager[object]:
    """Limit the threads of every BLAS in the process to ``n_threads`` while the context is open."""
    limits: AbstractContextManager[object] = threadpoolctl.threadpool_limits(n_threads, user_api="blas")
    return limits


def n_blas_threads() -> int:
    """Return the threads that the BLAS of this process may use now."""
    return max((int(pool["num_threads"]) for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"),
               default=1)  # fmt: skip
