"""How a run goes about its work, and who is told: nothing here changes the bytes of an output."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from ..llamacpp import llama
from ..records import Progress, no_progress


class Reporter(Protocol):
    """Who is told what happens; the command line draws it."""

    def stage(self, name: str) -> AbstractContextManager[Progress]:
        """Open a stage and return where its progress goes."""
        ...

    def say(self, text: str) -> None:
        """Tell one fact."""
        ...


class Silent:
    """A reporter that tells nobody."""

    def stage(self, name: str) -> AbstractContextManager[Progress]:
        """Return a progress that is ignored."""
        return nullcontext(no_progress)

    def say(self, text: str) -> None:
        """Ignore the fact."""


@dataclass(frozen=True)
class Run:
    """How a run goes about its work.

    Attributes:
        n_threads: CPU threads for everything.
        report: who is told.
        resume: whether a conversion goes on from the records of one that was interrupted.

    """

    n_threads: int = field(default_factory=llama.default_threads)
    report: Reporter = field(default_factory=Silent)
    resume: bool = True
