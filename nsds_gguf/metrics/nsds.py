"""NSDS: how sensitive each layer is to quantization, from the weights alone (arXiv 2603.17354).

A layer has components that read the residual stream (detectors: QK, gate, up) and components that write to it
(writers: OV, down). Each gets a numerical vulnerability NV, the kurtosis of its matrix, and a structural
expressiveness SE, its singular values weighted by a property of their vectors. Both are standardized robustly across
layers and combined into one score.

The results equal those of full singular value decompositions, at a fraction of the cost. Attention products have
rank ``head_dim`` at most and are decomposed through their factors; an FFN matrix needs its vectors on the residual
side only, which are the eigenvectors of a Gram matrix. Decompositions run in float64: squaring in float32 mixes
vectors whose singular values are below about a tenth of the largest, and trained FFN matrices have many of
those. Only the products of full size (``stats.product_kurtosis``, guarded by a rule) and projections of unit vectors
(``writer_weight``, always safe) use float32.

Names: ``d`` is the width of the residual stream; ``u`` and ``v`` hold left and right singular vectors as columns.
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from scipy import linalg

from ..compute.layers import Attention, FeedForward, Layer, view_layer
from ..records import Float32, Float64, LayerScore, Model, Progress, Tensor
from ..system.resources import blas_threads, n_blas_threads
from ..system.workers import FAR_AHEAD, Workers
from .stats import (
    Matrix,
    column_kurtosis,
    entropy,
    matrix_kurtosis,
    product_kurtosis,
    robust_z,
    row_tiles,
    sigmoid,
    soft_or,
    sum_of_fourth_powers,
)

FFN_COMPONENTS = ("gate", "up", "down")

# Matrices outside the paper's components (latent attention, recurrence, ...): NV alone.
REST = "rest"

COMPONENTS = ("qk", "ov", *FFN_COMPONENTS, REST)

# Share of sum(sigma**2) in the retained singular triplets (the paper's 99 %).
RETAINED_SHARE = 0.99

# Minimum number of retained triplets per component.
MIN_TRIPLETS = 2

# Entries of a slab added to a Gram matrix at once: 16 MiB in float64, so that the multiplication outweighs reading and
# writing the d x d sum.
GRAM_ENTRIES = 2**21

SLAB_BYTES = 16 << 20  # float32 rows of the unembedding per read

# Ratio of the largest to the smallest diagonal entry of R up to which Cholesky-QR is used: a factor 100 below the
# condition number at which it loses digits.
MAX_CHOLESKY_CONDITION = 1e6

MAX_SHOWN_ROLES = 4  # in the note on matrices outside the components

# Combines spectral magnitude M and spectral entropy E (nats) into SE.
Reading = Callable[[float, float], float]

# Weight of each singular value from the vectors (u, v): (d, k), (d, k) -> (k,).
HeadWeight = Callable[[Float64, Float64], Float64]

# Weight of each singular value from the vectors on the residual side: (d, k) -> (k,).
FfnWeight = Callable[[Float64], Float64]


# --- the formulas ---------------------------------------------------------------------------------------------


def se_ratio(magnitude: float, entropy_nats: float) -> float:
    """Return ``M / exp(E)``: spectral magnitude over effective rank, as in the authors' released code."""
    return magnitude / math.exp(entropy_nats)


def se_product(magnitude: float, entropy_nats: float) -> float:
    """Return ``M * exp(E)``: spectral magnitude times effective rank, a reading of the paper's text."""
    return magnitude * math.exp(entropy_nats)


def n_leading(sigma: Float64, at_least: int) -> int:
    """Return how many of the singular values (n,), largest first, hold 99 % of the squared norm ``sum(sigma**2)``."""
    squared_norms = np.cumsum(sigma**2)
    n_retained = int(np.searchsorted(squared_norms, RETAINED_SHARE * squared_norms[-1])) + 1
    return min(max(n_retained, at_least), len(sigma))


def detector_ffn_weight(v: Float64) -> Float64:
    """Return ``ln(1 + relu(kurt(v_i)))`` for the right singular vectors ``v`` (d, k): float64 (k,)."""
    weight: Float64 = np.log1p(np.maximum(column_kurtosis(v), 0.0))
    return weight


def detector_qk_weight(u: Float64, v: Float64) -> Float64:
    """Return ``ln(1 + relu(kurt(u_i)) * relu(kurt(v_i)))`` for singular vectors (d, k): float64 (k,)."""
    weight: Float64 = np.log1p(np.maximum(column_kurtosis(u), 0.0) * np.maximum(column_kurtosis(v), 0.0))
    return weight


def writer_weight(u: Float64, projection: Float32) -> Float64:
    """Return ``|| P^T u_i ||`` for the left singular vectors ``u`` (d, k) and ``projection`` P (d, r): float64 (k,).

    The columns of both are unit vectors, so float32 leaves an error of about 1e-7 of the largest possible weight.
    """
    weight: Float64 = np.linalg.norm(projection.T @ u.astype(np.float32), axis=0).astype(np.float64)
    return weight


def spectral_magnitude(sigma: Float64, weight: Float64) -> float:
    """Return ``M = sum(s_i)`` of the weighted singular values ``s_i = sigma_i * beta_i``, both (k,)."""
    return float((sigma * weight).sum())


def spectral_entropy(sigma: Float64, weight: Float64) -> float:
    """Return ``E = -sum(p_i ln p_i)`` in nats, ``p_i = s_i / M``; 0 when every weighted singular value is 0."""
    magnitude = spectral_magnitude(sigma, weight)
    return entropy(sigma * weight / magnitude) if magnitude > 0.0 else 0.0


def structural_expressiveness(sigma: Float64, weight: Float64, reading: Reading) -> float:
    """Return SE of a component from its singular values and their weights, both (k,)."""
    return reading(spectral_magnitude(sigma, weight), spectral_entropy(sigma, weight))


# The two readings of SE by name. The product follows measured sensitivities of layers better (docs/log.md, 2026-11-26).
SE_READINGS: dict[str, Reading] = {"ratio": se_ratio, "product": se_product}


# --- decompositions -------------------------------------------------------------------------------------------


def residual_gram(slabs: Iterable[Float64], d: int) -> Float64:
    """Return ``W^T W`` of the matrix whose rows come in ``slabs`` (n, d): float64 (d, d), upper triangle only."""
    gram = np.zeros((d, d), order="F")
    for slab in slabs:
        gram = linalg.blas.dsyrk(1.0, slab.T, beta=1.0, c=gram, overwrite_c=True)
    return gram


def symmetric_eigen(gram: Float64) -> tuple[Float64, Float64]:
    """Return eigenvalues, ascending, and eigenvectors, columns, of a symmetric matrix given by its upper triangle."""
    eigenvalues, vectors = linalg.eigh(gram, lower=False, overwrite_a=True, check_finite=False, driver="evd")
    return eigenvalues, vectors


@dataclass(frozen=True)
class Algebra:
    """The heavy parts of NSDS: by LAPACK and BLAS, or elsewhere.

    Attributes:
        gram: see ``residual_gram``.
        eigh: see ``symmetric_eigen``.
        fourth_powers: see ``stats.sum_of_fourth_powers``.
    """

    gram: Callable[[Iterable[Float64], int], Float64] = residual_gram
    eigh: Callable[[Float64], tuple[Float64, Float64]] = symmetric_eigen
    fourth_powers: Callable[[Matrix, Matrix], float] = sum_of_fourth_powers


CPU = Algebra()


def algebra_on(torch_device: str) -> Algebra:
    """Return the algebra of a PyTorch device, ``CPU`` for an empty name."""
    if not torch_device:
        return CPU
    from .nsds_torch import TorchAlgebra

    there = TorchAlgebra(torch_device)
    return Algebra(there.gram, there.eigh, there.fourth_powers)


def right_vectors(gram: Float64, at_least: int = MIN_TRIPLETS, algebra: Algebra = CPU) -> tuple[Float64, Float64]:
    """Return the leading singular values and right singular vectors of the matrix with this Gram matrix.

    Args:
        gram: upper triangle of ``W^T W``, float64 (d, d); overwritten.
        at_least: minimum number of triplets to retain.
        algebra: what computes it.

    Returns:
        Singular values (k,), largest first, and vectors (d, k).
    """
    eigenvalues, vectors = algebra.eigh(gram)
    sigma = np.sqrt(np.maximum(eigenvalues[::-1], 0.0))
    n_retained = n_leading(sigma, at_least)
    return sigma[:n_retained], vectors[:, ::-1][:, :n_retained]


@dataclass(frozen=True)
class Head:
    """One head's product ``left @ right`` (d, d) through its factors, and its leading singular triplets.

    Attributes:
        left: float32 (d, head_dim).
        right: float32 (head_dim, d).
        squared_norm: ``sum(sigma**2)`` over all singular values.
        sigma: the leading singular values, largest first: (k,).
        u: left singular vectors (d, k).
        v: right singular vectors (d, k).
    """

    left: Float32
    right: Float32
    squared_norm: float
    sigma: Float64
    u: Float64
    v: Float64


def decompose_head(left: Float32, right: Float32, right_factors: tuple[Float64, Float64]) -> Head:
    """Decompose a product of rank ``head_dim``: thin QR of both factors, then an SVD of the small core.

    Args:
        left: (d, head_dim).
        right: (head_dim, d).
        right_factors: ``thin_qr(right.T)``, shared by the heads of a group.
    """
    q_left, r_left = thin_qr(left)
    q_right, r_right = right_factors
    core_u, sigma, core_vt = linalg.svd(r_left @ r_right.T, full_matrices=False, check_finite=False)
    k = n_leading(sigma, MIN_TRIPLETS)
    return Head(left, right, float((sigma**2).sum()), sigma[:k], q_left @ core_u[:, :k], q_right @ core_vt[:k].T)


def thin_qr(matrix: Float32) -> tuple[Float64, Float64]:
    """Return thin QR factors of ``matrix`` (n, m) in float64: (n, min(n, m)) and (min(n, m), m).

    Cholesky-QR, twice: as accurate as Householder's up to a condition number of about 1e8 (Yamamoto et al. 2015,
    CholeskyQR2) and an order of magnitude faster for tall matrices. Beyond ``MAX_CHOLESKY_CONDITION``, and where the
    matrix is not tall or not of full rank, LAPACK's QR.
    """
    a = matrix.astype(np.float64)
    try:
        q, first = _cholesky_qr(a)
        diagonal = np.abs(np.diagonal(first))
        if a.shape[0] >= a.shape[1] and diagonal.min() * MAX_CHOLESKY_CONDITION > diagonal.max():
            q, second = _cholesky_qr(q)
            return q, second @ first
    except linalg.LinAlgError:
        pass  # rank-deficient: the general way below
    q, r = linalg.qr(a, mode="economic", overwrite_a=True, check_finite=False)
    return q, r


def _cholesky_qr(a: Float64) -> tuple[Float64, Float64]:
    r = linalg.cholesky(a.T @ a, check_finite=False)
    q: Float64 = linalg.solve_triangular(r, a.T, trans="T", check_finite=False).T
    return q, r


def output_projection(model: Model, algebra: Algebra = CPU) -> Float32:
    """Return P, float32 (d, r): the leading right singular vectors of the unembedding, with 99 % of its squared norm.

    Without an unembedding of the stream's width, return the identity: all directions count equally.
    """
    return _projection(_unembedding(model), algebra)


def _unembedding(model: Model) -> Tensor | int:
    """Return the unembedding, or the stream's width if no tensor has that many columns."""
    found = model.by_name.get("output.weight") or model.by_name.get("token_embd.weight")
    return model.hparams.n_embd if found is None or found.n_cols != model.hparams.n_embd else found


def _projection(unembedding: Tensor | int, algebra: Algebra) -> Float32:
    if isinstance(unembedding, int):
        return np.eye(unembedding, dtype=np.float32)
    gram = algebra.gram((slab.astype(np.float64) for _, slab in unembedding.slabs(SLAB_BYTES)), unembedding.n_cols)
    return right_vectors(gram, 1, algebra)[1].astype(np.float32)


# --- components -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sensitivity:
    """Raw numerical vulnerability and structural expressiveness of one component of one layer."""

    nv: float
    se: float


def attention_component(
    lefts: Float32, rights: Float32, weight: HeadWeight, reading: Reading, algebra: Algebra = CPU
) -> Sensitivity:
    """Return NV and SE of QK or OV: the means over the heads.

    Heads run in parallel, each with one BLAS thread: their matrices are too small for more.

    Args:
        lefts: (n_heads, d, head_dim).
        rights: (n_kv_heads, head_dim, d); head h uses ``h // (n_heads // n_kv_heads)``, factored once per group.
        weight: returns the weight of each singular value from its vectors.
        reading: of structural expressiveness.
        algebra: what computes the products of full size.
    """
    n_per_group = len(lefts) // len(rights)
    n_threads = n_blas_threads()

    def of_head(index: int) -> Sensitivity:
        group = index // n_per_group
        head = decompose_head(lefts[index], rights[group], right_factors[group])
        se = structural_expressiveness(head.sigma, weight(head.u, head.v), reading)
        return Sensitivity(product_kurtosis(head.left, head.right, head.squared_norm, algebra.fourth_powers), se)

    with blas_threads(1), ThreadPoolExecutor(n_threads) as pool:
        right_factors = list(pool.map(thin_qr, [right.T for right in rights]))
        found = list(pool.map(of_head, range(len(lefts))))
    return Sensitivity(float(np.mean([head.nv for head in found])), float(np.mean([head.se for head in found])))


def qk_component(attention: Attention, reading: Reading, algebra: Algebra = CPU) -> Sensitivity:
    """Return NV and SE of ``W_Q[h]^T @ W_K[g(h)]``, a detector on both sides.

    GGUF permutes the rows of q and k within each head in the same way, which a sum over those rows does not see.
    """
    q = attention.q.weight.rows(slice(None)).reshape(attention.n_heads, attention.head_dim, -1)
    k = attention.k.weight.rows(slice(None)).reshape(attention.n_kv_heads, attention.head_dim, -1)
    return attention_component(q.transpose(0, 2, 1), k, detector_qk_weight, reading, algebra)


def ov_component(attention: Attention, projection: Float32, reading: Reading, algebra: Algebra = CPU) -> Sensitivity:
    """Return NV and SE of ``W_O[:, h] @ W_V[g(h)]``, a writer."""
    o = attention.o.weight.rows(slice(None)).reshape(-1, attention.n_heads, attention.value_dim)
    v = attention.v.weight.rows(slice(None)).reshape(attention.n_kv_heads, attention.value_dim, -1)
    return attention_component(o.transpose(1, 0, 2), v, lambda u, _: writer_weight(u, projection), reading, algebra)


def ffn_component(matrix: Float32, weight: FfnWeight, reading: Reading, algebra: Algebra = CPU) -> Sensitivity:
    """Return NV and SE of an FFN ``matrix`` (n_ff, d), the residual stream last.

    A matrix with ``n_ff < d``, such as an expert's, is decomposed from its other side, which is smaller: ``v_i = W^T
    u_i / sigma_i``.
    """
    if matrix.shape[0] >= matrix.shape[1]:
        gram = algebra.gram(row_tiles(matrix, GRAM_ENTRIES), matrix.shape[1])
        sigma, vectors = right_vectors(gram, algebra=algebra)
    else:
        gram = algebra.gram(row_tiles(matrix.T, GRAM_ENTRIES), matrix.shape[0])
        sigma, left = right_vectors(gram, algebra=algebra)
        images = matrix.T.astype(np.float64) @ left
        vectors = np.divide(images, sigma, out=np.zeros_like(images), where=sigma > 0)
    return Sensitivity(matrix_kurtosis(matrix), structural_expressiveness(sigma, weight(vectors), reading))


def ffn_components(
    block: FeedForward, projection: Float32, reading: Reading, algebra: Algebra = CPU
) -> dict[str, Sensitivity]:
    """Return NV and SE of the gate, up and down matrices of one feed-forward block or expert."""
    components = {}
    for name, part in (("gate", block.gate), ("up", block.up)):
        if part is not None:
            components[name] = ffn_component(part.weight.rows(slice(None)), detector_ffn_weight, reading, algebra)
    down = block.down.weight.rows(slice(None))
    components["down"] = ffn_component(down.T, lambda u: writer_weight(u, projection), reading, algebra)
    return components


def layer_components(
    layer: Layer, projection: Float32, reading: Reading, algebra: Algebra = CPU
) -> dict[str, Sensitivity]:
    """Return NV and SE of every component of the layer, by component; biases and gains do not count.

    Experts are averaged; a shared expert counts as one more. Matrices outside the components have no SE (which of
    their sides is the stream is unknown): NaN.
    """
    components = {}
    if layer.attention is not None:
        components["qk"] = qk_component(layer.attention, reading, algebra)
        components["ov"] = ov_component(layer.attention, projection, reading, algebra)
    experts = [ffn_components(block, projection, reading, algebra) for block in layer.feed_forward]
    for name in FFN_COMPONENTS:
        found = [expert[name] for expert in experts if name in expert]
        if found:
            components[name] = _mean(found)
    if layer.rest:
        nv = np.mean([matrix_kurtosis(tensor.rows(slice(None))) for tensor in layer.rest])
        components[REST] = Sensitivity(float(nv), math.nan)
    return components


def _mean(found: Sequence[Sensitivity]) -> Sensitivity:
    return Sensitivity(float(np.mean([one.nv for one in found])), float(np.mean([one.se for one in found])))


# --- aggregation ----------------------------------------------------------------------------------------------


def aggregate(raw: Sequence[Mapping[str, float]]) -> Float64:
    """Return the soft-OR over components of each layer's standing among the layers: float64 (n_layers,) in [0, 1].

    Args:
        raw: per layer the value of each of its components; a layer without components gets NaN.
    """
    standing: list[list[float]] = [[] for _ in raw]
    for component in COMPONENTS:
        owners = [layer for layer, values in enumerate(raw) if component in values]
        if owners:
            p = sigmoid(robust_z(np.array([raw[layer][component] for layer in owners])))
            for layer, value in zip(owners, p, strict=True):
                standing[layer].append(value)
    return np.array([soft_or(np.array(values)) if values else math.nan for values in standing])


def score_nsds(
    model: Model, se: str, workers: Workers, progress: Progress, torch_device: str = ""
) -> tuple[LayerScore, ...]:
    """Score every layer by NSDS, higher = more sensitive.

    Args:
        model: read one matrix at a time.
        se: reading of structural expressiveness, a key of ``SE_READINGS``.
        workers: score, a layer per task.
        progress: called with (layers done, total).
        torch_device: PyTorch's name of a device for the heavy parts; default: numpy and LAPACK.
    """
    n_layers, unembedding = model.hparams.n_layers, _unembedding(model)
    progress(0, n_layers)
    layers: list[dict[str, Sensitivity]] = []
    run = secrets.token_hex(8)
    tasks = (_LayerTask(view_layer(model, index), unembedding, se, run, torch_device) for index in range(n_layers))
    with closing(workers.ordered(_layer, tasks, ahead=FAR_AHEAD, is_large=True)) as scored:
        for _, components in scored:
            layers.append(components)
            progress(len(layers), n_layers)
    _projection_of_run.cache_clear()
    nv = [{name: value.nv for name, value in layer.items()} for layer in layers]
    structural = [{name: value.se for name, value in layer.items() if name != REST} for layer in layers]
    p_nv, p_se = aggregate(nv), aggregate(structural)
    return tuple(
        LayerScore(i, combined(p_nv[i], p_se[i]), nv[i], structural[i], _known(p_nv[i]), _known(p_se[i]))
        for i in range(n_layers)
    )


@dataclass(frozen=True)
class _LayerTask:
    """A layer to score: its views, what it writes to, the reading of SE, a name of the run, and the device."""

    view: Layer
    unembedding: Tensor | int
    se: str
    run: str
    torch_device: str


def _layer(task: _LayerTask) -> dict[str, Sensitivity]:
    projection = _projection_of_run(task.run, task.unembedding, task.torch_device)
    return layer_components(task.view, projection, SE_READINGS[task.se], algebra_on(task.torch_device))


@functools.lru_cache(maxsize=1)
def _projection_of_run(_run: str, unembedding: Tensor | int, torch_device: str) -> Float32:
    """Return the output projection, once per run in each process: to compute it is less than to send it to all."""
    return _projection(unembedding, algebra_on(torch_device))


def combined(p_nv: float, p_se: float) -> float:
    """Return NSDS of a layer: the soft-OR of NV and SE, or the one that is not NaN; 0 without any matrix."""
    present = [p for p in (p_nv, p_se) if not math.isnan(p)]
    return soft_or(np.array(present)) if present else 0.0


def _known(p: float) -> float | None:
    return None if math.isnan(p) else float(p)


def rest_notes(model: Model) -> tuple[str, ...]:
    """Return the note on matrices that NSDS scores by kurtosis alone."""
    layers = [view_layer(model, index) for index in range(model.hparams.n_layers)]
    n_layers, n_rest = sum(bool(layer.rest) for layer in layers), sum(len(layer.rest) for layer in layers)
    if not n_rest:
        return ()
    roles = sorted({tensor.role for layer in layers for tensor in layer.rest})
    shown = ", ".join(roles[:MAX_SHOWN_ROLES]) + (", ..." if len(roles) > MAX_SHOWN_ROLES else "")
    return (
        f"{n_rest} tensors of {n_layers} layers are outside NSDS's components (QK, OV, gate, up, down) and are scored "
        f"by their kurtosis alone: {shown}.",
    )
