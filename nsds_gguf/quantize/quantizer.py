"""The protocol of a rounding: a ``Quantizer`` for one tensor, and the ``Rounding`` that makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..records import Float32, Float64, Tensor
from .hessian_factors import HessianFactors


class Quantizer(Protocol):
    """Rounds the rows of one tensor and measures their errors.

    It holds the tensor's column weights or Hessian factors. Rows are ``(n_rows, n_cols)`` float32, of one matrix of the
    tensor; ``first_row`` is the index of the first row in the tensor, leading dimensions flattened, and so identifies
    the matrix of a stack. The same rows become the same bytes on any thread, however their matrix is cut into slabs.
    Every type in ``ggml.TYPES`` works: types that the method does not cover are rounded to nearest, in measuring and
    writing alike.
    """

    @property
    def tile_rows(self) -> int:
        """Rows that are rounded together: slabs of whole tiles that begin at multiples of it waste no work."""
        ...

    def quantize(self, rows: Float32, type_name: str, first_row: int = 0) -> NDArray[np.uint8]:
        """Return the rows in a type's format: ``(n_rows, row_bytes)`` uint8.

        Raises:
            GgmlError: the type is not supported, or the rows are not whole blocks of it.

        """
        ...

    def errors(self, rows: Float32, type_name: str, first_row: int = 0) -> Float64:
        """Return the weighted squared error of every row, ``(n_rows,)``, of the bytes that ``quantize`` returns."""
        ...

    def squared_norms(self, rows: Float32, first_row: int = 0) -> Float64:
        """Return the weighted squared norm of every row, ``(n_rows,)``: the denominator of relative errors."""
        ...


class TensorQuantizer(Quantizer, Protocol):
    """A quantizer that pickles, to be used by another process, and can be narrowed to one matrix of its tensor."""

    def for_rows(self, first_row: int) -> Quantizer:
        """Return a quantizer for rows of the matrix that ``first_row`` lies in, without what others need."""
        ...


# Returns the quantizer of a tensor.
Quantizers = Callable[[Tensor], TensorQuantizer]

# Makes a quantizer from a tensor, its column weights and its Hessian factors; ``None`` where there are none.
Maker = Callable[[Tensor, Float32 | None, HessianFactors | None], Quantizer]


@dataclass(frozen=True)
class Rounding:
    """A rounding method.

    Attributes:
        name: name in options, plans and files.
        description: one line for ``--help``.
        needs_hessians: whether it needs Hessian factors.
        make: makes the quantizer of a tensor.
        tile_rows: of its quantizers that have Hessian factors, known before these are read.

    """

    name: str
    description: str
    needs_hessians: bool
    make: Maker
    tile_rows: int = 1
