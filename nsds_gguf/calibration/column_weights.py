"""Column weights for quantizers, from mean squared inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..compute.input_moments import InputSums
from ..records import Float32, Float64

FLOOR = 1e-4  # of the mean: ggml would divide by zero in a block of columns without input


def normalized(moments: Float64) -> Float32:
    """Return float32 weights of mean 1, at least ``FLOOR``, in the shape of ``moments``."""
    mean = float(moments.mean())
    if mean <= 0:
        return np.ones(moments.shape, dtype=np.float32)
    weights: Float32 = np.maximum(moments / mean, FLOOR).astype(np.float32)
    return weights


def column_moments(inputs: Mapping[str, InputSums], first_positions: bool = False) -> dict[str, Float64]:
    """Return mean squares by stored name, ``(n_cols,)``, with or without first positions.

    For stacked experts that read the stream: the mean over all tokens. For experts that read their own hidden units:
    ``(n_experts, n_cols)``, with the mean of the others for an expert that no token is routed to.
    """
    found: dict[str, Float64] = {}
    for name, sums in inputs.items():
        moments = sums.moments(first_positions)
        means, counts = moments.mean_squares, moments.counts
        if sums.is_stack and not has_own_inputs(name):
            squares = sums.squares.sum(axis=0) if first_positions else sums.squares[1]
            means = squares.sum(axis=0) / max(int(counts.sum()), 1)
        elif sums.is_stack and (counts > 0).any():
            means = np.where(counts[:, np.newaxis] > 0, means, means[counts > 0].mean(axis=0))
        found[name] = means
    return found


def has_own_inputs(stack: str) -> bool:
    """Return whether the matrices of a stack read their own hidden units, not the stream."""
    return ".ffn_down" in stack
