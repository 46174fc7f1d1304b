"""What a rounding is made of: a ``Quantizer`` for one tensor, and the ``Rounding`` that makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..records import Float32, Float64, Tensor
from .hessian_factors import HessianFactors


class Quantizer(Protocol):
    """Rounds the rows of one tensor and measures what that costs.

    It holds what it needs to know of the tensor: column weights, or Hessian factors. Rows are ``(n_rows, n_cols)``
    float32, of one matrix of the tensor; ``first_row`` is the number of the first of them in the tensor, leading
    dimensions flattened, which says what matrix of a stack they are of. The same rows become the same bytes however
    their matrix is cut into slabs, and on any thread. Every type in ``ggml.TYPES`` works: what cannot be rounded so is
    rounded to nearest, when it is measured as when it is written.
    """

    @property
    def tile_rows(self) -> int:
        """Rows that are rounded together: slabs that begin at multiples of it and hold whole tiles waste nothing."""
        ...

    def quantize(self, rows: Float32, type_name: str, first_row: int = 0) -> NDArray[np.uint8]:
        """Return the rows in a type's format: ``(n_rows, row_bytes)`` uint8.

        Raises:
            GgmlError: the type is not one that is written, or the rows are not whole blocks of it.

        """
        ...

    def errors(self, rows: Float32, type_name: str, first_row: int = 0) -> Float64:
        """Return the weighted squared error of every row, ``(n_rows,)``, as ``quantize`` would write it."""
        ...

    def squared_norms(self, rows: Float32, first_row: int = 0) -> Float64:
        """Return the weighted squared norm of every row, ``(n_rows,)``: what errors are relative to."""
        ...


# Gives the quantizer of a tensor.
Quantizers = Callable[[Tensor], Quantizer]

# Makes a quantizer of a tensor, its column weights and its Hessian factors; ``None`` where there are none.
Maker = Callable[[Tensor, Float32 | None, HessianFactors | None], Quantizer]


@dataclass(frozen=True)
class Rounding:
    """A rounding method.

    Attributes:
        name: what users, plans and files call it.
        description: one line for ``--help``.
        needs_hessians: whether it takes Hessian factors, which must be computed first.
        make: makes the quantizer of a tensor.

    """

    name: str
    description: str
    needs_hessians: bool
    make: Maker
