"""How a signal ends the program: in an orderly way where Python can, and always within a second.

Python runs a handler in the main thread, between two of its steps. During a long call of a library, a thread that the
system wakes removes the temporary files and ends the process instead.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from ..system.workfolder import release_all

SIGNAL_EXIT = 128  # plus the number of the signal, as shells have it

# Those that would kill the process without a chance to clean up; SIGBREAK is Windows' SIGHUP, and its Ctrl-Break.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
_PATIENCE_S = 0.7  # before the orderly end is given up


class Stopped(KeyboardInterrupt):
    """A signal asks the program to end; raised like Ctrl-C, so that temporary files are removed."""

    def __init__(self, number: int) -> None:
        """Take the number of the signal."""
        super().__init__(number)
        self.number = number


def message(number: int, left: str = "") -> str:
    """Return the message for a signal that ended the program; ``left`` names what remains on disk."""
    return f"stopped by {signal.Signals(number).name}; {left or 'no unfinished file is left'}"


@contextmanager
def handled(restore: bool = True) -> Iterator[None]:
    """Raise ``Stopped`` for the first signal that asks to end and ignore later ones; ignored signals stay ignored.

    With ``restore`` the earlier handlers are back when the block ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopped: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        if not stopped:  # a second Ctrl-C must not interrupt the cleanup
            stopped.append(number)
            raise Stopped(number)

    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    hook = sys.unraisablehook
    sys.unraisablehook = _without_stops(hook)
    try:
        yield
    except Exception as error:
        if stopped:  # an interrupted import raises an error of its own
            raise Stopped(stopped[0]) from error
        raise
    finally:
        if restore:
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler)


def restore_defaults() -> None:
    """Restore the system's default handlers: nothing is left to clean up."""
    for name in _NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _without_stops(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """Return a hook that ignores a signal raised in a C callback: the watch ends the process."""
    return lambda unraisable: None if isinstance(unraisable.exc_value, Stopped) else hook(unraisable)


class Watch:
    """Ends the process when the handler has not done so in time; for the program itself, not for library use."""

    def __init__(self) -> None:
        """Let the system write signal numbers to a socket, and wait for them in a thread."""
        self.has_told = False
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        with suppress(RuntimeError):  # no memory for a thread: what comes next will say so
            threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def _wait(self) -> None:
        numbers = {int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name)}
        while True:
            number = self._reading.recv(1)[0]
            if number in numbers and signal.getsignal(number) is not signal.SIG_IGN:
                break
        threading.Event().wait(_PATIENCE_S)
        self._end(number)

    def _end(self, number: int) -> NoReturn:
        left = release_all()
        if not self.has_told:
            with suppress(OSError):  # standard error may be closed
                os.write(2, f"\nerror: {message(number, left)}\n".encode())
        os._exit(SIGNAL_EXIT + number)
