"""The workers of a run: threads of this process, or a cluster that fits the run and the model."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import threadpoolctl

from .. import metrics
from ..llamacpp import ggml
from ..quantize.kernel import variants
from ..records import Model
from ..system.cluster import BLAS_KERNELS, Requirements, connected
from ..system.workers import Threads, Workers
from .run import Run


@contextmanager
def open_workers(run: Run, model: Model) -> Iterator[Workers]:
    """Yield the workers of a run for the length of a ``with`` block.

    Raises ``ClusterError`` when the cluster cannot be reached or one of its workers does not fit.
    """
    if run.cluster is None:
        yield Threads(run.n_threads)
        return
    with connected(run.cluster, run.n_threads, Requirements(software, software(), model.inputs)) as cluster:
        run.report.say(f"Cluster: {cluster.description}")
        yield cluster


def software() -> dict[str, str]:
    """Return what results depend on besides the input: versions, and the kernels that BLAS chose for this CPU."""
    import scipy.linalg  # noqa: F401  with a BLAS of its own, which shows once it is loaded

    blas = {str(pool.get("architecture", "")) for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}
    python = ".".join(platform.python_version_tuple()[:2])
    kernels = {BLAS_KERNELS: ", ".join(sorted(blas)), "rounding kernel": variants()[0]}
    return {**metrics.versions(), "ggml": ggml.version(), "Python": python, **kernels}
