"""The command line: arguments in, tables and exit codes out. The only package that prints.

Results go to standard output, progress and notes to standard error; with ``--json -`` standard output holds only JSON.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["EXIT_CODES", "build_parser", "main"]

_LEAST_MIB = 400  # with less, importing OpenBLAS retries forever or ends the process
_INTERRUPTED, _NO_MEMORY = 130, 5  # as in run and errors, which cannot be imported here


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; without arguments, those of the process, as its program."""
    limit = _address_space_mib()
    if limit is not None and limit < _LEAST_MIB:
        print(
            f"error: out of memory before the program could start: it needs {_LEAST_MIB} MiB of address space, the "
            f"limit is {limit} MiB; raise it (ulimit -v)",
            file=sys.stderr,
        )
        return _NO_MEMORY
    try:
        from .run import main as run
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            print("error: stopped by SIGINT; no unfinished file is left", file=sys.stderr)
            return _INTERRUPTED
        if not _is_lack_of_memory(error):
            raise
        print("error: out of memory before the program could start; close other programs", file=sys.stderr)
        return _NO_MEMORY
    return run(argv)


def _address_space_mib() -> int | None:
    """Return the limit of the address space; ``None`` without one, and on macOS, which does not enforce it."""
    if sys.platform in ("win32", "darwin"):
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit >> 20


def _is_lack_of_memory(error: BaseException) -> bool:
    """Return whether an import ran out of memory, by the words of Python or the loader of shared libraries."""
    words = (os.strerror(errno.ENOMEM), "failed to map segment", "cannot map zero-fill", "cannot create TLS")
    return isinstance(error, MemoryError) or any(text in str(error) for text in words)


def __getattr__(name: str) -> Any:
    """Import the parser on demand: it needs the whole package."""
    if name in ("EXIT_CODES", "build_parser"):
        from . import parser

        return getattr(parser, name)
    raise AttributeError(name)
