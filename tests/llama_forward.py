"""A llama's forward pass in numpy, float64: what every matrix multiplies. The oracle of collected activations."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from tiny_gguf import HEAD_DIM, N_EMBD, N_HEADS, N_KV_HEADS, N_LAYERS, NORM_EPS, ROPE_THETA

Array = NDArray[np.float64]


def matrix_inputs(weights: Mapping[str, NDArray[np.float32]], tokens: NDArray[np.int32]) -> dict[str, Array]:
    """Return the rows that matrices of a ``tiny_gguf`` model reads, ``(n_sequences * n_tokens, n_cols)``, by name."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    inputs: dict[str, list[Array]] = {}

    def times(x: Array, name: str) -> Array:
        inputs.setdefault(name, []).append(x)
        product: Array = x @ w[name].T
        return product

    for sequence in tokens:
        x = w["token_embd.weight"][sequence]
        for layer in range(N_LAYERS):
            at = f"blk.{layer}."
            h = _norm(x, w[at + "attn_norm.weight"])
            q, k, v = (times(h, f"{at}attn_{letter}.weight") for letter in "qkv")
            x = x + times(_attend(q, k, v), at + "attn_output.weight")
            h = _norm(x, w[at + "ffn_norm.weight"])
            gate, up = times(h, at + "ffn_gate.weight"), times(h, at + "ffn_up.weight")
            x = x + times(gate / (1 + np.exp(-gate)) * up, at + "ffn_down.weight")
        times(_norm(x, w["output_norm.weight"]), "output.weight")
    return {name: np.concatenate(rows) for name, rows in inputs.items()}


def _norm(x: Array, gain: Array) -> Array:
    normed: Array = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + NORM_EPS) * gain
    return normed


def _attend(q: Array, k: Array, v: Array) -> Array:
    n = len(q)
    q, k, v = (a.reshape(n, -1, HEAD_DIM).transpose(1, 0, 2) for a in (q, k, v))
    k, v = (np.repeat(a, N_HEADS // N_KV_HEADS, axis=0) for a in (_rotated(k), v))
    logits = _rotated(q) @ k.transpose(0, 2, 1) / np.sqrt(HEAD_DIM)
    logits[:, ~np.tri(n, dtype=bool)] = -np.inf
    chances = np.exp(logits - logits.max(axis=-1, keepdims=True))
    heads = chances / chances.sum(axis=-1, keepdims=True) @ v
    joined: Array = heads.transpose(1, 0, 2).reshape(n, N_EMBD)
    return joined


def _rotated(x: Array) -> Array:
    """Rotate neighbouring channels, as llama files have them, by an angle that grows with the position."""
    angles = np.arange(x.shape[1])[:, np.newaxis] * ROPE_THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    rotated: Array = np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)
    return rotated
