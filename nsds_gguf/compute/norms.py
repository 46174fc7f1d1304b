"""A norm's parameters, by the tensors that hold them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..records import Float64, Tensor


@dataclass(frozen=True)
class Norm:
    """A norm's gain and bias, ``(n,)`` each; ``None`` where it has none."""

    gain: Tensor | None = None
    bias: Tensor | None = None

    def gains(self, n: int) -> Float64:
        """Return the gain, ``(n,)``."""
        return np.ones(n) if self.gain is None else self.gain.load().astype(np.float64).ravel()
