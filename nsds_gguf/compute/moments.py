"""Moments of what flows through a decoder: the formulas that the sweep puts together.

All take and give second moments (mean squared values) per channel, float64; weights are read in slabs and squared in
float32. Channels are treated as uncorrelated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..records import Float32, Float64, Tensor
from .layers import Linear

_SLAB_BYTES = 16 << 20  # float32 rows that are read at a time
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(32)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()  # quadrature for a standard normal


@dataclass(frozen=True)
class Signal:
    """Channels by their second moment ``(n,)`` and, where it is followed, their mean ``(n,)``."""

    second: Float64
    mean: Float64 | None = None

    @property
    def variance(self) -> Float64:
        """Second moment about the mean, ``(n,)``."""
        return self.second if self.mean is None else np.maximum(self.second - self.mean**2, 0.0)

    def plus(self, other: Signal) -> Signal:
        """Return the sum of two signals that are independent but for their means."""
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


@dataclass(frozen=True)
class Norm:
    """A norm's gain and bias, ``(n,)`` each; ``None`` where it has none."""

    gain: Tensor | None = None
    bias: Tensor | None = None

    def gains(self, n: int) -> Float64:
        """Return the gain, ``(n,)``."""
        return np.ones(n) if self.gain is None else self.gain.load().astype(np.float64).ravel()

    def apply(self, x: Signal, eps: float) -> Signal:
        """Return what comes out of an RMS norm, or of a layer norm when the channels' mean is taken out already.

        ``gain x / sqrt(mean(x^2) + eps)``, plus the bias.
        """
        gain, square = self.gains(len(x.second)), x.second.mean() + eps
        normed = Signal(x.second / square * gain**2, None if x.mean is None else x.mean / np.sqrt(square) * gain)
        return normed if self.bias is None else normed.shifted(self.bias.load().astype(np.float64).ravel())


# --- matrices -------------------------------------------------------------------------------------------------


def product(linear: Linear, x: Signal) -> Signal:
    """Return the moments of ``W x + b``: variance ``W^2 var(x)``, mean ``W mean(x) + b``; each ``(n_rows,)``."""
    varying, mean = Signal(matrix_moments(linear.weight, x.variance)), product_mean(linear, x)
    return varying if mean is None else varying.shifted(mean)


def product_mean(linear: Linear, x: Signal) -> Float64 | None:
    """Return the mean of ``W x + b``, ``(n_rows,)``; ``None`` where neither has one."""
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
    """Return ``(W - mean of its rows)^2 @ x2``: what a writer adds to a stream whose channel mean never counts."""
    narrow = x2.astype(np.float32)
    mean_row = (sum(rows.sum(axis=0, dtype=np.float64) for rows in _rows(tensor)) / tensor.n_rows).astype(np.float32)
    return np.concatenate([np.square(rows - mean_row) @ narrow for rows in _rows(tensor)]).astype(np.float64)


def covariance(first: Tensor, second: Tensor, x2: Float64) -> Float64:
    """Return the covariance of each row's product with that of the other matrix's row, ``(n_rows,)``."""
    narrow = x2.astype(np.float32)
    pairs = zip(_rows(first), _rows(second), strict=True)
    return np.concatenate([(a * b) @ narrow for a, b in pairs]).astype(np.float64)


def row_moments(tensor: Tensor, centred: bool) -> Signal:
    """Return the moments of a row drawn at random, ``(n_cols,)``.

    ``centred`` takes the mean of its channels out of each row and follows the mean of each channel.
    """
    total, squares = np.zeros(tensor.n_cols), np.zeros(tensor.n_cols)
    for rows in _rows(tensor):
        if centred:
            rows -= rows.mean(axis=1, keepdims=True)
            total += rows.sum(axis=0, dtype=np.float64)
        squares += np.square(rows, out=rows).sum(axis=0, dtype=np.float64)
    return Signal(squares / tensor.n_rows, total / tensor.n_rows if centred else None)


def _rows(tensor: Tensor) -> Iterator[Float32]:
    """Return the rows of a matrix in slabs, fresh arrays."""
    return (rows for _, rows in tensor.slabs(_SLAB_BYTES))


# --- activations ----------------------------------------------------------------------------------------------

# An activation and its slope.
Activation = tuple[Callable[[Float64], Float64], Callable[[Float64], Float64]]


def _sigmoid(x: Float64) -> Float64:
    return 0.5 * (1 + np.tanh(0.5 * x))  # no overflow at either end


def _swish(beta: float) -> Activation:
    """Return ``x sigmoid(beta x)`` and its slope; ``beta`` 1 is SiLU."""

    def value(x: Float64) -> Float64:
        return x * _sigmoid(beta * x)

    def slope(x: Float64) -> Float64:
        s = _sigmoid(beta * x)
        return s * (1 + beta * x * (1 - s))

    return value, slope


_GELU_SCALE, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715  # the tanh form, as ggml computes it


def _gelu(x: Float64) -> Float64:
    out: Float64 = 0.5 * x * (1 + np.tanh(_GELU_SCALE * (x + _GELU_CUBIC * x**3)))
    return out


def _gelu_slope(x: Float64) -> Float64:
    t = np.tanh(_GELU_SCALE * (x + _GELU_CUBIC * x**3))
    out: Float64 = 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * _GELU_SCALE * (1 + 3 * _GELU_CUBIC * x**2)
    return out


def _relu(x: Float64) -> Float64:
    return np.maximum(x, 0.0)


def _step(x: Float64) -> Float64:
    return (x > 0).astype(np.float64)


ACTIVATIONS: dict[str, Activation] = {
    "silu": _swish(1.0),
    "gelu": (_gelu, _gelu_slope),
    "relu": (_relu, _step),
    "relu2": (lambda x: _relu(x) ** 2, lambda x: 2 * _relu(x)),
    "swiglu_oai": _swish(1.702),  # its clamp at 7 is left out: pre-activations rarely get there
}

# What the gated product adds to ``up`` before it multiplies (gpt-oss: ``(up + 1) gate sigmoid(1.702 gate)``).
UP_OFFSETS = {"swiglu_oai": 1.0}


# --- units of a feed-forward block ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """Hidden units behind the activation, ``(n_ff,)`` each.

    Attributes:
        second: second moment.
        mean: mean.
        noise: second moment that relative noise of 1 in what goes through the activation adds to them.
    """

    second: Float64
    mean: Float64
    noise: Float64


def gated_unit_moments(gate: Signal, up: Signal, both: Float64, activation: str = "silu") -> Units:
    """Return the moments of ``f(g) u`` with jointly Gaussian g and u, and ``E[(f'(g) s_g u)^2]``.

    Args:
        gate: moments of g, ``(n_ff,)``; ``s_g`` is its deviation, which noise in the gate's weights scales with.
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
    """Return the quotient, 0 where there is nothing below."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def sigmoid_moments(x: Signal) -> Units:
    """Return the moments of ``sigmoid(x)`` of Gaussian x, and ``E[(sigmoid'(x) s)^2]``."""
    sigma, mean = np.sqrt(x.variance), 0.0 if x.mean is None else x.mean
    s = _sigmoid(np.add.outer(_NODES, np.zeros_like(sigma)) * sigma + mean)  # (n_nodes, n)
    return Units(_WEIGHTS @ s**2, _WEIGHTS @ s, _WEIGHTS @ (s * (1 - s) * sigma) ** 2)
