"""The exceptions that a user can act on, as one tree.

::

    NsdsError                 any expected failure; the command line prints it as one line
    ├── ModelError            the input model folder: missing, damaged or contradictory files
    │   ├── UnsupportedError  intact, but of an unsupported class, rope kind, tokenizer or layout
    │   └── TokenizerError    the tokenizer cannot be converted faithfully
    ├── RecordError           a scores or plan file that cannot be used (damaged, other model)
    ├── PlanError             options that contradict each other, or a target out of reach
    │   └── TargetError       the target is below the floor; carries the floor
    ├── OutputError           the output cannot be written (exists, no folder, disk full, no memory)
    ├── TextError             evaluation text missing or too short for the context
    ├── VerifyError           the finished file is not what the plan says, or does not work
    ├── GgmlError             the ggml / llama.cpp library is missing, too old or refuses
    └── ClusterError          the cluster cannot be reached, or one of its workers does not fit

A message says in one line what is wrong, in which file or tensor, what was wanted, what was found and what to do.
Input is never checked by ``assert``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NsdsError(Exception):
    """Any failure that a user can act on; ``exit_code`` is that of the command line."""

    exit_code = 1


class ModelError(NsdsError):
    """The input model is missing, damaged or contradicts itself."""

    exit_code = 3


class UnsupportedError(ModelError):
    """The input is intact but of a kind that this program does not convert."""


class TokenizerError(ModelError):
    """The tokenizer cannot be converted faithfully."""


class RecordError(NsdsError):
    """A scores or plan file is damaged or belongs to another model."""

    exit_code = 4


class PlanError(NsdsError):
    """The options for a plan contradict each other."""

    exit_code = 4


class TargetError(PlanError):
    """The target is below what the types can reach."""


class OutputError(NsdsError):
    """The output cannot be written."""

    exit_code = 5


class TextError(NsdsError):
    """The evaluation text is missing or too short."""

    exit_code = 6


class VerifyError(NsdsError):
    """The finished file is not what the plan says or does not work."""

    exit_code = 7


class GgmlError(NsdsError):
    """The ggml or llama.cpp library is missing, too old or refuses."""

    exit_code = 8


class ClusterError(NsdsError):
    """The cluster cannot be reached, lost its workers, or one of its workers does not fit this run."""

    exit_code = 9


@contextmanager
def told_of(path: Path, temporary: Path) -> Iterator[None]:
    """Name ``path``, which the user knows, instead of a temporary file in the errors of a ``with`` block."""
    try:
        yield
    except NsdsError as error:
        if str(temporary) not in str(error):
            raise
        raise type(error)(str(error).replace(str(temporary), str(path))) from error


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an exception, like ``BaseException.add_note`` of Python 3.11."""
    error.__dict__.setdefault("__notes__", []).append(note)


def notes_of(error: BaseException) -> list[str]:
    """Return the notes of an exception."""
    return list(getattr(error, "__notes__", ()))
