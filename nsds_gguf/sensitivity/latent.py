"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434): residual update and noise.

Keys and values of all heads are products with one short normed vector; in addition, all heads share one rotated key::

    c     = norm(first rows of attn_kv_a_mqa @ x)        q   = attn_q @ x, or attn_q_b @ norm(attn_q_a @ x)
    k_pe  = last rows of attn_kv_a_mqa @ x               logit = q_nope . k + q_pe . k_pe
    k, v  = attn_kv_b @ c, a head's k before its v; or separate, attn_k_b transposed: k = attn_k_b^T @ c
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..compute.layers import Linear, rows_of
from ..compute.norms import Norm
from ..records import Float64, Hparams, Tensor
from .blocks import ATTENTION_SHRINK, ResidualUpdate, added, noise_through, update_moments
from .moments import Signal, matrix_moments, normed


@dataclass(frozen=True)
class LatentAttention:
    """The matrices of one layer, and the channels of the latent and of the parts of a head.

    ``queries`` is the matrix with ``n_heads * (n_nope + n_rope)`` rows, ``query_latent`` the one before it, if any.
    """

    queries: Tensor
    query_latent: Tensor | None
    key_values: Tensor
    output: Tensor
    n_heads: int
    n_latent: int
    n_nope: int
    n_rope: int
    n_value: int


def view_latent(tensors: Mapping[str, Tensor], hparams: Hparams) -> LatentAttention | None:
    """Return the latent attention of a layer; ``None`` if it does not have this pattern."""
    short, norm, output = (tensors.get(role) for role in ("attn_kv_a_mqa", "attn_kv_a_norm", "attn_output"))
    query_latent = tensors.get("attn_q_a") if "attn_q_a_norm" in tensors else None
    queries = tensors.get("attn_q" if query_latent is None else "attn_q_b")
    n_heads = hparams.n_heads
    if short is None or norm is None or output is None or queries is None or not n_heads or "attn_gate" in tensors:
        return None
    n_latent, n_value, n_query = norm.n_weights, output.n_cols // n_heads, queries.n_rows // n_heads
    n_rope = short.n_rows - n_latent
    n_nope = n_query - n_rope
    sizes = (n_heads, n_latent, n_nope, n_rope, n_value)
    fits = (
        min(sizes) > 0
        and short.shape[-1] == hparams.n_embd
        and output.shape == (hparams.n_embd, n_heads * n_value)
        and queries.n_rows == n_heads * n_query
        and queries.n_cols == (hparams.n_embd if query_latent is None else query_latent.n_rows)
        and _has_key_values(tensors, n_heads, n_latent, n_nope, n_value)
    )
    return LatentAttention(queries, query_latent, short, output, *sizes) if fits else None


def _has_key_values(tensors: Mapping[str, Tensor], n_heads: int, n_latent: int, n_nope: int, n_value: int) -> bool:
    both, keys, values = (tensors.get(role) for role in ("attn_kv_b", "attn_k_b", "attn_v_b"))
    if both is not None:
        return both.shape == (n_heads * (n_nope + n_value), n_latent)
    shapes = (n_heads, n_latent, n_nope), (n_heads, n_value, n_latent)
    return keys is not None and values is not None and (keys.shape, values.shape) == shapes


def latent_update(a: LatentAttention, tensors: Mapping[str, Tensor], x: Signal, hparams: Hparams) -> ResidualUpdate:
    """Return the residual update of latent attention.

    Args:
        a: the attention.
        tensors: the layer's tensors by role.
        x: input of the first matrices, ``(n_embd,)``.
        hparams: scales and epsilon.

    """
    latent = _normed(rows_of(a.key_values, 0, a.n_latent), tensors["attn_kv_a_norm"], x.second, hparams)
    rotated = rows_of(a.key_values, a.n_latent, a.key_values.n_rows)
    if a.query_latent is None:
        query_input, consumers = x.second, [a.queries.name]
        inputs = {}
    else:
        query_input = _normed(a.query_latent, tensors["attn_q_a_norm"], x.second, hparams)
        inputs, consumers = {a.queries.name: query_input}, [a.query_latent.name]
    attended, logit2 = _heads(a, tensors, x.second, latent, query_input, rotated)
    scale2 = 1 / (a.n_nope + a.n_rope) if hparams.attention_scale is None else hparams.attention_scale**2
    output = Linear(a.output, tensors.get("attn_output.bias"))
    written = noise_through(output, attended, hparams)
    of_values, of_logits = written / ATTENTION_SHRINK, written * (logit2 * scale2)
    noise = {a.output.name: of_values, a.key_values.name: of_values + of_logits}
    noise |= dict.fromkeys([*consumers, a.queries.name], of_logits)
    for role, part in (("attn_v_b", of_values), ("attn_k_b", of_logits), ("attn_kv_b", of_values + of_logits)):
        if role in tensors:
            noise = added(noise, {tensors[role].name: part})
    inputs |= _inputs(a, tensors, latent, query_input) | {a.output.name: attended}
    return ResidualUpdate(
        a.output.name, update_moments(output, Signal(attended), hparams), noise, (*consumers, a.key_values.name), inputs
    )


def _normed(matrix: Tensor, norm: Tensor, x2: Float64, hparams: Hparams) -> Float64:
    return normed(Norm(norm), Signal(matrix_moments(matrix, x2)), hparams.norm_eps).second


def _heads(
    a: LatentAttention,
    tensors: Mapping[str, Tensor],
    x2: Float64,
    latent: Float64,
    query_input: Float64,
    rotated: Tensor,
) -> tuple[Float64, float]:
    """Return second moments: of head outputs, ``(n_heads * n_value,)``, and of unscaled logits, mean over heads."""
    rotated_key, total, values = _gram(rotated.load(), x2), 0.0, []
    for head in range(a.n_heads):
        keys, value = _key_value(a, tensors, head)
        start = head * (a.n_nope + a.n_rope)
        query = _gram(a.queries.rows(slice(start, start + a.n_nope + a.n_rope)), query_input)
        nope, rope = query[: a.n_nope, : a.n_nope], query[a.n_nope :, a.n_nope :]
        total += float((nope * _gram(keys, latent)).sum() + (rope * rotated_key).sum())
        values.append(np.square(value) @ latent)
    return ATTENTION_SHRINK * np.concatenate(values), total / a.n_heads


def _key_value(a: LatentAttention, tensors: Mapping[str, Tensor], head: int) -> tuple[Float64, Float64]:
    """Return a head's matrices from the latent: keys ``(n_nope, n_latent)`` and values ``(n_value, n_latent)``."""
    both = tensors.get("attn_kv_b")
    if both is not None:
        start = head * (a.n_nope + a.n_value)
        rows = both.rows(slice(start, start + a.n_nope + a.n_value)).astype(np.float64)
        return rows[: a.n_nope], rows[a.n_nope :]
    keys = tensors["attn_k_b"].rows(slice(head * a.n_latent, (head + 1) * a.n_latent)).T
    value = tensors["attn_v_b"].rows(slice(head * a.n_value, (head + 1) * a.n_value))
    return keys.astype(np.float64), value.astype(np.float64)


def _inputs(
    a: LatentAttention, tensors: Mapping[str, Tensor], latent: Float64, query_input: Float64
) -> dict[str, Float64]:
    """Return the inputs of the matrices after the latent; transposed keys multiply the queries of each head."""
    inputs = {tensors[role].name: latent for role in ("attn_kv_b", "attn_v_b") if role in tensors}
    keys = tensors.get("attn_k_b")
    if keys is not None:
        queries = matrix_moments(a.queries, query_input).reshape(a.n_heads, -1)
        inputs[keys.name] = np.ascontiguousarray(queries[:, : a.n_nope])
    return inputs


def _gram(rows: np.ndarray, x2: Float64) -> Float64:
    """Return ``W diag(x2) W^T``, the second moments of ``W x``: ``(n_rows, n_rows)``."""
    scaled = rows * np.sqrt(x2)
    gram: Float64 = scaled @ scaled.T
    return gram
