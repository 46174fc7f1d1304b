"""An estimate of the time that a conversion takes on this machine, from a trial of a fraction of a second.

The trial measures two rates: rounding one weight, in each type, and multiplying float32 matrices. The operation counts
below are leading terms; their constants fit runs of tools/bench/bench_stages.py (docs/log.md, 2026-11-28).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..calibration.generated_text import LENGTH
from ..calibration.hessians import multiplied
from ..calibration.kinds import N_SEQUENCES_GENERATED
from ..calibration.random_tokens import N_POSITIONS, n_sequences_for
from ..llamacpp import ggml
from ..quantize.formats import FORMATS
from ..quantize.gain_tuning import N_EPOCHS
from ..quantize.hessian_factors import HessianFactors
from ..quantize.kernel import round_rows
from ..quantize.measure import sample_rows
from ..quantize.rtn import RtnQuantizer
from ..records import Model
from ..system.resources import blas_threads

_TRIAL_ROWS, _TRIAL_COLS, _TRIAL_SIZE, _N_TRIALS = 64, 512, 768, 5
_EIGEN_OPERATIONS = 30.0  # per d^3, in terms of matrix products
_BACKWARD_OPERATIONS = 6  # per weight and token: the layer again, and the derivatives by inputs and weights
_HEAD_OPERATIONS = 4  # per weight and token of which half are scored: logits twice, and both derivatives
_PASS_EFFICIENCY = 0.85  # share of the matrix product's rate in the products of the pass over tokens
# In units of operations of a product: a channel of the stream and a hidden unit of a token, in a layer forward.
_CHANNEL_OPERATIONS, _HIDDEN_OPERATIONS, _BACK = 4500, 2250, 3
_GENERATE_EFFICIENCY, _DECODE_EFFICIENCY = 0.95, 0.72  # the same shares when llama.cpp generates and reads
_STEP_OPERATIONS, _DRAW_OPERATIONS = 7e6, 340  # per token and layer, per token and entry of the vocabulary
_FLOAT64_SLOWER = 2.0
_FACTOR_SECONDS = 28e-9  # per entry of a Hessian: reading, scaling, checking, writing
_READ_SECONDS = 6e-9  # per weight and thread
_RESAMPLED = 2.0  # rows that are measured over those of the first sample
_LOAD_SECONDS = 0.3  # to start a process that verifies


@dataclass(frozen=True)
class Work:
    """The work of a conversion.

    Attributes:
        types: types of the file; their mean speed counts.
        n_files: files to write.
        scores: whether layers are scored (at the cost of ``nsds``).
        measures: whether tensors are measured in every type.
        passes: whether a pass over tokens finds sensitivities.
        n_tokens: tokens that the perplexity check decodes, over all files and references.
        n_generated_tokens: tokens of calibration text that the model generates.
        n_hessian_tokens: tokens for Hessians; 0 without Hessians.
        n_tuning_tokens: tokens on which gains of norms are tuned in each file.

    """

    types: Sequence[str]
    n_files: int
    scores: bool
    measures: bool
    passes: bool
    n_tokens: int = 0
    n_generated_tokens: int = 0
    n_hessian_tokens: int = 0
    n_tuning_tokens: int = 0


# Names of the stages that take time, in the order in which they run; a stage's name starts with one of them.
SCORE, GENERATE, SENSITIVITIES, FACTOR, MEASURE, WRITE, TUNE, VERIFY = (
    "score layers", "generate text", "find sensitivities", "factor Hessians", "measure tensors", "quantize and write",
    "tune norm gains", "verify perplexity",
)  # fmt: skip


def estimate_stages(model: Model, work: Work, n_threads: int) -> list[tuple[str, float]]:
    """Return the name and the seconds of each stage, in order; files are written and verified one by one."""
    n_matrix = sum(tensor.n_weights for tensor in model.tensors if tensor.is_matrix)
    rate, is_gptq = product_rate(n_threads), bool(work.n_hessian_tokens)
    per_weight = sum(_rounding_seconds(model, name, is_gptq, rate / n_threads) for name in work.types)
    per_weight /= len(work.types) * n_threads
    stages = [(SCORE, score_operations(model) / rate)] if work.scores else []
    if work.n_generated_tokens:
        stages.append((GENERATE, generation_seconds(model, work.n_generated_tokens, n_threads, rate)))
    if work.passes:
        stages.append((SENSITIVITIES, _pass_seconds(model, work, rate)))
    if is_gptq:
        stages.append((FACTOR, _factor_seconds(model, rate)))
    if work.measures:
        stages.append((MEASURE, _RESAMPLED * _n_measured(model) * per_weight * len(work.types)))
    verifying = work.n_tokens / max(work.n_files, 1) * 2 * n_matrix / (rate * _DECODE_EFFICIENCY) + _LOAD_SECONDS
    for _ in range(work.n_files):
        stages.append((WRITE, n_matrix * (per_weight + _READ_SECONDS / n_threads)))
        if work.n_tuning_tokens:
            stages.append((TUNE, tuning_operations(model, work.n_tuning_tokens) / (rate * _PASS_EFFICIENCY)))
        if work.n_tokens:
            stages.append((VERIFY, verifying))
    return stages


def _pass_seconds(model: Model, work: Work, rate: float) -> float:
    h = model.hparams
    n_scored = N_SEQUENCES_GENERATED * LENGTH if work.n_generated_tokens else n_sequences_for(model) * N_POSITIONS
    n_tokens = work.n_hessian_tokens or n_scored
    products = pass_operations(model, n_tokens, n_scored)
    products += work.n_hessian_tokens * sum(n**2 for n in input_widths(model)) if work.n_hessian_tokens else 0
    elementwise = _CHANNEL_OPERATIONS * h.n_embd + _HIDDEN_OPERATIONS * h.n_ff
    return (products / _PASS_EFFICIENCY + (n_tokens + _BACK * n_scored) * h.n_layers * elementwise) / rate


def _factor_seconds(model: Model, rate: float) -> float:
    widths = input_widths(model)
    return _FLOAT64_SLOWER * sum(n**3 for n in widths) / 3 / rate + _FACTOR_SECONDS * sum(n**2 for n in widths)


def _n_measured(model: Model) -> int:
    """Return the weights that are measured: those of the first sample."""
    matrices = [tensor for tensor in model.tensors if tensor.is_matrix]
    return sum(len(sample_rows(tensor)) * tensor.n_cols for tensor in matrices)


def generation_seconds(model: Model, n_tokens: int, n_threads: int, rate: float | None = None) -> float:
    """Return the seconds in which the model generates tokens.

    ``rate`` is in floating-point operations per second; default: measured.
    """
    if not n_tokens:
        return 0.0
    h, n_matrix = model.hparams, sum(tensor.n_weights for tensor in model.tensors if tensor.is_matrix)
    operations = 2 * n_matrix / _GENERATE_EFFICIENCY + _STEP_OPERATIONS * h.n_layers + _DRAW_OPERATIONS * h.n_vocab
    return n_tokens * operations / (rate or product_rate(n_threads))


def duration(seconds: float) -> str:
    """Return a rounded duration as text."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def pass_operations(model: Model, n_tokens: int, n_scored: int) -> float:
    """Return the operations of the pass over tokens: all forward through the layers, some backward and at the head."""
    n_layers = sum(tensor.n_weights for tensor in model.tensors if tensor.layer is not None and tensor.is_matrix)
    n_head = model.unembedding().n_weights
    return (2 * n_tokens + _BACKWARD_OPERATIONS * n_scored) * n_layers + _HEAD_OPERATIONS * n_scored * n_head


def tuning_operations(model: Model, n_tokens: int) -> float:
    """Return the operations of tuning gains on tokens: the original once, and in every epoch a step of Adam.

    A step takes the layers forward, again, and back, and the output matrices of both models, of one also back.
    """
    n_layers = sum(tensor.n_weights for tensor in model.tensors if tensor.layer is not None and tensor.is_matrix)
    return 2 * n_tokens * ((1 + 3 * N_EPOCHS) * n_layers + 3 * N_EPOCHS * model.unembedding().n_weights)


def input_widths(model: Model) -> list[int]:
    """Return the columns of every input that has a Hessian, as most architectures share them."""
    shared = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}
    tensors = [model.by_name[name] for name in multiplied(model)]
    found = {(tensor.layer, shared.get(tensor.role, tensor.role)): tensor.n_cols for tensor in tensors}
    return list(found.values())


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


def _rounding_seconds(model: Model, type_name: str, is_gptq: bool, rate: float) -> float:
    """Return the seconds that one thread takes per weight; ``rate`` is that of products on one thread."""
    rows = np.random.default_rng(0).standard_normal((_TRIAL_ROWS, _TRIAL_COLS), dtype=np.float32)
    ones = np.ones(_TRIAL_COLS, np.float32)
    if not is_gptq or type_name not in FORMATS:
        ggml.quantize(rows[:1], type_name)  # the first call sets up ggml's tables
        return _seconds(lambda: RtnQuantizer(ones, _TRIAL_ROWS).quantize(rows, type_name)) / rows.size
    factors = HessianFactors(np.eye(_TRIAL_COLS, dtype=np.float32), ones, ones, np.arange(_TRIAL_COLS))
    n_weights = max(1, sum(model.by_name[name].n_weights for name in multiplied(model)))
    n_cols = sum(model.by_name[name].n_weights * model.by_name[name].n_cols for name in multiplied(model)) / n_weights
    trial = _seconds(lambda: round_rows(rows, type_name, factors, 1)) / rows.size
    return trial + max(0.0, n_cols - _TRIAL_COLS) / rate  # the columns to the left of a block


def product_rate(n_threads: int) -> float:
    """Return the operations per second of float32 matrix products, one on each thread as in the pass over tokens."""
    a = np.random.default_rng(0).standard_normal((_TRIAL_SIZE, _TRIAL_SIZE), dtype=np.float32)
    with blas_threads(1), ThreadPoolExecutor(n_threads) as pool:
        least = _seconds(lambda: list(pool.map(lambda _: a @ a, range(n_threads))))
    return 2 * n_threads * _TRIAL_SIZE**3 / least


def _seconds(function: Callable[[], object]) -> float:
    """Return the least seconds of some calls."""
    times = []
    for _ in range(_N_TRIALS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
