"""One tensor of a model: its name, the source of its weights and their transforms. Plain data; it pickles."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .sources import SLAB_BYTES, Float32, Rows, Source, Weights, bounded, finite
from .transforms import Transform, Transformed

# Types of tables and indices, not of weights: copied as stored (ggml.h, enum ggml_type).
COPIED_TYPES = ("I8", "I16", "I32", "I64", "F64")

# Types that are not quantized.
UNQUANTIZED = ("F32", "F16", "BF16", *COPIED_TYPES)

_LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)")


def role_and_layer(name: str) -> tuple[str, int | None]:
    """Return the role and the layer of a GGUF tensor name; layer ``None`` outside the layers of a decoder.

    ``blk.3.attn_q.weight`` is ``("attn_q", 3)``, ``blk.3.attn_q.bias`` is ``("attn_q.bias", 3)``, ``output.weight`` is
    ``("output", None)``.
    """
    match = _LAYER_NAME.fullmatch(name)
    role = (match[2] if match else name).removesuffix(".weight")
    return role, int(match[1]) if match else None


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model under its GGUF name.

    ``rows``, ``slabs`` and ``load`` read weights: float32, in GGUF row order (permuted for q and k of the llama
    architecture), leading dimensions flattened, as fresh arrays that the caller may change. They raise ``ModelError``
    for NaN or infinite weights and for a file that has shrunk since it was opened.

    Attributes:
        name: GGUF name, for example ``blk.3.attn_q.weight``.
        role: the name without layer and ``.weight``: ``attn_q``, ``ffn_down``, ``token_embd``, ``output``,
            ``attn_norm``; a bias keeps its suffix (``attn_q.bias``).
        layer: 0-based layer number; ``None`` for tensors outside the layers.
        shape: numpy order, slowest first.
        dtype: stored type: ``F32``, ``F16``, ``BF16``; in a GGUF also ``Q8_0``, one of ``COPIED_TYPES`` or, with
            ``--allow-requantize``, any type that ggml reads.
        source: name in the checkpoint, for messages.
        stored: source of the weights.
        transforms: applied to the weights in order.
        n_zeros: zeros that padding added; they do not count as weights.
        first_row: of a view of some rows: the row of the stored tensor that it begins with.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    source: str
    stored: Source = field(repr=False, compare=False)
    transforms: tuple[Transform, ...] = field(default=(), repr=False, compare=False)
    n_zeros: int = 0
    first_row: int = 0

    @property
    def n_cols(self) -> int:
        """Length of a row (the contiguous dimension)."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        """Number of rows, leading dimensions flattened; 1 for a vector."""
        return math.prod(self.shape[:-1])

    @property
    def n_weights(self) -> int:
        """Number of weights, without zeros of padding."""
        return math.prod(self.shape) - self.n_zeros

    @property
    def n_matrix_rows(self) -> int:
        """Rows of one matrix of a stack; else of the whole tensor."""
        return self.shape[-2] if len(self.shape) > 2 else self.n_rows

    @property
    def is_matrix(self) -> bool:
        """True for candidates of quantization: two or more dimensions, a ``.weight``, not ``is_copied``."""
        return len(self.shape) >= 2 and self.name.endswith(".weight") and not self.is_copied

    @property
    def is_copied(self) -> bool:
        """True for tables and indices, which are written as stored."""
        return self.dtype in COPIED_TYPES

    def rows(self, index: Rows) -> Float32:
        """Return rows as a fresh ``(n, n_cols)`` float32 array.

        Args:
            index: a slice of step 1 (both ends optional), or ``(n,)`` row numbers in any order.

        """
        wanted = bounded(index, self.n_rows)
        if wanted is None:
            return np.empty((0, self.n_cols), np.float32)
        weights: Weights = self.stored
        for step in self.transforms:
            weights = Transformed(weights, step)
        values = weights.values(wanted, slice(0, self.n_cols))
        return values if self.is_copied else finite(values, self.stored)

    def slabs(self, max_bytes: int = SLAB_BYTES, multiple_of: int = 1) -> Iterator[tuple[int, Float32]]:
        """Yield all rows in order as ``(number of the first row, rows)``, in the slices of ``row_slices``."""
        for some in self.row_slices(max_bytes, multiple_of):
            yield some.start, self.rows(some)

    def row_slices(self, max_bytes: int = SLAB_BYTES, multiple_of: int = 1) -> Iterator[slice]:
        """Yield slices that cover all rows in order; no slice spans two matrices of a stack.

        Args:
            max_bytes: of a slab in float32; a single tile may exceed it.
            multiple_of: rows of a tile: slabs hold whole tiles, except the last of a matrix.

        """
        step, n = self.rows_per_slab(max_bytes, multiple_of), self.n_matrix_rows
        for first in range(0, self.n_rows, n):
            for start in range(first, first + n, step):
                yield slice(start, min(start + step, first + n))

    def rows_per_slab(self, max_bytes: int = SLAB_BYTES, multiple_of: int = 1) -> int:
        """Return the rows of a slab: whole tiles of ``multiple_of`` rows, at least one."""
        return max(1, max_bytes // (4 * self.n_cols) // multiple_of) * multiple_of

    def load(self) -> Float32:
        """Return the whole tensor, ``shape`` float32."""
        return self.rows(slice(0, self.n_rows)).reshape(self.shape)

    def stored_rows(self, rows: slice) -> NDArray[np.uint8]:
        """Return rows of a tensor that ``is_copied`` as stored, ``(n, row bytes)`` uint8.

        Raises ``ValueError`` for any other tensor.
        """
        if not self.is_copied or self.transforms:
            raise ValueError(f"{self.name}: stored rows of {self.dtype} are not the rows of the tensor")
        return self.stored.stored_rows(slice(*rows.indices(self.n_rows)))
