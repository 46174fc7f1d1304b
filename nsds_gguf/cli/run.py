"""Running a command: signals, errors and exit codes."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import signal
import sys
from collections.abc import Sequence

from ..errors import NsdsError, OutputError, notes_of
from ..llamacpp.llama import gpu_layers
from .options import check_destinations
from .parser import build_parser
from .screen import Screen, drop_output, standard_output
from .signals import SIGNAL_EXIT, Stopped, Watch, handled, message, restore_defaults

_MAX_MESSAGE = 2000  # characters of an error line: damaged files can hold names of any length

_BROKEN_PIPE = 13  # SIGPIPE, which Windows lacks
_NO_THREAD = "can't start new thread"  # Python's words
_REMEDY = "lower --threads or close other programs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; without arguments, those of the process, as its program."""
    is_program, watch = argv is None, None
    try:
        with handled(restore=not is_program):
            watch = Watch() if is_program else None
            return _run(sys.argv[1:] if argv is None else list(argv))
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        code = _fail(message(number, "; ".join(notes_of(stop))), SIGNAL_EXIT + number)
        if watch is not None:
            watch.has_told = True
        return code
    finally:
        if is_program:  # a signal during Python's exit must not print a traceback
            restore_defaults()


def _run(given: list[str]) -> int:
    """Run the command line; signals are the caller's."""
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # not every terminal encodes the lines of tables
        arguments = build_parser().parse_args(given, argparse.Namespace(given=given))
        logging.basicConfig(level=logging.ERROR)
        logging.getLogger("nsds_gguf").setLevel(logging.INFO if arguments.verbose else logging.ERROR)
        screen = Screen(quiet=arguments.quiet, json_to_stdout=arguments.json == "-", verbose=arguments.verbose)
        check_destinations(arguments)
        with gpu_layers(getattr(arguments, "gpu_layers", None) or 0):
            arguments.run(arguments, screen)
        with standard_output():  # a full disk or a closed pipe shows here, not at exit
            print(end="", flush=True)
    except NsdsError as error:
        return _fail("; ".join((str(error), *notes_of(error))), error.exit_code)
    except BrokenPipeError:  # the reader has closed it
        drop_output()
        return SIGNAL_EXIT + _BROKEN_PIPE
    except (MemoryError, OSError, RuntimeError) as error:
        line = _system_error(error)
        if line is None:
            raise
        return _fail("; ".join((line, *notes_of(error))), OutputError.exit_code)
    return 0


def _system_error(error: MemoryError | OSError | RuntimeError) -> str | None:
    """Return the message for an error of the system, ``None`` for a bug of the program."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return f"out of memory; {_REMEDY}"
    if isinstance(error, OSError):  # permissions, names too long, a failing disk
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror or str(error)
    return f"the system allows no more threads, or no memory for them; {_REMEDY}" if _NO_THREAD in str(error) else None


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)  # names from files may hold controls
    print(f"error: {line if len(line) <= _MAX_MESSAGE else line[:_MAX_MESSAGE] + '…'}", file=sys.stderr)
    return code
