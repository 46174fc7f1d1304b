"""Terminal output: results and JSON go to standard output, bars and notes to standard error."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from ..errors import OutputError
from ..records import Progress
from ..system.atomic import write_small

_FILE_WIDTH = 140  # columns of tables that go to a file or a pipe


class _Console(Console):
    """A console without markup: names and templates keep their brackets; a closed pipe is left to ``main``."""

    def __init__(self, *, stderr: bool, quiet: bool) -> None:
        super().__init__(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _TimeLeftColumn(ProgressColumn):
    """The time left at the average speed so far, shown from the first step on: steps may take minutes."""

    def render(self, task: Task) -> Text:
        """Return it as hours, minutes and seconds."""
        if not task.total or not task.completed or task.elapsed is None:
            return Text("-:--:--", style="progress.remaining")
        left = task.elapsed * (task.total - task.completed) / task.completed
        return Text(str(timedelta(seconds=round(left))), style="progress.remaining")


class WholeRun:
    """The stages of a run and their estimated seconds: how much of the run is done.

    A stage that the run does not expect counts for nothing. Expected stages before the one that starts have been
    skipped: an earlier run kept their results.
    """

    def __init__(self, stages: Sequence[tuple[str, float]]) -> None:
        self._left = list(stages)
        self.total = sum(seconds for _, seconds in stages)
        self.done = 0.0
        self.start = time.monotonic()

    def begin(self, name: str) -> float:
        """Return the estimated seconds of the stage that starts; 0 if it is not expected."""
        for index, (start, seconds) in enumerate(self._left):
            if name.startswith(start):
                self.total -= sum(skipped for _, skipped in self._left[:index])
                del self._left[: index + 1]
                return seconds
        return 0.0


class Screen:
    """Draws bars on a terminal, notes on standard error, results on standard output."""

    def __init__(self, *, quiet: bool, json_to_stdout: bool, verbose: bool) -> None:
        """Take the user's choice of output."""
        self.notes = _Console(stderr=True, quiet=quiet)
        self.results = _Console(stderr=json_to_stdout, quiet=quiet)
        if not self.results.is_terminal:
            self.results.width = _FILE_WIDTH
        self.verbose = verbose
        self.draws_bars = self.notes.is_terminal and not quiet
        self._annotate: Callable[[str], None] | None = None
        self._whole: WholeRun | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Show a stage as a bar with its time; without a terminal, with ``verbose``, as one line when it ends."""
        start = time.perf_counter()
        if not self.draws_bars:
            yield lambda done, total: None
            if self.verbose:
                self.notes.print(f"{name}: {time.perf_counter() - start:.1f} s")
            return
        columns = (TextColumn("{task.description:<24}"), BarColumn(None), TaskProgressColumn(), TimeElapsedColumn(),
                   _TimeLeftColumn())  # fmt: skip
        whole, expected = self._whole, self._whole.begin(name) if self._whole is not None else 0.0
        with Bars(*columns, console=self.notes) as bars:
            task = bars.add_task(name, total=None)
            self._annotate = lambda text: bars.update(task, description=text)
            show_whole = _bar_of(whole, bars) if whole is not None and expected else lambda share: None
            show_whole(0.0)

            def show(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total)
                show_whole(expected * done / total if total else 0.0)

            yield show
            bars.update(task, completed=1, total=1)
            for other in bars.task_ids[1:]:
                bars.remove_task(other)
        if whole is not None:
            whole.done += expected
        self._annotate = None

    def expect(self, stages: Sequence[tuple[str, float]]) -> None:
        """Draw a second bar, over all these stages, while they run."""
        self._whole = WholeRun(stages)

    def annotate(self, text: str) -> None:
        """Show a running figure in place of the open bar's name; without a terminal, with ``verbose``, as a line."""
        if self._annotate is not None:
            self._annotate(text)
        elif self.verbose:
            self.notes.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Show a warning in one line."""
        self.notes.print(f"warning: {text}", soft_wrap=True)

    def say(self, text: str) -> None:
        """Show a note in one line; without a terminal, only with ``verbose``."""
        if self.notes.is_terminal or self.verbose:
            self.notes.print(text, soft_wrap=True)

    def show(self, view: RenderableType) -> None:
        """Show a result; text stays on one line, however long."""
        with standard_output():
            self.results.print(view, soft_wrap=isinstance(view, Text))


def _bar_of(whole: WholeRun, bars: Bars) -> Callable[[float], None]:
    """Add the bar of a whole run; return what shows it with some seconds of the open stage done."""
    task = bars.add_task("all stages", total=whole.total)
    bars.tasks[-1].completed, bars.tasks[-1].start_time = whole.done, whole.start
    return lambda seconds: bars.update(task, completed=whole.done + seconds)


@contextmanager
def standard_output() -> Iterator[None]:
    """Raise ``OutputError`` when standard output cannot be written, as on a full disk; pass on a closed pipe."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise OutputError(f"standard output: {error.strerror}") from error


def drop_output() -> None:
    """Discard the rest of standard output's buffer: Python would fail on it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_json(destination: str | None, data: Any) -> None:
    """Write JSON to a file, or to standard output for ``-``; raises ``OutputError`` when that fails."""
    if destination is None:
        return
    text = json.dumps(data, indent=1) + "\n"  # ASCII: the terminal's encoding does not matter
    if destination == "-":
        with standard_output():
            print(text, end="")
        return
    write_text(Path(destination), text)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all; raises ``OutputError`` on failure."""
    write_small(path, text)
