"""From logits to scores of tokens, and from scores to the statistics of a text. Nothing here runs a model.

A token is scored by the logits of the position before it, those of the file ``x_q`` and, where there is one, of the
reference ``x_p``, with ``p = softmax(x_p)`` and ``q = softmax(x_q)`` over the vocabulary::

    nll = -log q(token)    kld = sum_v p(v) log(p(v) / q(v))    Δp = q(token) - p(token)

The statistics are those of llama.cpp tools/perplexity/perplexity.cpp, ``kl_divergence``, from exact values: llama.cpp
stores the reference as 16-bit log-probabilities and drops those below -16, while this module sums over the whole
vocabulary in float64. Errors are standard errors of the mean over tokens, propagated to first order; logarithms are
natural.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..records import Float32, Float64

Int32 = NDArray[np.int32]

# The score of a token; without a reference only ``nll`` is filled.
TOKEN_SCORE = np.dtype([("nll", "f8"), ("reference_nll", "f8"), ("kld", "f8"), ("same_top", "?")])
TokenScores = NDArray[np.void]

# The percentiles that llama-perplexity prints for the divergence and Δp.
PERCENTILES = (0, 0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)

# Logits per step of a thread: 256 KiB as float64, which fits its cache.
_SLAB_LOGITS = 2**15


@dataclass(frozen=True)
class Divergence:
    """How a file differs from its reference over the same tokens.

    Attributes:
        reference_ppl: perplexity of the reference.
        reference_ppl_error: its standard error.
        ppl_ratio: perplexity over that of the reference.
        ppl_ratio_error: its standard error, from differences per token, like the next two.
        log_ppl_ratio: logarithm of the ratio.
        log_ppl_ratio_error: its standard error.
        ppl_difference: perplexity minus that of the reference.
        ppl_difference_error: its standard error.
        log_ppl_correlation: correlation of both models' ``nll``, in [-1, 1]; ``None`` where one is constant.
        kld_mean: mean KL divergence of the file from the reference, in nats per token.
        kld_error: its standard error.
        kld_percentiles: its ``PERCENTILES`` over the tokens, keyed "0" (the least), "0.1", ..., "100" (the largest).
        delta_p_mean: mean Δp, the change in the probability of the text's next token, in [-1, 1].
        delta_p_error: its standard error.
        delta_p_rms: root of the mean square of Δp.
        delta_p_rms_error: its standard error.
        delta_p_percentiles: percentiles of Δp, keyed like those of the divergence.
        same_top: fraction of the positions at which both have the same most likely token.
        same_top_error: its standard error.

    """

    reference_ppl: float
    reference_ppl_error: float
    ppl_ratio: float
    ppl_ratio_error: float
    log_ppl_ratio: float
    log_ppl_ratio_error: float
    ppl_difference: float
    ppl_difference_error: float
    log_ppl_correlation: float | None
    kld_mean: float
    kld_error: float
    kld_percentiles: dict[str, float]
    delta_p_mean: float
    delta_p_error: float
    delta_p_rms: float
    delta_p_rms_error: float
    delta_p_percentiles: dict[str, float]
    same_top: float
    same_top_error: float


def score_rows(scores: TokenScores, logits: Sequence[Float32], targets: Int32) -> None:
    """Fill the scores of tokens from logits of the file, or of the file and the reference.

    Args:
        scores: ``(n,)`` of ``TOKEN_SCORE``, filled in; NaN or infinite where logits are.
        logits: one or two ``(n, n_vocab)`` float32.
        targets: ``(n,)`` int32, the token after each row.

    """
    n, n_vocab = logits[0].shape
    step = min(n, max(1, _SLAB_LOGITS // n_vocab))
    dtype = np.float32 if len(logits) == 1 else np.float64
    work = np.empty((2 * len(logits), step, n_vocab), dtype=dtype)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        slab = [x[rows] for x in logits]
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are for the caller to find
            if len(slab) == 1:
                scores["nll"][rows] = _nll(slab[0], targets[rows], work[:, : len(slab[0])])
            else:
                _score_pair(scores[rows], slab[0], slab[1], targets[rows], work[:, : len(slab[0])])


def perplexity_and_error(nll: Float64) -> tuple[float, float]:
    """Return the perplexity of tokens with these ``(n,)`` negative log-likelihoods, and its standard error."""
    mean, error = _mean_and_error(nll)
    ppl = _exp(mean)
    return ppl, ppl * error


def divergence(scores: TokenScores) -> Divergence:
    """Return the statistics of ``(n,)`` scores made with a reference; ``n`` is at least 2."""
    nll, reference_nll = scores["nll"], scores["reference_nll"]
    reference_ppl, reference_ppl_error = perplexity_and_error(reference_nll)
    log_ratio, log_ratio_error = _mean_and_error(nll - reference_nll)
    difference, difference_error = _difference_and_error(nll, reference_nll)
    kld_mean, kld_error = _mean_and_error(scores["kld"])
    delta_p = np.exp(-nll) - np.exp(-reference_nll)
    delta_p_mean, delta_p_error = _mean_and_error(delta_p)
    delta_p_rms, delta_p_rms_error = _rms_and_error(delta_p)
    same_top, same_top_error = _mean_and_error(scores["same_top"].astype(np.float64))
    return Divergence(
        reference_ppl=reference_ppl,
        reference_ppl_error=reference_ppl_error,
        ppl_ratio=_exp(log_ratio),
        ppl_ratio_error=_exp(log_ratio) * log_ratio_error,
        log_ppl_ratio=log_ratio,
        log_ppl_ratio_error=log_ratio_error,
        ppl_difference=difference,
        ppl_difference_error=difference_error,
        log_ppl_correlation=_correlation(nll, reference_nll),
        kld_mean=kld_mean,
        kld_error=kld_error,
        kld_percentiles=_percentiles(scores["kld"]),
        delta_p_mean=delta_p_mean,
        delta_p_error=delta_p_error,
        delta_p_rms=delta_p_rms,
        delta_p_rms_error=delta_p_rms_error,
        delta_p_percentiles=_percentiles(delta_p),
        same_top=same_top,
        same_top_error=same_top_error,
    )


def _score_pair(scores: TokenScores, logits: Float32, reference: Float32, targets: Int32, work: Float64) -> None:
    """Fill the scores of a slab of both models; ``work`` is ``(4, n, n_vocab)`` float64."""
    scores["nll"] = nll = _nll(logits, targets, work[:2])
    scores["reference_nll"] = reference_nll = _nll(reference, targets, work[2:])
    rows = np.arange(len(targets))
    # log p - log q = (x_p - x_q) - (log Z_p - log Z_q), x the shifted logits; log Z = nll + x[target].
    log_z, reference_log_z = nll + work[0][rows, targets], reference_nll + work[2][rows, targets]
    np.subtract(work[2], work[0], out=work[0])
    scores["kld"] = np.einsum("nv,nv->n", work[3], work[0]) / np.exp(reference_log_z) + log_z - reference_log_z
    scores["same_top"] = logits.argmax(axis=1) == reference.argmax(axis=1)


def _nll(logits: Float32, targets: Int32, work: NDArray[np.floating[Any]]) -> Float64:
    """Return ``-log softmax(logits)[target]`` of each row, ``(n,)`` float64.

    Args:
        logits: ``(n, n_vocab)`` float32.
        targets: ``(n,)`` int32.
        work: ``(2, n, n_vocab)`` float32 or float64 workspace; on return it holds the logits minus their maximum,
            and the exponentials of those.

    """
    shifted, powers = work
    np.subtract(logits, logits.max(axis=1, keepdims=True), out=shifted, dtype=shifted.dtype)
    np.exp(shifted, out=powers)
    log_z = np.log(powers.sum(axis=1, dtype=np.float64))
    nll: Float64 = log_z - shifted[np.arange(len(targets)), targets]
    return nll


def _mean_and_error(values: Float64) -> tuple[float, float]:
    """Return the mean and its standard error, ``sqrt((E[x^2] - E[x]^2) / (n - 1))``, as in llama-perplexity."""
    return float(values.mean()), math.sqrt(float(values.var()) / (values.size - 1))


def _difference_and_error(nll: Float64, reference_nll: Float64) -> tuple[float, float]:
    """Return the difference of two perplexities and its error.

    ``sqrt(e_q^2 + e_p^2 - 2 PPL_q PPL_p cov)`` of llama-perplexity is the error of the mean of
    ``PPL_q nll_q - PPL_p nll_p``.
    """
    ppl, reference_ppl = _exp(float(nll.mean())), _exp(float(reference_nll.mean()))
    if not math.isfinite(ppl + reference_ppl):
        return math.inf, math.inf
    return ppl - reference_ppl, _mean_and_error(ppl * nll - reference_ppl * reference_nll)[1]


def _correlation(a: Float64, b: Float64) -> float | None:
    """Return Pearson's correlation, ``None`` where either is constant."""
    norm = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean()) / norm if norm else None


def _rms_and_error(values: Float64) -> tuple[float, float]:
    """Return the root mean square and its standard error."""
    mean_square, error = _mean_and_error(values**2)
    rms = math.sqrt(mean_square)
    return rms, error / (2 * rms) if rms else 0.0


def _percentiles(values: Float64) -> dict[str, float]:
    return dict(zip(map(str, PERCENTILES), np.percentile(values, PERCENTILES).tolist(), strict=True))


def _exp(x: float) -> float:
    """Return ``exp(x)``, or infinity on overflow."""
    return math.exp(x) if x < math.log(np.finfo(np.float64).max) else math.inf
