"""llama-perplexity's statistics in numpy, from the logits of both models, with its 16 bits and its float32 or without.

An implementation of its own, by llama.cpp tools/perplexity/perplexity.cpp (``log_softmax``, ``kl_divergence``): sums
of products where the package centres first, percentiles by hand, and log-probabilities rounded as that program stores
them in its file. ``tools/check/check_perplexity.py`` compares it with what that program prints.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

Logits = NDArray[np.float32]

# The names and order of the package's percentiles; the percentiles that llama-perplexity prints are among them.
FRACTIONS = {
    "0": 0.0, "0.1": 0.001, "1": 0.01, "5": 0.05, "10": 0.1, "25": 0.25, "50": 0.5, "75": 0.75, "90": 0.9, "95": 0.95,
    "99": 0.99, "99.9": 0.999, "100": 1.0,
}  # fmt: skip


def stored_log_probs(logits: Logits) -> tuple[NDArray[np.uint16], Logits, Logits]:
    """Return what ``--kl-divergence-base`` writes of ``(n, n_vocab)`` logits: codes, and ``(n, 1)`` scale and least."""
    largest = logits.max(axis=1, keepdims=True)
    smallest = np.maximum(logits.min(axis=1, keepdims=True), largest - np.float32(16))
    log_sum = np.log(np.exp(logits - largest).sum(axis=1, dtype=np.float64, keepdims=True)).astype(np.float32)
    scale = (largest - smallest) / np.float32(65535)
    codes = np.where(logits > smallest, np.rint((np.float32(1) / scale) * (logits - smallest)), 0)
    return codes.astype(np.uint16), scale, smallest - largest - log_sum


def rounded_scores(logits: Logits, base: Logits, targets: NDArray[np.int32]) -> dict[str, NDArray[np.float64]]:
    """Return nll, that of the base, KL divergence and equal top tokens as llama-perplexity computes them."""
    codes, scale, least = stored_log_probs(base)
    log_p = scale * codes.astype(np.float32) + least
    largest = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - largest).sum(axis=1, dtype=np.float64, keepdims=True)).astype(np.float32)
    terms = np.where(log_p > -16, np.exp(log_p) * (log_p - logits + (largest + log_sum)), np.float32(0))
    rows = np.arange(len(targets))
    return {
        "nll": (largest + log_sum)[:, 0].astype(np.float64) - logits[rows, targets],
        "reference_nll": -log_p[rows, targets].astype(np.float64),
        "kld": terms.sum(axis=1, dtype=np.float64),
        "same_top": (log_p.argmax(axis=1) == logits.argmax(axis=1)).astype(np.float64),
    }


def exact_scores(logits: Logits, base: Logits, targets: NDArray[np.int32]) -> dict[str, NDArray[np.float64]]:
    """Return the same by its definition, in float64."""
    log_q, log_p = (log_softmax(x.astype(np.float64), axis=1) for x in (logits, base))
    rows = np.arange(len(targets))
    return {
        "nll": -log_q[rows, targets],
        "reference_nll": -log_p[rows, targets],
        "kld": (np.exp(log_p) * (log_p - log_q)).sum(axis=1),
        "same_top": (log_p.argmax(axis=1) == log_q.argmax(axis=1)).astype(np.float64),
    }


def statistics(scores: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    """Return what llama-perplexity prints of the scores of all tokens, by the names of the package's fields."""
    nll, base, kld, same = (scores[name] for name in ("nll", "reference_nll", "kld", "same_top"))
    n = len(nll)
    q, q_error = _mean_and_uncertainty(nll.sum(), (nll**2).sum(), n)
    p, p_error = _mean_and_uncertainty(base.sum(), (base**2).sum(), n)
    covariance = ((nll * base).sum() / n - q * p) / (n - 1)
    log_error = math.sqrt(q_error**2 + p_error**2 - 2 * covariance)
    ppl, base_ppl = math.exp(q), math.exp(p)
    difference_error = math.sqrt((ppl * q_error) ** 2 + (base_ppl * p_error) ** 2 - 2 * ppl * base_ppl * covariance)
    delta = np.exp(-nll) - np.exp(-base)
    kld_mean, kld_error = _mean_and_uncertainty(kld.sum(), (kld**2).sum(), n)
    delta_mean, delta_error = _mean_and_uncertainty(delta.sum(), (delta**2).sum(), n)
    square, square_error = _mean_and_uncertainty((delta**2).sum(), (delta**4).sum(), n)
    same_top = same.sum() / n
    return {
        "ppl": ppl,
        "ppl_error": ppl * q_error,
        "reference_ppl": base_ppl,
        "reference_ppl_error": base_ppl * p_error,
        "log_ppl_correlation": covariance / (q_error * p_error),
        "log_ppl_ratio": q - p,
        "log_ppl_ratio_error": log_error,
        "ppl_ratio": math.exp(q - p),
        "ppl_ratio_error": math.exp(q - p) * log_error,
        "ppl_difference": ppl - base_ppl,
        "ppl_difference_error": difference_error,
        "kld_mean": kld_mean,
        "kld_error": kld_error,
        **{f"kld_percentiles.{name}": _percentile(kld, fraction) for name, fraction in FRACTIONS.items()},
        "delta_p_mean": delta_mean,
        "delta_p_error": delta_error,
        "delta_p_rms": math.sqrt(square),
        "delta_p_rms_error": 0.5 / math.sqrt(square) * square_error,
        **{f"delta_p_percentiles.{name}": _percentile(delta, fraction) for name, fraction in FRACTIONS.items()},
        "same_top": same_top,
        "same_top_error": math.sqrt(same_top * (1 - same_top) / (n - 1)),
    }


def flat(found: dict[str, object]) -> dict[str, float]:
    """Return a result of the package, as JSON, by the names that ``statistics`` uses."""
    divergence = found.get("divergence", {})
    assert isinstance(divergence, dict)
    numbers = {name: value for name, value in {**found, **divergence}.items() if isinstance(value, int | float)}
    for name in ("kld_percentiles", "delta_p_percentiles"):
        numbers |= {f"{name}.{key}": value for key, value in divergence.get(name, {}).items()}
    return numbers


def _mean_and_uncertainty(total: float, total_of_squares: float, n: int) -> tuple[float, float]:
    mean = total / n
    return float(mean), math.sqrt((total_of_squares / n - mean * mean) / (n - 1))


def _percentile(values: NDArray[np.float64], fraction: float) -> float:
    ordered = np.sort(values)
    index, part = divmod(fraction * (len(ordered) - 1), 1)
    low, high = ordered[int(index)], ordered[min(int(index) + 1, len(ordered) - 1)]
    return float((1 - part) * low + part * high)
