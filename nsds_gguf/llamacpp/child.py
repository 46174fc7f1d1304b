"""The process that runs llama.cpp: it carries out one call after another until its parent goes.

llama.cpp ends the process on what it did not expect, and may hang or take more memory than there is. Here that costs a
call and not the program. A second thread watches the pipe, so that the process ends with its parent even in the middle
of a call; a third ends it when llama.cpp shows no sign of life.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any, BinaryIO

from ..errors import NsdsError
from .messages import receive, send

HANG_EXIT = 70  # of a process that found itself hanging (EX_SOFTWARE of sysexits.h)

_TICK_SECONDS = 0.5


def main(hang_seconds: float) -> None:
    """Serve the parent on the standard streams; ``hang_seconds`` without a sign of life end the process."""
    requests, replies = _take_streams()
    _ignore_terminal()
    server = _Server(replies, hang_seconds)
    calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read_calls, args=(requests, calls), daemon=True).start()
    threading.Thread(target=server.watch, daemon=True).start()
    while True:
        server.answer(*calls.get())


def _take_streams() -> tuple[BinaryIO, BinaryIO]:
    """Return the pipes to the parent. What llama.cpp prints to standard output goes to standard error from here on."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return requests, replies


def _ignore_terminal() -> None:
    """Leave Ctrl-C and a closing terminal to the parent; no core file stays behind, no dialog waits for a click."""
    for name in ("SIGINT", "SIGHUP", "SIGBREAK"):
        with suppress(AttributeError, ValueError):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "win32":
        import msvcrt

        msvcrt.SetErrorMode(msvcrt.SEM_FAILCRITICALERRORS | msvcrt.SEM_NOGPFAULTERRORBOX)
    else:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _read_calls(requests: BinaryIO, calls: queue.SimpleQueue[Any]) -> None:
    """Queue what the parent asks; end the process at once when the parent has gone."""
    with suppress(EOFError, OSError):
        while True:
            calls.put(receive(requests))
    os._exit(0)


class _Server:
    """Answers calls with methods of ``binding.Engine``, and watches over the one in progress."""

    def __init__(self, replies: BinaryIO, hang_seconds: float) -> None:
        self._replies, self._hang_seconds = replies, hang_seconds
        self._lock = threading.Lock()  # of the pipe
        self._engine: Any = None
        self._is_busy = False

    def answer(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Carry out a call and send what it returns or raises."""
        self._is_busy = True
        reply = self._call(method, arguments)
        self._is_busy = False
        self._send(reply)

    def _call(self, method: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
        try:
            if self._engine is None:
                from .binding import Engine

                self._engine = Engine()
            return "result", getattr(self._engine, method)(*arguments)
        except (NsdsError, MemoryError) as error:
            return "error", error
        except Exception:  # a bug: the parent raises it with this traceback, and the process serves further calls
            return "bug", traceback.format_exc()

    def watch(self) -> None:
        """Tell the parent twice a second that a call is in progress; end the process when nothing moves."""
        seen, since = -1, time.monotonic()
        while True:
            time.sleep(_TICK_SECONDS)
            signs = self._engine.signs_of_life if self._engine is not None else 0
            if not self._is_busy or signs != seen:
                seen, since = signs, time.monotonic()
            elif time.monotonic() - since > self._hang_seconds:
                os._exit(HANG_EXIT)
            if self._is_busy:
                self._send(("busy", None))

    def _send(self, reply: tuple[str, Any]) -> None:
        with self._lock, suppress(OSError):  # the parent has gone: the other thread ends the process
            send(self._replies, reply)
