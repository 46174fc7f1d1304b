"""Where the tasks of a stage run: in the threads of this process, or on a cluster (``cluster``)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
Covariant = TypeVar("Covariant", covariant=True)

AHEAD = 2  # tasks in flight per slot: one runs, one waits
FAR_AHEAD = 64  # where results take no memory, so that one long task does not hold up the others


class Workers(Protocol):
    """Runs the tasks of a stage, each a call of one function with one argument, and returns results in order.

    Functions and arguments of tasks pickle: where a task runs does not change its result.
    """

    @property
    def slab_bytes(self) -> int:
        """Bytes of float32 rows that are worth a task."""
        ...

    def ordered(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], *, ahead: int = AHEAD, is_large: bool = False
    ) -> Generator[tuple[Task, Result], None, None]:
        """Yield every task with its result, in the order of the tasks; a closed generator cancels what is left.

        Args:
            function: of a module, so that it pickles by its name.
            tasks: drawn on demand.
            ahead: tasks in flight per slot, which bounds the results that are held in memory.
            is_large: whether a task takes a large part of a machine's memory: one at a time in each process.

        Raises:
            Exception: whatever the function raises.
            ClusterError: the cluster cannot run the tasks.

        """
        ...

    def check_sees(self, folder: Path) -> None:
        """Raise ``ClusterError`` when a worker does not see a folder through which tasks exchange files."""
        ...


@dataclass(frozen=True)
class Threads:
    """``Workers`` in this process: a pool of threads for each stage; large tasks run in the calling thread.

    Attributes:
        n_threads: threads of a pool.

    """

    n_threads: int = 1
    slab_bytes: ClassVar[int] = 2 << 20  # fits the cache, hides Python's 0.1 ms per slab

    def ordered(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], *, ahead: int = AHEAD, is_large: bool = False
    ) -> Generator[tuple[Task, Result], None, None]:
        """See ``Workers``."""
        if is_large:
            for task in tasks:
                yield task, function(task)
            return
        with ThreadPoolExecutor(self.n_threads) as pool:
            n_ahead = ahead * self.n_threads
            with closing(in_order(lambda task: pool.submit(function, task), tasks, lambda: n_ahead)) as results:
                yield from results

    def check_sees(self, folder: Path) -> None:
        """Return: this process sees its own folders."""


class Future(Protocol, Generic[Covariant]):
    """What futures of threads and of Dask have in common."""

    def result(self) -> Covariant:
        """Wait for the result and return it, or raise what the task raised."""
        ...

    def cancel(self) -> object:
        """Give up the task if it has not begun."""
        ...


def in_order(
    submit: Callable[[Task], Future[Result]], tasks: Iterable[Task], limit: Callable[[], int]
) -> Generator[tuple[Task, Result], None, None]:
    """Submit tasks and yield them with their results in order, at most ``limit()`` in flight."""
    pending: deque[tuple[Task, Future[Result]]] = deque()
    try:
        for task in tasks:
            pending.append((task, submit(task)))
            while len(pending) >= limit():
                yield _first(pending)
        while pending:
            yield _first(pending)
    finally:
        for _, future in pending:
            future.cancel()


def _first(pending: deque[tuple[Task, Future[Result]]]) -> tuple[Task, Result]:
    """Wait for the oldest task; drop its future before the result is used."""
    task, future = pending[0]
    result = future.result()
    pending.popleft()
    return task, result
