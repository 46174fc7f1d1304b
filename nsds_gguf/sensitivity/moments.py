"""Moments of activations in a decoder: the formulas of moment propagation.

Inputs and results are second moments (mean squares) per channel, float64; weights are read in slabs and squared in
float32. Channels are treated as uncorrelated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..compute.activation_functions import ACTIVATIONS, sigmoid
from ..compute.layers import Linear
from ..compute.norms import Norm
from ..records import Float32, Float64, Tensor

_SLAB_BYTES = 16 << 20  # float32 rows per read
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(32)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()  # quadrature for a standard normal


@dataclass(frozen=True)
class Signal:
    """Second moment ``(n,)`` and, if propagated, mean ``(n,)`` of each channel."""

    second: Float64
    mean: Float64 | None = None

    @property
    def variance(self) -> Float64:
        """Second moment about the mean, ``(n,)``."""
        return self.second if self.mean is None else np.maximum(self.second - self.mean**2, 0.0)

    def plus(self, other: Signal) -> Signal:
        """Return the sum of two signals that are independent except for their means."""
        if self.mean is None or other.mean is None:
            return Signal(self.second + other.second, self.mean if other.mean is None else other.mean)
        return Signal(self.second + other.second + 2 * self.mean * other.mean, self.mean + other.mean)

    def scaled(self, mean_square: Float64 | float, mean: Float64 | float) -> Signal:
        """Return the signal times an independent factor, or one per channel, of these moments."""
        return Signal(self.second * mean_square, None if self.mean is None else self.mean * mean)

    def shifted(self, constant: Float64 | float) -> Signal:
        """Return the signal plus a constant."""
        mean = constant + (np.zeros_like(self.second) if self.mean is None else self.mean)
        return Signal(self.variance + mean**2, mean)


# --- norms ----------------------------------------------------------------------------------------------------


def normed(norm: Norm, x: Signal, eps: float) -> Signal:
    """Return the moments after an RMS norm, or after a layer norm if the channel mean is already removed.

    ``gain x / sqrt(mean(x^2) + eps)``, plus the bias.
    """
    gain, square = norm.gains(len(x.second)), x.second.mean() + eps
    scaled = Signal(x.second / square * gain**2, None if x.mean is None else x.mean / np.sqrt(square) * gain)
    return scaled if norm.bias is None else scaled.shifted(norm.bias.load().astype(np.float64).ravel())


# --- matrices -------------------------------------------------------------------------------------------------


def product(linear: Linear, x: Signal) -> Signal:
    """Return the moments of ``W x + b``: variance ``W^2 var(x)``, mean ``W mean(x) + b``; each ``(n_rows,)``."""
    varying, mean = Signal(matrix_moments(linear.weight, x.variance)), product_mean(linear, x)
    return varying if mean is None else varying.shifted(mean)


def product_mean(linear: Linear, x: Signal) -> Float64 | None:
    """Return the mean of ``W x + b``, ``(n_rows,)``; ``None`` if neither has one."""
    bias = None if linear.bias is None else linear.bias.load().astype(np.float64)
    if x.mean is None:
        return bias
    mean = np.concatenate([rows @ x.mean for rows in _rows(linear.weight)])
    return mean if bias is None else mean + bias


def matrix_moments(tensor: Tensor, x2: Float64) -> Float64:
    """Return ``(W ** 2) @ x2``, ``(n_rows,)``."""
    narrow = x2.astype(np.float32)
    return np.concatenate([np.square(rows, out=rows) @ narrow for rows in _rows(tensor)]).astype(np.float64)


def centred_matrix_moments(tensor: Tensor, x2: Float64) -> Float64:
    """Return ``(W - mean of its rows)^2 @ x2``: the output to a stream whose channel mean never counts."""
    narrow = x2.astype(np.float32)
    mean_row = (sum(rows.sum(axis=0, dtype=np.float64) for rows in _rows(tensor)) / tensor.n_rows).astype(np.float32)
    return np.concatenate([np.square(rows - mean_row) @ narrow for rows in _rows(tensor)]).astype(np.float64)


def covariance(first: Tensor, second: Tensor, x2: Float64) -> Float64:
    """Return the covariance between the outputs of two matrices, row by row, ``(n_rows,)``."""
    narrow = x2.astype(np.float32)
    pairs = zip(_rows(first), _rows(second), strict=True)
    return np.concatenate([(a * b) @ narrow for a, b in pairs]).astype(np.float64)


def row_moments(tensor: Tensor, centred: bool) -> Signal:
    """Return the moments of a random row, ``(n_cols,)``.

    ``centred`` subtracts from each row its channel mean, and propagates the mean of each channel.
    """
    total, squares = np.zeros(tensor.n_cols), np.zeros(tensor.n_cols)
    for rows in _rows(tensor):
        if centred:
            rows -= rows.mean(axis=1, keepdims=True)
            total += rows.sum(axis=0, dtype=np.float64)
        squares += np.square(rows, out=rows).sum(axis=0, dtype=np.float64)
    return Signal(squares / tensor.n_rows, total / tensor.n_rows if centred else None)


def _rows(tensor: Tensor) -> Iterator[Float32]:
    """Return the rows of a matrix in slabs, as fresh arrays."""
    return (rows for _, rows in tensor.slabs(_SLAB_BYTES))


# --- hidden units of a feed-forward block ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """Moments of hidden units after the activation function, ``(n_ff,)`` each.

    Attributes:
        second: second moment.
        mean: mean.
        noise: second moment that relative noise of 1 in the input of the activation function adds.
    """

    second: Float64
    mean: Float64
    noise: Float64


def gated_unit_moments(gate: Signal, up: Signal, both: Float64, activation: str = "silu") -> Units:
    """Return the moments of ``f(g) u`` with jointly Gaussian g and u, and ``E[(f'(g) s_g u)^2]``.

    Args:
        gate: moments of g, ``(n_ff,)``; ``s_g`` is its standard deviation, which noise in the gate scales with.
        up: moments of u.
        both: ``(n_ff,)`` covariance of g and u.
        activation: name of f, a key of ``ACTIVATIONS``.

    Gauss-Hermite quadrature over ``g = mean + s_g z``; given z, u is normal with mean ``m + rho s_u z`` and variance
    ``s_u^2 (1 - rho^2)``.

    """
    value, slope = ACTIVATIONS[activation]
    gate2, up2, mean_up = gate.variance, up.variance, 0.0 if up.mean is None else up.mean
    sigma = np.sqrt(gate2)
    rho2 = np.clip(ratio(both**2, gate2 * up2), 0.0, 1.0)
    along = ratio(both, sigma)  # of u, per unit of z
    second, mean, noise = np.zeros_like(gate2), np.zeros_like(gate2), np.zeros_like(gate2)
    for z, weight in zip(_NODES, _WEIGHTS, strict=True):
        x = sigma * z if gate.mean is None else gate.mean + sigma * z
        up_given = up2 * (1 - rho2 + rho2 * z * z) + (2 * mean_up * along * z + mean_up**2)
        second += weight * value(x) ** 2 * up_given
        mean += weight * value(x) * (mean_up + along * z)
        noise += weight * (slope(x) * sigma) ** 2 * up_given
    return Units(second, mean, noise)


def unit_moments(x: Signal, activation: str) -> Units:
    """Return the moments of ``f(x)`` of Gaussian x, and ``E[(f'(x) s)^2]``: the gated ones with u = 1."""
    ones = np.ones_like(x.second)
    return gated_unit_moments(x, Signal(ones, ones), np.zeros_like(ones), activation)


def ratio(above: Float64, below: Float64) -> Float64:
    """Return the quotient, 0 where ``below`` is 0."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def sigmoid_moments(x: Signal) -> Units:
    """Return the moments of ``sigmoid(x)`` of Gaussian x, and ``E[(sigmoid'(x) s)^2]``."""
    sigma, mean = np.sqrt(x.variance), 0.0 if x.mean is None else x.mean
    s = sigmoid(np.add.outer(_NODES, np.zeros_like(sigma)) * sigma + mean)  # (n_nodes, n)
    return Units(_WEIGHTS @ s**2, _WEIGHTS @ s, _WEIGHTS @ (s * (1 - s) * sigma) ** 2)
