"""The quantizer of a tensor, made where it is first used: in this process, or by a worker that got it as a pickle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..records import Float32, Float64, Tensor
from .hessian_factors import FactorStore
from .padding import columns_of, spread_vector
from .quantizer import Quantizer, Rounding


@dataclass
class DeferredQuantizer:
    """A ``TensorQuantizer``: what a rounding needs for one tensor, and, once used, the quantizer made from it.

    It pickles without the quantizer, and with the path of the Hessian factors instead of the factors.

    Attributes:
        rounding: makes the quantizer.
        tensor: the tensor.
        weights: its column weights: ``(n_cols,)`` float32, or ``(n_matrices, n_cols)``; ``None`` for equal weights.
        factors: the store of its Hessian factors; ``None`` for a rounding without.

    """

    rounding: Rounding
    tensor: Tensor
    weights: Float32 | None
    factors: FactorStore | None

    @cached_property
    def quantizer(self) -> Quantizer:
        """The quantizer; reads the Hessian factors from disk, and spreads them over the columns of a padded tensor."""
        factors = None if self.factors is None else self.factors.of(self.tensor.name)
        weights, columns = self.weights, columns_of(self.tensor)
        if columns is not None:
            factors = None if factors is None else factors.spread(columns)
            weights = None if weights is None else spread_vector(weights, columns)
        return self.rounding.make(self.tensor, weights, factors)

    @property
    def tile_rows(self) -> int:
        """See ``Quantizer``; reads no factors."""
        has_factors = self.factors is not None and self.tensor.name in self.factors.names
        return self.rounding.tile_rows if has_factors else self.quantizer.tile_rows

    def for_rows(self, first_row: int) -> DeferredQuantizer:
        """See ``TensorQuantizer``."""
        if self.weights is None or self.weights.ndim == 1:
            return self
        return replace(self, weights=self.weights[first_row // self.tensor.n_matrix_rows])

    def quantize(self, rows: Float32, type_name: str, first_row: int = 0) -> NDArray[np.uint8]:
        """See ``Quantizer``."""
        return self.quantizer.quantize(rows, type_name, first_row)

    def errors(self, rows: Float32, type_name: str, first_row: int = 0) -> Float64:
        """See ``Quantizer``."""
        return self.quantizer.errors(rows, type_name, first_row)

    def squared_norms(self, rows: Float32, first_row: int = 0) -> Float64:
        """See ``Quantizer``."""
        return self.quantizer.squared_norms(rows, first_row)

    def __getstate__(self) -> dict[str, Any]:
        """Return what the quantizer is made from."""
        return {name: value for name, value in self.__dict__.items() if name != "quantizer"}
