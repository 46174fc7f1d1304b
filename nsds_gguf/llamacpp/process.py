"""The process that runs llama.cpp, seen from here: one for the whole program, started when first needed.

It is killed when a call is interrupted (Ctrl-C waits for nothing) and started again when it is needed again. When it
dies of its own accord, the call raises ``GgmlError`` with the last words of llama.cpp.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import IO, Any, BinaryIO, cast

from ..errors import GgmlError
from .child import HANG_EXIT
from .messages import receive, send

# A process that shows no sign of life for so long is taken to hang: many times what one operation of a graph takes on
# a slow machine.
HANG_SECONDS = 300

_STARTER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from nsds_gguf.llamacpp.child import main; main(float(sys.argv[2]))"
)
_KEPT_LINES = 200  # of what the process prints
_CLOSE_SECONDS = 5
_MAX_EXIT_CODE = 255  # that a program ends with of its own accord

# Lines of standard error that say why a process ends, rather than what it was doing (ggml.c, ggml_abort; libstdc++).
_REASON = re.compile(r"GGML_ASSERT|GGML_ABORT|fatal error|insufficient memory|what\(\):|error", re.IGNORECASE)
_SOURCE_FOLDER = re.compile(r"\S*/(?=[\w.-]+:\d+:)")  # of the machine that llama.cpp was built on

_log = logging.getLogger("nsds_gguf.llamacpp")


def _waiting() -> dict[str, str]:
    """Return how ggml's threads wait for one another: they spin, but not for long; empty where the user has said it.

    Spinning without end costs up to three times the CPU time on a busy machine, not spinning a tenth of the wall time
    on an idle one (docs/log.md).
    """
    stated = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    return {} if stated else {"GOMP_SPINCOUNT": "30000"}


class LlamaProcess:
    """One process that runs llama.cpp. Calls come from any thread, one at a time."""

    def __init__(self) -> None:
        """Start it; raises ``GgmlError`` when the system refuses."""
        paths = json.dumps([path for path in sys.path if path])
        command = [sys.executable, "-I", "-c", _STARTER, paths, str(HANG_SECONDS)]
        environment = {**_waiting(), **os.environ, "GGML_NO_BACKTRACE": "1"}  # gdb can hang for ever beside threads
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
                cwd=os.sep,  # paths are absolute, and no folder of the user's is kept open
            )  # fmt: skip
        except OSError as error:
            raise GgmlError(f"llama.cpp cannot be started in a process of its own: {error.strerror}") from error
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._drain = threading.Thread(target=self._read_lines, args=(self._process.stderr,), daemon=True)
        self._drain.start()
        self._lock = threading.Lock()
        self.owner = os.getpid()

    @property
    def is_alive(self) -> bool:
        """Return whether calls can be made."""
        return self._process.poll() is None and self.owner == os.getpid()

    @property
    def pid(self) -> int:
        """Return the system's number of the process."""
        return self._process.pid

    def call(self, what: str, method: str, *arguments: Any) -> Any:
        """Call a method of ``binding.Engine`` in the process and return its result.

        Args:
            what: the file, or what else the call is about, for the message when llama.cpp dies of it.
            method: its name.
            arguments: its arguments, which are pickled.

        Raises:
            GgmlError: llama.cpp aborted, crashed, hangs, or was killed.
            Exception: what the method raised; whatever interrupts the call kills the process.

        """
        with self._lock:
            self._lines.clear()
            try:
                send(cast(BinaryIO, self._process.stdin), (method, arguments))
                kind, value = self._reply()
            except (EOFError, OSError) as error:
                raise GgmlError(f"{what}: {self._cause_of_death()}") from error
            except BaseException:
                self.kill()
                raise
        if kind == "error":
            raise value
        if kind == "bug":
            raise RuntimeError(f"{what}: in the process that runs llama.cpp:\n{value}")
        return value

    def _reply(self) -> tuple[str, Any]:
        while True:
            kind, value = receive(cast(BinaryIO, self._process.stdout))
            if kind != "busy":
                return kind, value

    def kill(self) -> None:
        """End the process now, whatever it does."""
        with suppress(OSError):
            self._process.kill()
        self._process.wait()
        self._close_pipes()

    def close(self) -> None:
        """End the process; it may finish what it does if that is soon."""
        if self.owner != os.getpid():
            return
        with suppress(OSError):
            cast(BinaryIO, self._process.stdin).close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close_pipes()

    def _close_pipes(self) -> None:
        self._drain.join(_CLOSE_SECONDS)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with suppress(OSError):
                cast(IO[bytes], stream).close()

    def _read_lines(self, stream: BinaryIO) -> None:
        with suppress(ValueError, OSError):
            for data in stream:
                line = data.decode(errors="replace").rstrip()
                self._lines.append(line)
                _log.info("%s", line)

    def _cause_of_death(self) -> str:
        """Return why the process ended, with the last words of llama.cpp."""
        code = self._process.wait()
        self._close_pipes()
        words = self._last_words()
        said = f": {words}" if words else ""
        if code == HANG_EXIT:
            return f"llama.cpp hangs: no progress for {HANG_SECONDS:g} seconds{said}"
        if code < 0 and -code == signal.SIGABRT:
            return f"llama.cpp aborted{said or ' without a word'}"
        if code < 0 and signal.Signals(-code).name == "SIGKILL":
            return (f"the process that ran llama.cpp was killed, most likely because memory ran out{said}; close other "
                    "programs, or convert on a machine with more memory")  # fmt: skip
        if code < 0:
            return f"llama.cpp crashed ({signal.Signals(-code).name}){said}"
        if code > _MAX_EXIT_CODE:  # Windows: an NTSTATUS, 0xC0000005 for an access violation
            return f"llama.cpp crashed (0x{code:08X}){said}"
        return f"the process that ran llama.cpp ended with exit code {code}{said}"

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._lines if line.strip()]
        reasons = [line for line in lines if _REASON.search(line)]
        return _SOURCE_FOLDER.sub("", (reasons or lines[-1:] or [""])[0])


_process: LlamaProcess | None = None


def llama_process() -> LlamaProcess:
    """Return the process, started unless it runs already."""
    global _process
    if _process is None or not _process.is_alive:
        _process = LlamaProcess()
    return _process


@atexit.register
def end_process() -> None:
    """End the process if there is one; the next call starts another."""
    global _process
    if _process is not None:
        _process.close()
        _process = None
