"""The error of each tensor in each type, on a sample of its rows, by the quantizer that will write them.

Small tensors are measured whole. For large ones a stratified sample is drawn, one row from each of equally long
stretches, by a generator seeded with the tensor's name: the same rows every time. The relative error is a ratio
of two sums over rows, so its standard error is that of a ratio estimator (Cochran, Sampling Techniques, eq. 6.9).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError
from ..records import Float64, Progress, Tensor, TensorCost, no_progress
from ..system.workers import FAR_AHEAD, Workers
from .quantizer import Quantizer, Quantizers

WHOLE_BELOW_WEIGHTS = 1 << 17  # tensors up to this size are measured whole
SAMPLED_FRACTION = 1 / 8  # of the rows of larger ones: five types then cost less than one write
SAMPLED_ROWS_MIN, SAMPLED_ROWS_MAX = 64, 1024

_OVERFLOW = 1e12  # relative error where a type cannot hold the weights

_DIGITS = 7  # significant digits in records: the last bits of a BLAS do not change digests


OnCost = Callable[[TensorCost], None]


def measure(
    tensors: Sequence[tuple[Tensor, Sequence[str]]],
    quantizers: Quantizers,
    sensitivity: Mapping[str, float],
    workers: Workers,
    progress: Progress = no_progress,
    on_cost: OnCost | None = None,
) -> tuple[TensorCost, ...]:
    """Measure tensors in types.

    Args:
        tensors: matrices, each with the names of the types to measure it in.
        quantizers: return the quantizer of each tensor, the one that will write it.
        sensitivity: by tensor name, copied into the costs; 0 for tensors that are absent.
        workers: measure tensors, one per task.
        progress: called with weights done and weights in all.
        on_cost: called with each cost when it is measured, in order.

    Returns:
        One cost per tensor, in order.

    Raises:
        ModelError: a tensor holds values that are not finite.

    """
    total = sum(tensor.n_weights for tensor, _ in tensors)
    costs, done = [], 0
    progress(0, total)
    tasks = (_Measuring(t, tuple(types), quantizers(t), sensitivity.get(t.name, 0.0)) for t, types in tensors)
    with closing(workers.ordered(_measure_one, tasks, ahead=FAR_AHEAD)) as measured:
        for task, cost in measured:
            costs.append(cost)
            if on_cost is not None:
                on_cost(cost)
            done += task.tensor.n_weights
            progress(done, total)
    return tuple(costs)


@dataclass(frozen=True)
class _Measuring:
    """A tensor, the types to measure it in, what will round it, and its sensitivity."""

    tensor: Tensor
    types: tuple[str, ...]
    quantizer: Quantizer
    sensitivity: float


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


def _measure_one(task: _Measuring) -> TensorCost:
    tensor = task.tensor
    rows = sample_rows(tensor)
    squared_norms, squared_errors = _row_sums(tensor, rows, task.types, task.quantizer)
    errors, stderr = {}, {}
    for name in task.types:
        ratio, deviation = ratio_estimate(squared_errors[name], squared_norms, len(rows) / tensor.n_rows)
        errors[name], stderr[name] = _rounded(ratio), _rounded(deviation)
    return TensorCost(tensor.name, _rounded(task.sensitivity), errors, stderr, len(rows))


def _row_sums(
    tensor: Tensor, rows: NDArray[np.intp], types: Sequence[str], quantizer: Quantizer
) -> tuple[Float64, dict[str, Float64]]:
    """Return the squared norm of every measured row, and its squared error in each type."""
    norms, errors = [], dict[str, list[Float64]]({name: [] for name in types})
    for first_row, some in _slabs(tensor, rows):
        x = tensor.rows(some)
        for name in types:
            errors[name].append(quantizer.errors(x, name, first_row))
        norms.append(quantizer.squared_norms(x, first_row))
    squared_norms = np.concatenate(norms)
    if not np.isfinite(squared_norms).all():
        raise ModelError(f"tensor {tensor.source}: weights too large: their squares overflow float32")
    return squared_norms, {name: np.concatenate(parts) for name, parts in errors.items()}


def _slabs(tensor: Tensor, rows: NDArray[np.intp]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Yield the rows in slabs within one matrix of a stack, each with its ``first_row`` for the quantizer.

    Rows of a sample are not adjacent; for them it is the first row of their matrix.
    """
    step, n_rows = tensor.rows_per_slab(), tensor.n_matrix_rows
    is_whole = len(rows) == tensor.n_rows
    for first in range(0, tensor.n_rows, n_rows):
        of_matrix = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + n_rows)]
        for start in range(0, len(of_matrix), step):
            some = of_matrix[start : start + step]
            yield int(some[0]) if is_whole else first, some


def ratio_estimate(numerator: Float64, denominator: Float64, sampled_share: float) -> tuple[float, float]:
    """Return the ratio of sums over a sample of rows and its standard error.

    ``sampled_share`` is the sample size over the population; 1 means no sampling error. Errors that are not finite, in
    a type that cannot hold the weights, give ``_OVERFLOW``.
    """
    total = float(denominator.sum())
    if total <= 0:
        return 0.0, 0.0
    if not np.isfinite(numerator).all():  # weights beyond the range of the type
        return _OVERFLOW, 0.0
    ratio = float(numerator.sum()) / total
    n = len(numerator)
    if n < 2 or sampled_share >= 1:
        return ratio, 0.0
    residual = numerator - ratio * denominator
    variance = float((residual**2).sum()) / (n - 1)
    return ratio, math.sqrt(n * variance * (1 - sampled_share)) / total


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
