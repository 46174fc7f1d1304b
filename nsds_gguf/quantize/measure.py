"""The error of each tensor in each type, on a sample of its rows, by the quantizer that will write them.

The error is the mean over rows of a row's relative error, weighted by the row's share of the tensor's sensitivity where
that is known: the divergence is the sum over rows of sensitivity times error. In a ratio of sums over all rows, a row
of huge norm, as the ones behind attention sinks, would hide the others (docs/log.md, 2026-11-28).

Small tensors are measured whole. For large ones a stratified sample is drawn, one row from each of equally long
stretches, by a generator seeded with the tensor's name: the same rows every time. Rows of zeros do not count. The mean
is a ratio of two sums over rows, with the standard error of a ratio estimator (Cochran, Sampling Techniques, eq. 6.9).
Where that is above ``WANTED_STDERR`` in some type, a larger sample is drawn, until it is not.
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
from ..llamacpp import ggml
from ..records import Float32, Float64, Progress, Tensor, TensorCost, no_progress
from ..system.workers import FAR_AHEAD, Workers
from .padding import rows_of, spread_vector
from .quantizer import Quantizer, Quantizers

WHOLE_BELOW_WEIGHTS = 1 << 17  # tensors up to this size are measured whole
FIRST_SAMPLE = 128  # rows of larger ones
WANTED_STDERR = 0.03  # of the error in each quantized type, relative to it; types differ by factors of 1.3 to 4

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
    of_rows: Mapping[str, Float32] | None = None,
) -> tuple[TensorCost, ...]:
    """Measure tensors in types.

    Args:
        tensors: matrices, each with the names of the types to measure it in.
        quantizers: return the quantizer of each tensor, the one that will write it.
        sensitivity: by tensor name, copied into the costs; 0 for tensors that are absent.
        workers: measure tensors, one per task.
        progress: called with weights done and weights in all.
        on_cost: called with each cost when it is measured, in order.
        of_rows: by tensor name, the sensitivity of every row of the original, ``(n_rows,)``; all rows of tensors that
            are absent count alike.

    Returns:
        One cost per tensor, in order.

    Raises:
        ModelError: a tensor holds values that are not finite.

    """
    total = sum(tensor.n_weights for tensor, _ in tensors)
    costs, done, of_rows = [], 0, of_rows or {}
    progress(0, total)
    tasks = (
        _Measuring(t, tuple(types), quantizers(t), sensitivity.get(t.name, 0.0), of_rows.get(t.name))
        for t, types in tensors
    )
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
    """A tensor, the types to measure it in, what will round it, and its sensitivity, as a whole and by original row."""

    tensor: Tensor
    types: tuple[str, ...]
    quantizer: Quantizer
    sensitivity: float
    of_rows: Float32 | None

    def weights(self, rows: NDArray[np.intp], squared_norms: Float64) -> Float64:
        """Return the weights of some rows in the error of the tensor; 0 for rows of zeros.

        Rows that no token has reached say nothing of the tensor; without others they count alike.
        """
        alike = (squared_norms > 0).astype(np.float64)
        if self.of_rows is None:
            return alike
        order = rows_of(self.tensor)
        weights = alike * (self.of_rows if order is None else spread_vector(self.of_rows, order))[rows]
        return weights if weights.any() else alike


def sample_rows(tensor: Tensor, n_wanted: int = FIRST_SAMPLE) -> NDArray[np.intp]:
    """Return the row numbers of a sample of at least ``n_wanted``, ascending; all rows of a small tensor."""
    n_rows = tensor.n_rows
    if tensor.n_weights <= WHOLE_BELOW_WEIGHTS or n_wanted >= n_rows:
        return np.arange(n_rows, dtype=np.intp)
    edges = np.linspace(0, n_rows, n_wanted + 1).astype(np.intp)
    generator = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    return generator.integers(edges[:-1], edges[1:]).astype(np.intp)


def _measure_one(task: _Measuring) -> TensorCost:
    rows = sample_rows(task.tensor)
    estimates = _estimates(task, rows)
    while (n_wanted := _n_wanted(estimates)) > len(rows):  # rare rows of large errors show in larger samples only
        rows = sample_rows(task.tensor, max(n_wanted, 2 * len(rows)))
        estimates = _estimates(task, rows)
    errors = {name: _rounded(estimate.ratio) for name, estimate in estimates.items()}
    stderr = {name: _rounded(estimate.stderr) for name, estimate in estimates.items()}
    return TensorCost(task.tensor.name, _rounded(task.sensitivity), errors, stderr, len(rows))


def _n_wanted(estimates: Mapping[str, RatioEstimate]) -> int:
    """Return the rows that the wanted standard error takes in every quantized type."""
    rounded = (estimate for name, estimate in estimates.items() if name not in ggml.FLOAT_TYPES)
    return max((estimate.n_wanted(WANTED_STDERR) for estimate in rounded), default=0)


def _estimates(task: _Measuring, rows: NDArray[np.intp]) -> dict[str, RatioEstimate]:
    """Return the weighted mean of the relative errors of rows in each type, from some rows."""
    squared_norms, squared_errors = _row_sums(task.tensor, rows, task.types, task.quantizer)
    weights, n_rows = task.weights(rows, squared_norms), task.tensor.n_rows
    by_error = np.divide(weights, squared_norms, out=np.zeros(len(rows)), where=squared_norms > 0)
    return {name: ratio_estimate(by_error * squared, weights, n_rows) for name, squared in squared_errors.items()}


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


@dataclass(frozen=True)
class RatioEstimate:
    """The ratio of two sums over all rows, estimated from a sample.

    Attributes:
        ratio: the estimate.
        deviation: standard deviation of a row's residual over its mean denominator.
        n: rows of the sample.
        n_rows: rows in all; infinite where the sample is of a process.

    """

    ratio: float
    deviation: float
    n: int
    n_rows: float

    @property
    def stderr(self) -> float:
        """Standard error of the ratio; 0 when the sample is all rows."""
        return self.deviation * math.sqrt(max(0.0, 1 / self.n - 1 / self.n_rows))

    def n_wanted(self, relative: float) -> int:
        """Return the rows of a sample whose standard error is ``relative`` times the ratio."""
        if not self.deviation or not self.ratio:
            return 0
        return math.ceil(1 / ((relative * self.ratio / self.deviation) ** 2 + 1 / self.n_rows))


def ratio_estimate(numerator: Float64, denominator: Float64, n_rows: float = math.inf) -> RatioEstimate:
    """Estimate a ratio of sums over ``n_rows`` rows from the values of a sample of rows, ``(n,)`` each.

    Errors that are not finite, in a type that cannot hold the weights, give ``_OVERFLOW``.
    """
    total, n = float(denominator.sum()), len(numerator)
    if total <= 0:
        return RatioEstimate(0.0, 0.0, n, n_rows)
    if not np.isfinite(numerator).all():
        return RatioEstimate(_OVERFLOW, 0.0, n, n_rows)
    ratio = float(numerator.sum()) / total
    residual = numerator - ratio * denominator
    variance = float((residual**2).sum()) / max(n - 1, 1)
    return RatioEstimate(ratio, math.sqrt(variance) * n / total, n, n_rows)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
