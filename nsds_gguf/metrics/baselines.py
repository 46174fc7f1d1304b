"""The data-free baselines of the NSDS paper (arXiv 2603.17354), one number per layer.

Each treats the matrices of a layer separately (q, k, v, o, gate, up, down and any others), in float64 over row tiles.
Higher = more sensitive. They have the same interface as NSDS and serve for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np

from ..compute.layers import Layer, view_layer
from ..records import Float32, Float64, LayerScore, Model, Progress
from ..system.workers import FAR_AHEAD, Workers
from .stats import matrix_kurtosis, matrix_mean, row_tiles

# Value of one layer, from its matrices.
Measure = Callable[[Iterator[Float32]], float]

# Scores every layer of a model; the name of the SE reading is for NSDS alone.
Metric = Callable[[Model, str, Workers, Progress], tuple[LayerScore, ...]]

# Largest quantized magnitude of the symmetric 2-bit quantizer of MSE: levels -1, 0, 1.
MSE_QMAX = 1

# A jump between layers further than this many standard deviations from the mean jump doubles a KurtBoost score.
JUMP_STDS = 2.0
JUMP_FACTOR = 2.0


def outlier_fraction(matrix: Float32) -> float:
    """Return the fraction of weights with ``|z| > 1``, z by the tensor's mean and unbiased standard deviation (ZD)."""
    mean = matrix_mean(matrix)
    squares = sum(float(((tile - mean) ** 2).sum()) for tile in row_tiles(matrix))
    std = math.sqrt(squares / (matrix.size - 1))
    return sum(int(np.count_nonzero(np.abs(tile - mean) > std)) for tile in row_tiles(matrix)) / matrix.size


def two_bit_error(matrix: Float32) -> float:
    """Return ``sum((W - Q(W))**2)``, Q symmetric per tensor at 2 bits (MSE).

    The scale is ``max|W| / (qmax + 1)``; weights over scale are rounded and clipped to +-qmax.
    """
    scale = float(np.abs(matrix).max()) / (MSE_QMAX + 1)
    if scale == 0.0:
        return 0.0
    error = 0.0
    for tile in row_tiles(matrix):
        quantized = scale * np.clip(np.round(tile / scale), -MSE_QMAX, MSE_QMAX)
        error += float(((tile - quantized) ** 2).sum())
    return error


def softmax_entropy(matrix: Float32) -> float:
    """Return the entropy in nats of the softmax over the flattened tensor: ``ln Z - sum(p x)`` (EWQ)."""
    largest = float(matrix.max())
    partition = weighted = 0.0
    for tile in row_tiles(matrix):
        tile -= largest
        exponential = np.exp(tile)
        partition += float(exponential.sum())
        weighted += float((exponential * tile).sum())
    return math.log(partition) - weighted / partition


def zd(matrices: Iterator[Float32]) -> float:
    """Return ZD of a layer: the mean over its tensors of the outlier fraction."""
    return float(np.mean([outlier_fraction(matrix) for matrix in matrices]))


def mse(matrices: Iterator[Float32]) -> float:
    """Return MSE of a layer: the mean over its tensors of the 2-bit error."""
    return float(np.mean([two_bit_error(matrix) for matrix in matrices]))


def ewq(matrices: Iterator[Float32]) -> float:
    """Return EWQ of a layer: ``sum_t(H_t / size_t) / sum_t(size_t)``.

    The authors add 0.01 inside the entropy's logarithm, which shifts every tensor by a constant per weight; omitted
    here.
    """
    entropies, sizes = zip(*((softmax_entropy(matrix), matrix.size) for matrix in matrices), strict=True)
    return float((np.array(entropies) / np.array(sizes)).sum() / sum(sizes))


def mean_kurtosis(matrices: Iterator[Float32]) -> float:
    """Return the mean over a layer's tensors of their excess kurtosis."""
    return float(np.mean([matrix_kurtosis(matrix) for matrix in matrices]))


def boost_jumps(kurtosis: Float64) -> Float64:
    """Return the kurtosis of the layers (n_layers,), doubled where it jumps (KurtBoost).

    A layer jumps when its difference from the previous one lies more than 2 standard deviations (over the
    differences, biased) from the mean difference; so the first layer cannot.
    """
    jumps = np.diff(kurtosis)
    if len(jumps) == 0:
        return kurtosis
    is_jump = np.abs(jumps - jumps.mean()) > JUMP_STDS * jumps.std()
    return kurtosis * np.where(np.concatenate([[False], is_jump]), JUMP_FACTOR, 1.0)


def layer_matrices(layer: Layer) -> Iterator[Float32]:
    """Yield the logical matrices of one layer, one in memory at a time.

    Fused matrices are split, experts are separate, and matrices outside the paper's components count too.
    """
    return (matrix.rows(slice(None)) for matrix in layer.matrices())


def unchanged(scores: Float64) -> Float64:
    """Return the scores unchanged."""
    return scores


def baseline(measure: Measure, adjust: Callable[[Float64], Float64] = unchanged) -> Metric:
    """Return the metric that computes ``measure``, a function of this module, for each layer, then adjusts all."""

    def metric(model: Model, _se: str, workers: Workers, progress: Progress) -> tuple[LayerScore, ...]:
        n_layers = model.hparams.n_layers
        scores: list[float] = []
        progress(0, n_layers)
        tasks = ((measure, view_layer(model, layer)) for layer in range(n_layers))
        with closing(workers.ordered(_measured, tasks, ahead=FAR_AHEAD, is_large=True)) as measured:
            for _, score in measured:
                scores.append(score)
                progress(len(scores), n_layers)
        return tuple(LayerScore(layer, float(score)) for layer, score in enumerate(adjust(np.array(scores))))

    return metric


def _measured(task: tuple[Measure, Layer]) -> float:
    measure, view = task
    return 0.0 if view.is_empty else measure(layer_matrices(view))
