"""A tape that differentiates by the gains of norms, which may differ from those of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..records import Float32, Tensor
from .tape import Tape
from .weights import slabs


@dataclass
class GainTape(Tape):
    """A ``Tape`` whose ``backward`` finds derivatives by gains in place of squared norms of matrices.

    Attributes:
        gains: gains to use in place of the model's, ``(n_weights,)`` by stored name.
        gain_grads: derivatives by all gains, like ``gains``; filled by ``backward``.

    """

    gains: Mapping[str, Float32] = field(default_factory=dict)
    gain_grads: dict[str, Float32] = field(default_factory=dict)

    def gain(self, gain: Tensor) -> Float32:
        """See ``Tape``."""
        replaced = self.gains.get(gain.name)
        return super().gain(gain) if replaced is None else replaced

    def on_gain(self, gain: Tensor, grad: Float32, unit: Float32) -> None:
        """See ``Tape``; heads that share a gain add up."""
        by_channel = np.einsum("ij,ij->j", grad, unit)
        total: Float32 = by_channel.reshape(-1, gain.n_weights).sum(axis=0)
        known = self.gain_grads.get(gain.name)
        self.gain_grads[gain.name] = total if known is None else known + total

    def through(self, weight: Tensor, grad: Float32, x: Float32) -> Float32:
        """Return the derivative by the input of a matrix."""
        total: Float32 = np.zeros_like(x)
        for part in self.each(lambda slab: grad[:, slice(*slab)] @ self.weights.rows(weight, slab), slabs(weight)):
            total += part
        return total
