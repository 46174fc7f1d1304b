"""The parameters of a norm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..records import Float64, Tensor


@dataclass(frozen=True)
class Norm:
    """Gain and bias of a norm, ``(n,)`` each; ``None`` for none."""

    gain: Tensor | None = None
    bias: Tensor | None = None

    def gains(self, n: int) -> Float64:
        """Return the gain, ``(n,)``; ones without a gain."""
        return np.ones(n) if self.gain is None else self.gain.load().astype(np.float64).ravel()
