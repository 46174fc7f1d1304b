"""Run a command under a memory limit and watch how much anonymous memory it takes (Linux)."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_INTERVAL_S = 0.002


@dataclass(frozen=True)
class Probed:
    """How a command ended and the most anonymous memory it held: its own, not what the page cache maps of files."""

    returncode: int
    stderr: str
    peak_bytes: int
    n_samples: int


def run_probed(command: Sequence[str | Path], limit_bytes: int) -> Probed:
    """Run ``command`` with at most ``limit_bytes`` of private writable memory (RLIMIT_DATA), sampling what it uses.

    BLAS gets one thread: it reserves memory for each, whether used or not.
    """

    def set_limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))

    process = subprocess.Popen(
        command, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}, preexec_fn=set_limit,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    peak = n_samples = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        n_samples += 1
        time.sleep(_INTERVAL_S)
    assert process.stderr is not None
    with process.stderr as stream:
        return Probed(process.returncode, stream.read(), peak, n_samples)


def anonymous_bytes(pid: int | str = "self") -> int:
    """Return the resident anonymous memory of a process; 0 when it has just ended."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
