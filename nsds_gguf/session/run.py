"""Threads, cluster, reporter and resuming of a run: nothing here changes the bytes of an output."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from ..llamacpp import llama
from ..records import Progress, no_progress


class Reporter(Protocol):
    """Receives stages and notes; the command line draws them."""

    def stage(self, name: str) -> AbstractContextManager[Progress]:
        """Open a stage and return its progress callback."""
        ...

    def expect(self, stages: Sequence[tuple[str, float]]) -> None:
        """Receive the stages that take time, in order: how their names start, and the estimated seconds."""
        ...

    def say(self, text: str) -> None:
        """Report one fact."""
        ...


class Silent:
    """A reporter that discards everything."""

    def stage(self, name: str) -> AbstractContextManager[Progress]:
        """Return a progress callback that does nothing."""
        return nullcontext(no_progress)

    def expect(self, stages: Sequence[tuple[str, float]]) -> None:
        """Ignore the stages."""

    def say(self, text: str) -> None:
        """Ignore the fact."""


@dataclass(frozen=True)
class Run:
    """How to run.

    Attributes:
        n_threads: CPU threads of every stage.
        report: receives stages and notes.
        resume: whether a conversion resumes from the records of an interrupted one.
        cluster: address of a Dask scheduler, ``local`` for processes of this machine; ``None`` for threads.

    """

    n_threads: int = field(default_factory=llama.default_threads)
    report: Reporter = field(default_factory=Silent)
    resume: bool = True
    cluster: str | None = None
