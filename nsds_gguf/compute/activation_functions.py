"""Activation functions of feed-forward blocks and their derivatives, elementwise on float32 or float64 arrays."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..records import Float64

# An activation function and its derivative.
Activation = tuple[Callable[[Float64], Float64], Callable[[Float64], Float64]]


def sigmoid(x: Float64) -> Float64:
    """Return ``1 / (1 + exp(-x))``."""
    return 0.5 * (1 + np.tanh(0.5 * x))  # no overflow at either end


def _swish(beta: float) -> Activation:
    """Return ``x sigmoid(beta x)`` and its derivative; ``beta`` 1 is SiLU."""

    def value(x: Float64) -> Float64:
        return x * sigmoid(beta * x)

    def slope(x: Float64) -> Float64:
        s = sigmoid(beta * x)
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


# By the name in ``Hparams.activation``.
ACTIVATIONS: dict[str, Activation] = {
    "silu": _swish(1.0),
    "gelu": (_gelu, _gelu_slope),
    "relu": (_relu, _step),
    "relu2": (lambda x: _relu(x) ** 2, lambda x: 2 * _relu(x)),
    "swiglu_oai": _swish(1.702),  # without its clamp at 7, which pre-activations rarely reach
}

# Constant added to ``up`` in the gated product (gpt-oss: ``(up + 1) gate sigmoid(1.702 gate)``).
UP_OFFSETS = {"swiglu_oai": 1.0}
