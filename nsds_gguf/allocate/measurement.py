"""What each type does to each tensor: quantize and dequantize a sample of its rows through ggml.

Small tensors are measured whole. Of large ones a stratified sample of rows is taken, one row from each of equally long
stretches, drawn from a generator seeded with the tensor's name: the same rows every time. The relative error is a ratio
of two sums over rows, so its standard error is that of a ratio estimator (Cochran, Sampling Techniques, eq. 6.9).
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError
from ..llamacpp import ggml
from ..quantize import rounding
from ..quantize.rounding import Feedback, Feedbacks
from ..records import Float32, Float64, Progress, Tensor, TensorCost, no_progress
from ..sensitivity.result import Sensitivities
from .candidates import Candidate

WHOLE_BELOW_WEIGHTS = 1 << 17  # tensors up to this size are measured whole
SAMPLED_FRACTION = 1 / 8  # of the rows of larger ones: five types then cost less than one write
SAMPLED_ROWS_MIN, SAMPLED_ROWS_MAX = 64, 1024

_SLAB_WEIGHTS = 1 << 20
_DIGITS = 7  # kept in records, so that the last bits of a BLAS do not change digests


@dataclass(frozen=True)
class _Sums:
    """Per sampled row: the energy, and the squared error in each type."""

    energy: Float64
    errors: Mapping[str, Float64]


def measure(
    found: Sequence[Candidate],
    propagation: Sensitivities,
    importance: Mapping[str, Float32],
    n_threads: int,
    progress: Progress = no_progress,
    feedbacks: Feedbacks | None = None,
) -> tuple[TensorCost, ...]:
    """Measure every open tensor in every type open to it.

    Args:
        found: the tensors and their types; those with one type are measured too, for the plan to state their error.
        propagation: sensitivities of the tensors.
        importance: ``(n_cols,)`` column weights by tensor name, ``(n_experts, n_cols)`` where experts differ; absent
            where columns weigh the same.
        n_threads: threads; each works on one tensor at a time.
        progress: called with weights done and weights in all.
        feedbacks: where weights are rounded with feedback, the factors of the tensors that have it.

    Returns:
        One cost per matrix that may be quantized, in file order.

    Raises:
        ModelError: a tensor holds values that are not finite.

    """
    matrices = [candidate for candidate in found if not candidate.is_kept and candidate.types != ("F32",)]
    total = sum(candidate.tensor.n_weights for candidate in matrices)
    costs, done = [], 0
    progress(0, total)
    with ThreadPoolExecutor(n_threads) as pool:
        jobs = [pool.submit(_measure_one, c, propagation, importance.get(c.tensor.name), feedbacks) for c in matrices]
        try:
            for candidate, job in zip(matrices, jobs, strict=True):
                costs.append(job.result())
                done += candidate.tensor.n_weights
                progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return tuple(costs)


def sample_rows(tensor: Tensor) -> NDArray[np.intp]:
    """Return the row numbers that are measured, ascending."""
    n_rows = tensor.n_rows
    n_sampled = n_rows
    if tensor.n_weights > WHOLE_BELOW_WEIGHTS:
        wanted = math.ceil(n_rows * SAMPLED_FRACTION)
        n_sampled = min(n_rows, max(SAMPLED_ROWS_MIN, min(SAMPLED_ROWS_MAX, wanted)))
    if n_sampled == n_rows:
        return np.arange(n_rows, dtype=np.intp)
    edges = np.linspace(0, n_rows, n_sampled + 1).astype(np.intp)
    generator = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    return generator.integers(edges[:-1], edges[1:]).astype(np.intp)


def _measure_one(
    candidate: Candidate, propagation: Sensitivities, importance: Float32 | None, feedbacks: Feedbacks | None
) -> TensorCost:
    tensor = candidate.tensor
    rows = sample_rows(tensor)
    feedback = feedbacks.of(tensor.name) if feedbacks is not None else None
    sums = _row_sums(tensor, rows, candidate.types, importance, feedback)
    sampled_share = len(rows) / tensor.n_rows
    errors, stderr = {}, {}
    for name, row_errors in sums.errors.items():
        ratio, deviation = ratio_estimate(row_errors, sums.energy, sampled_share)
        errors[name], stderr[name] = _rounded(ratio), _rounded(deviation)
    sensitivity = propagation.sensitivity.get(tensor.name, 0.0)
    return TensorCost(tensor.name, _rounded(sensitivity), errors, stderr, len(rows))


def _row_sums(
    tensor: Tensor,
    rows: NDArray[np.intp],
    types: Sequence[str],
    importance: Float32 | None,
    feedback: Feedback | None,
) -> _Sums:
    parts = [
        _slab_sums(_gather(tensor, some), types, weights, feedback)
        for some, weights in _slabs(tensor, rows, importance)
    ]
    sums = _Sums(
        np.concatenate([part.energy for part in parts]),
        {name: np.concatenate([part.errors[name] for part in parts]) for name in types},
    )
    if not np.isfinite(sums.energy).all():
        raise ModelError(f"tensor {tensor.source}: NaN or infinite weights in {np.sum(~np.isfinite(sums.energy))} rows")
    return sums


def _slabs(
    tensor: Tensor, rows: NDArray[np.intp], importance: Float32 | None
) -> Iterator[tuple[NDArray[np.intp], Float32 | None]]:
    """Yield the rows in slabs with the column weights of each; where experts differ, no slab has rows of two."""
    step = max(1, _SLAB_WEIGHTS // tensor.n_cols)
    stretches: list[tuple[NDArray[np.intp], Float32 | None]] = [(rows, importance)]
    if importance is not None and importance.ndim == 2:
        edges = np.searchsorted(rows, np.arange(len(importance) + 1) * tensor.shape[-2])
        stretches = [(rows[a:b], importance[e]) for e, (a, b) in enumerate(itertools.pairwise(edges))]
    for stretch, weights in stretches:
        for start in range(0, len(stretch), step):
            yield stretch[start : start + step], weights


def _gather(tensor: Tensor, rows: NDArray[np.intp]) -> Float32:
    if len(rows) == rows[-1] - rows[0] + 1:
        return tensor.read_rows(int(rows[0]), int(rows[-1]) + 1)
    return np.concatenate([tensor.read_rows(int(row), int(row) + 1) for row in rows])


def _slab_sums(x: Float32, types: Sequence[str], importance: Float32 | None, feedback: Feedback | None) -> _Sums:
    if feedback is not None:
        errors = {name: _feedback_errors(x, name, feedback) for name in types}
        return _Sums((np.square(x) @ feedback.importance).astype(np.float64), errors)
    weights = np.ones(x.shape[1], dtype=np.float32) if importance is None else importance
    errors = {}
    for name in types:
        delta = ggml.dequantize(ggml.quantize(x, name, importance), name, x.shape[1])
        delta -= x
        errors[name] = (np.square(delta, out=delta) @ weights).astype(np.float64)
    return _Sums((np.square(x) @ weights).astype(np.float64), errors)


def _feedback_errors(x: Float32, type_name: str, feedback: Feedback) -> Float64:
    """Return the error of every row as written, by types without feedback too."""
    if type_name in rounding.COVERED_TYPES:
        data = rounding.quantize(x, type_name, feedback)
    else:
        data = ggml.quantize(x, type_name, feedback.importance)
    return feedback.row_errors(x - ggml.dequantize(data, type_name, x.shape[1]))


def ratio_estimate(numerator: Float64, denominator: Float64, sampled_share: float) -> tuple[float, float]:
    """Return the ratio of sums over a sample of rows and its standard error.

    ``sampled_share`` is the sample over the population: 1 means no sampling error.
    """
    total = float(denominator.sum())
    if total <= 0:
        return 0.0, 0.0
    ratio = float(numerator.sum()) / total
    n = len(numerator)
    if n < 2 or sampled_share >= 1:
        return ratio, 0.0
    residual = numerator - ratio * denominator
    variance = float((residual**2).sum()) / (n - 1)
    return ratio, math.sqrt(n * variance * (1 - sampled_share)) / total


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
