"""Layer metrics: one score per layer of a Model, higher = more sensitive.

``nsds`` is the method of the paper, ``baselines`` has the metrics it compares with, ``stats`` the shared statistics. To
add a metric, write a function ``(model, se, workers, progress) -> tuple[LayerScore, ...]`` and add one line to
``METRICS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import scipy

from .. import __version__
from ..compute.backend import BACKENDS, DEFAULT_BACKEND
from ..errors import PlanError
from ..records import LayerScore, Model, Progress, no_progress
from ..system.workers import Threads, Workers
from .baselines import Metric, baseline, boost_jumps, ewq, mean_kurtosis, mse, zd
from .nsds import SE_READINGS, rest_notes, score_nsds
from .recorded import RecordedWorkers

__all__ = ["METRICS", "SE_READINGS", "LayerScore", "Metric", "RecordedWorkers", "score_layers", "versions"]

METRICS: dict[str, Metric] = {
    "nsds": score_nsds,
    "zd": baseline(zd),
    "mse": baseline(mse),
    "ewq": baseline(ewq),
    "kurtboost": baseline(mean_kurtosis, boost_jumps),
}

# Digits of a stored value: fewer than float64 has, so that the last bits of BLAS results do not change a digest.
STORED_DIGITS = 7


def score_layers(
    model: Model,
    metric: str = "nsds",
    se: str | None = "product",
    workers: Workers | None = None,
    progress: Progress = no_progress,
    device: str = DEFAULT_BACKEND,
) -> tuple[tuple[LayerScore, ...], tuple[str, ...]]:
    """Return a score for every layer, to 7 significant digits, and notes on what the metric cannot see.

    Args:
        model: read one matrix at a time.
        metric: a key of ``METRICS``.
        se: reading of structural expressiveness, a key of ``SE_READINGS``; for ``nsds`` only.
        workers: score, a layer per task; default: this thread.
        progress: called with (done, total).
        device: a key of ``compute.BACKENDS``: where the heavy parts of ``nsds`` run.

    Raises:
        PlanError: unknown metric or reading.
        ModelError: a tensor holds NaN or infinite weights.

    """
    _check_name("metric", metric, METRICS)
    reading = se or next(iter(SE_READINGS))
    _check_name("SE reading", reading, SE_READINGS)
    workers, torch_device = workers or Threads(), BACKENDS[device].torch_device
    if METRICS[metric] is score_nsds and torch_device:
        from ..compute.torch_backend import exact_products

        with exact_products():
            layers = score_nsds(model, reading, workers, progress, torch_device)
    else:
        layers = METRICS[metric](model, reading, workers, progress)
    return tuple(_rounded(layer) for layer in layers), rest_notes(model) if metric == "nsds" else ()


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute scores."""
    return {"nsds-gguf": __version__, "numpy": np.__version__, "scipy": scipy.__version__}


def _check_name(kind: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise PlanError(f"unknown {kind} {name!r}: choose one of {', '.join(known)}")


def _rounded(layer: LayerScore) -> LayerScore:
    return replace(
        layer,
        score=_stored(layer.score),
        nv={name: _stored(value) for name, value in layer.nv.items()},
        se={name: _stored(value) for name, value in layer.se.items()},
        p_nv=None if layer.p_nv is None else _stored(layer.p_nv),
        p_se=None if layer.p_se is None else _stored(layer.p_se),
    )


def _stored(value: float) -> float:
    return float(f"{value:.{STORED_DIGITS}g}")
