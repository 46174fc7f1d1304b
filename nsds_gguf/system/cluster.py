"""Workers of a Dask cluster (extra ``cluster``): tasks are sent as pickles, results come back one at a time.

Weights, Hessians and Hessian factors do not pass through the scheduler: workers read and write them at the paths that
they have on the client, on shared storage. A task whose worker dies runs again on another.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import threadpoolctl

from ..errors import ClusterError, NsdsError
from .filestate import FileState
from .workers import AHEAD, Result, Task, in_order

if TYPE_CHECKING:
    import distributed

LOCAL = "local"  # in place of an address: worker processes on this machine

SLAB_BYTES = 32 << 20  # of float32 rows per task: seconds of work against milliseconds of Dask
RETRIES = 3  # of a task after an error of the system; deaths of workers are counted by the scheduler
WAIT_S = 60.0  # for the scheduler, and for the first worker

BLAS_KERNELS = "BLAS kernels"  # chosen for the CPU; the last bits of products depend on them
_REMEDIES = {BLAS_KERNELS: "start this command and all workers with the same OPENBLAS_CORETYPE"}

_FRESH_S = 5.0  # age of the known number of slots

_one_at_a_time = threading.Lock()  # large tasks of this process
_fits: set[bytes] = set()  # requirements that this process meets


@dataclass(frozen=True)
class Requirements:
    """What a worker must have in common with the client.

    Attributes:
        find_software: returns the versions of the software that decides results, by name.
        software: what it returns on the client.
        files: the files that tasks read.

    """

    find_software: Callable[[], Mapping[str, str]]
    software: Mapping[str, str]
    files: tuple[FileState, ...] = ()

    def problem(self) -> str:
        """Return what is wrong with this process, empty when it fits."""
        found = self.find_software()
        for name, wanted in self.software.items():
            if found.get(name) != wanted:
                has = found.get(name, "none")
                remedy = _REMEDIES.get(name, "install the same version on all workers")
                return f"has {name} {has}, this run has {wanted}: {remedy}"
        return next(filter(None, map(_unseen, self.files)), "")


def _unseen(state: FileState) -> str:
    try:
        n_bytes = state.path.stat().st_size
    except OSError as error:
        return f"does not see {state.path} ({error.strerror}): put it on storage that all workers mount at this path"
    if n_bytes != state.n_bytes:
        return f"sees another {state.path}: it has {n_bytes} bytes there, {state.n_bytes} here"
    return ""


class Cluster:
    """``Workers`` of a Dask cluster; see ``connected``.

    In the memory of the client: the result of one task. In that of workers: ``ahead`` results per slot. Nothing in that
    of the scheduler but the pickles of tasks in flight.
    """

    slab_bytes = SLAB_BYTES

    def __init__(self, client: distributed.Client, requirements: Requirements) -> None:
        """Take a connected client; raises ``ClusterError`` when a worker does not fit."""
        self._client, self._needed = client, pickle.dumps(requirements)
        self._known = 0.0, 0, 0
        wanted = requirements.software.get("nsds-gguf", "")
        found = client.run(_problem, self._needed, on_error="return")
        for address, problem in sorted(found.items()):
            if isinstance(problem, BaseException):
                raise ClusterError(
                    f"worker {address} cannot load nsds-gguf: {type(problem).__name__}: {problem}; "
                    f"install nsds-gguf {wanted} on all workers"
                )
            if problem:
                raise ClusterError(f"worker {address} {problem}")

    @property
    def description(self) -> str:
        """Workers, slots and the address of the dashboard."""
        n_processes, n_slots = self._size()
        return f"{n_processes} workers with {n_slots} threads; dashboard: {self._client.dashboard_link}"

    def ordered(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], *, ahead: int = AHEAD, is_large: bool = False
    ) -> Generator[tuple[Task, Result], None, None]:
        """See ``Workers``."""
        name = getattr(function, "__name__", "task").strip("_")

        def submit(task: Task) -> _Future[Result]:
            work = pickle.dumps((function, task))
            future = self._client.submit(
                _run, self._needed, work, is_large, key=f"{name}-{uuid.uuid4().hex}", retries=RETRIES, pure=False
            )
            return _Future(future, name)

        yield from in_order(submit, tasks, lambda: max(1, ahead * self._size()[0 if is_large else 1]))

    def check_sees(self, folder: Path) -> None:
        """See ``Workers``."""
        found = self._client.run(Path.is_dir, folder, on_error="return")
        for address, sees in sorted(found.items()):
            if sees is not True:
                raise ClusterError(
                    f"worker {address} does not see {folder}: workers write Hessian factors there; put the output on "
                    "storage that all workers mount at this path, or pass --rounding rtn"
                )

    def _size(self) -> tuple[int, int]:
        """Return the number of worker processes and of their threads, a few seconds old."""
        asked, n_processes, n_slots = self._known
        if time.monotonic() - asked > _FRESH_S:
            threads = self._client.nthreads()
            n_processes, n_slots = len(threads), sum(threads.values())
            self._known = time.monotonic(), n_processes, n_slots
        return n_processes, n_slots


class _Future(Generic[Result]):
    """A task on the cluster."""

    def __init__(self, future: distributed.Future, name: str) -> None:
        self._future, self._name = future, name

    def result(self) -> Result:
        """Wait for the result; raise what the task raised, or ``ClusterError`` when the cluster lost it."""
        from distributed import CancelledError, KilledWorker

        try:
            found = self._future.result()
        except KilledWorker as error:
            raise ClusterError(
                f"task {self._name}: {error.allowed_failures + 1} workers died while they ran it, the last at "
                f"{error.last_worker.address}: see its log; give workers more memory or fewer threads"
            ) from error
        except CancelledError as error:
            raise ClusterError(f"task {self._name}: the connection to the scheduler was lost") from error
        if isinstance(found, _Failure):
            raise found.error
        result: Result = found
        return result

    def cancel(self) -> None:
        """Give up the task."""
        self._future.cancel()


# --- in a worker ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failure:
    """An error of the input: the task would fail anywhere."""

    error: NsdsError


def _problem(needed: bytes) -> str:
    requirements: Requirements = pickle.loads(needed)
    return requirements.problem()


def _run(needed: bytes, work: bytes, is_large: bool) -> Any:
    """Run a task in a worker that fits; one BLAS thread, as in the stages of a client."""
    if needed not in _fits:
        problem = _problem(needed)
        if problem:
            return _Failure(ClusterError(f"worker {_address()} {problem}"))
        threadpoolctl.threadpool_limits(1, user_api="blas")
        _fits.add(needed)
    function, task = pickle.loads(work)
    with _one_at_a_time if is_large else nullcontext():
        try:
            return function(task)
        except NsdsError as error:
            if isinstance(error.__cause__, OSError):  # the system could not read or write just now
                raise
            return _Failure(error)


def _address() -> str:
    from distributed import get_worker

    return str(get_worker().address)


# --- the connection ---------------------------------------------------------------------------------------------------


@contextmanager
def connected(address: str, n_local: int, requirements: Requirements) -> Iterator[Cluster]:
    """Connect to a cluster for the length of a ``with`` block; its tasks are cancelled at the end.

    Args:
        address: of a scheduler, or ``LOCAL`` for processes of this machine, which end with the block.
        n_local: number of these processes.
        requirements: what workers must have.

    Raises:
        ClusterError: Dask is not installed, the scheduler does not answer, no worker is there, or one does not fit.

    """
    try:
        import distributed
    except ImportError as error:
        raise ClusterError("--cluster needs Dask; run: pip install 'nsds-gguf[cluster]'") from error
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if address == LOCAL:
            place: Any = stack.enter_context(_local_cluster(n_local))
        else:
            place = address
        try:
            client = stack.enter_context(distributed.Client(place, timeout=WAIT_S, direct_to_workers=True))
            client.wait_for_workers(1, timeout=WAIT_S)
        except TimeoutError as error:
            raise ClusterError(f"cluster {address}: no worker joined within {WAIT_S:g} s") from error
        except (OSError, ValueError) as error:
            raise ClusterError(f"cluster {address}: cannot connect: {error}") from error
        yield Cluster(client, requirements)


@contextmanager
def _local_cluster(n_processes: int) -> Iterator[distributed.LocalCluster]:
    """Start processes of one thread, which end with the block or with this process; nannies replace those that die.

    Dask may give up a nanny within seconds when its process dies twice; the timeout here keeps it.
    """
    import dask
    from distributed import LocalCluster

    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "30 days"}),
        tempfile.TemporaryDirectory(prefix="nsds-gguf-cluster-", ignore_cleanup_errors=True) as folder,
        LocalCluster(
            n_workers=n_processes,
            threads_per_worker=1,
            memory_limit=0,  # weights are mapped files, which count as memory of the process
            dashboard_address="127.0.0.1:0",
            local_directory=folder,
            silence_logs=logging.CRITICAL,
        ) as cluster,
    ):
        try:
            yield cluster
        finally:
            _kill(cluster)


def _kill(cluster: distributed.LocalCluster) -> None:
    """End the processes at once, whatever they compute: after Ctrl-C the client has no time to wait for them."""
    for nanny in cluster.workers.values():
        nanny.auto_restart = False
        with suppress(OSError, TypeError):  # it has no process now
            os.kill(nanny.pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's log off the terminal: what a user can act on is raised."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
