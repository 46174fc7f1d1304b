"""The command line: arguments in, tables and exit codes out. The only package that prints.

Results go to standard output, progress and notes to standard error; with ``--json -`` standard output holds JSON alone.
"""

from .parser import EXIT_CODES, build_parser
from .run import main

__all__ = ["EXIT_CODES", "build_parser", "main"]
