"""Figures from measurements: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from nsds_gguf.quantize.measure import ratio_estimate


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of chunks and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def paired_ratio(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return the ratio of two means over the same chunks and its standard error, from the chunks' differences."""
    estimate = ratio_estimate(np.asarray(ours, dtype=np.float64), np.asarray(others, dtype=np.float64))
    return estimate.ratio, estimate.stderr


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive numbers."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def log_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Pearson's correlation of logarithms; ``None`` for fewer than three pairs or where one does not vary."""
    return _correlation(stats.pearsonr, np.log(a), np.log(b))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Spearman's correlation; ``None`` for fewer than three pairs or where one does not vary."""
    return _correlation(stats.spearmanr, np.asarray(a), np.asarray(b))


def _correlation(function, a, b) -> float | None:  # type: ignore[no-untyped-def]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(function(a, b).statistic)
