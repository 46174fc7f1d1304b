"""An estimate of the time that a conversion takes on this machine, from a trial of a fraction of a second.

The trial measures two rates: quantizing one weight with ggml, in each type, and multiplying matrices. The operation
counts below are leading terms; their constants fit measured runs (tools/bench/bench.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..calibration.random_tokens import N_POSITIONS, n_sequences_for
from ..llamacpp import ggml
from ..records import Model

_TRIAL_ROWS, _TRIAL_SIZE = 128, 512
_EIGEN_OPERATIONS = 30.0  # per d^3, in terms of matrix products
_PASS_OPERATIONS = 8  # per weight and token, of a forward and backward pass that recomputes the forward
_GPTQ_FACTOR = 5  # GPTQ over ggml's quantizers
_MEASURED_SHARE = 1 / 8  # of the rows, in every type
_DECODE_EFFICIENCY = 0.5  # share of the matrix product's rate in a forward pass
_GENERATE_EFFICIENCY = 0.3  # the same when generating, a few tokens at a time


@dataclass(frozen=True)
class Work:
    """The work of a conversion.

    Attributes:
        types: types of the file; their mean speed counts.
        n_files: files to write.
        scores: whether layers are scored (at the cost of ``nsds``).
        measures: whether tensors are measured in every type.
        n_tokens: tokens that the perplexity check decodes, over all files and references.
        n_generated_tokens: tokens of calibration text that the model generates.
        n_hessian_tokens: tokens for Hessians; 0 without Hessians.

    """

    types: Sequence[str]
    n_files: int
    scores: bool
    measures: bool
    n_tokens: int = 0
    n_generated_tokens: int = 0
    n_hessian_tokens: int = 0


def estimate_seconds(model: Model, work: Work, n_threads: int) -> float:
    """Return the total seconds of scoring, measuring, writing and verification."""
    n_matrix = sum(tensor.n_weights for tensor in model.tensors if tensor.is_matrix)
    per_weight = sum(_quantize_seconds(name) for name in work.types) / len(work.types) / n_threads
    per_weight *= _GPTQ_FACTOR if work.n_hessian_tokens else 1
    rate = _product_rate()
    seconds = work.n_files * n_matrix * per_weight + 2 * work.n_tokens * n_matrix / (rate * _DECODE_EFFICIENCY)
    if work.scores:
        seconds += score_operations(model) / rate
    if work.measures:
        seconds += n_matrix * _MEASURED_SHARE * per_weight * len(work.types)
        seconds += _PASS_OPERATIONS * n_sequences_for(model) * N_POSITIONS * n_matrix / rate
    if work.n_hessian_tokens:
        n_products = n_matrix + sum(t.n_cols**2 for t in model.tensors if t.is_matrix)
        seconds += work.n_hessian_tokens * 2 * n_products / rate
    return seconds + generation_seconds(model, work.n_generated_tokens, rate)


def generation_seconds(model: Model, n_tokens: int, rate: float | None = None) -> float:
    """Return the seconds in which the model generates tokens and reads them again.

    ``rate`` is in floating-point operations per second; default: measured.
    """
    if not n_tokens:
        return 0.0
    n_matrix = sum(tensor.n_weights for tensor in model.tensors if tensor.is_matrix)
    return 2 * n_tokens * n_matrix / (rate or _product_rate()) * (1 / _GENERATE_EFFICIENCY + 1 / _DECODE_EFFICIENCY)


def duration(seconds: float) -> str:
    """Return a rounded duration as text."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def score_operations(model: Model) -> float:
    """Return roughly the floating-point operations of scoring every layer and the unembedding by NSDS.

    Feed-forward: the Gram matrix of every matrix, experts one by one, and its eigenvectors, on the smaller side.
    Attention: two products of d x d per head, in tiles.
    """
    h = model.hparams
    operations = h.n_embd**2 * h.n_vocab + _EIGEN_OPERATIONS * h.n_embd**3
    for tensor in model.tensors:
        if tensor.layer is not None and tensor.is_matrix and tensor.role.startswith("ffn_"):
            *stacked, n_rows, n_cols = tensor.shape
            small, large = sorted((n_rows, n_cols))
            operations += math.prod(stacked) * (small**2 * large + _EIGEN_OPERATIONS * small**3)
    attention = 2 * h.n_heads * (2 * h.n_embd**2 * h.head_dim)
    return operations + h.n_layers * attention


def _quantize_seconds(type_name: str) -> float:
    """Return the seconds that one thread takes per weight."""
    rows = np.random.default_rng(0).standard_normal((_TRIAL_ROWS, 256), dtype=np.float32)
    ggml.quantize(rows[:1], type_name)  # the first call sets up ggml's tables
    start = time.perf_counter()
    ggml.quantize(rows, type_name)
    return (time.perf_counter() - start) / rows.size


def _product_rate() -> float:
    """Return the floating-point operations per second of a float64 matrix product with numpy's threads."""
    a = np.random.default_rng(0).standard_normal((_TRIAL_SIZE, _TRIAL_SIZE))
    a @ a
    start = time.perf_counter()
    a @ a
    return 2 * _TRIAL_SIZE**3 / (time.perf_counter() - start)
