"""Running a command: signals, errors and exit codes."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..errors import NsdsError, OutputError
from .options import check_destinations
from .parser import build_parser
from .screen import Screen

SIGNAL_EXIT = 128  # plus the number of the signal, as shells have it

_MAX_MESSAGE = 2000  # characters of an error line: damaged files can hold names of any length


class _Stopped(KeyboardInterrupt):
    """A signal asks the program to end; raised where Ctrl-C would be, so that temporary files go."""

    def __init__(self, number: int, _frame: object) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: object) -> NoReturn:
    raise _Stopped(number, frame)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    _handle_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # tables have lines and dashes that not every terminal knows
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = build_parser().parse_args(given, argparse.Namespace(given=given))
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.ERROR)
    screen = Screen(quiet=arguments.quiet, json_to_stdout=arguments.json == "-", verbose=arguments.verbose)
    try:
        check_destinations(arguments)
        arguments.run(arguments, screen)
        print(end="", flush=True)  # a full disk or a closed pipe shows here, not at exit
    except NsdsError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, _Stopped) else signal.SIGINT
        return _fail(f"stopped by {signal.Signals(number).name}; no unfinished file is left", SIGNAL_EXIT + number)
    except MemoryError:
        return _fail("out of memory; lower --threads or close other programs", OutputError.exit_code)
    except BrokenPipeError:  # whoever read our output has seen enough
        _drop_output()
        return SIGNAL_EXIT + signal.SIGPIPE
    except OSError as error:  # of the system, whatever it was about: permissions, names too long, a disk that fails
        if error.filename is None:
            _drop_output()
        return _fail(f"{error.filename or 'standard output'}: {error.strerror or error}", OutputError.exit_code)
    return 0


def _handle_signals() -> None:
    """End on what would kill the process without a chance to clean up; what is ignored (nohup) stays ignored."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _drop_output() -> None:
    """Send what is left in the buffer of standard output nowhere: Python would fail on it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)  # names from a file may drive the terminal
    print(f"error: {line if len(line) <= _MAX_MESSAGE else line[:_MAX_MESSAGE] + '…'}", file=sys.stderr)
    return code
