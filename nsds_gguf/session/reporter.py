"""Who is told what happens; the command line draws it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

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
