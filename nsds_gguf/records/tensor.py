"""One tensor of a model: what it is called, where its weights lie, and what is done to them. Plain data; it pickles."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .sources import SLAB_BYTES, Float32, Rows, Source, Weights, bounded, finite
from .transforms import Transform, Transformed

# Types of tables and indices, not of weights: such tensors are copied as they are (ggml.h, enum ggml_type).
COPIED_TYPES = ("I8", "I16", "I32", "I64", "F64")

# Types that hold weights as they are: everything else counts as quantized.
UNQUANTIZED = ("F32", "F16", "BF16", *COPIED_TYPES)

_LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)")


def role_and_layer(name: str) -> tuple[str, int | None]:
    """Return the role of a GGUF tensor name and its layer; ``None`` for tensors outside the layers of a decoder.

    ``blk.3.attn_q.weight`` is ``("attn_q", 3)``, ``blk.3.attn_q.bias`` is ``("attn_q.bias", 3)``, ``output.weight`` is
    ``("output", None)``.
    """
    match = _LAYER_NAME.fullmatch(name)
    role = (match[2] if match else name).removesuffix(".weight")
    return role, int(match[1]) if match else None


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model under its GGUF name.

    Weights are read by ``rows``, ``slabs`` and ``load``: float32, in GGUF row order (for q and k of the llama
    architecture the permuted order), leading dimensions flattened; fresh arrays that the caller may change. They raise
    ``ModelError`` when weights are NaN or infinite, or the file has shrunk since it was opened.

    Attributes:
        name: GGUF name, for example ``blk.3.attn_q.weight``.
        role: the name without layer and ``.weight``: ``attn_q``, ``ffn_down``, ``token_embd``, ``output``,
            ``attn_norm``; a bias keeps its suffix (``attn_q.bias``).
        layer: 0-based layer number; ``None`` for tensors outside the layers.
        shape: numpy order, slowest first.
        dtype: how the source stores it: ``F32``, ``F16``, ``BF16``; from a GGUF also ``Q8_0``, one of
            ``COPIED_TYPES`` or whatever the user allowed to be quantized once more.
        source: its name in the checkpoint, for messages.
        stored: where its weights lie.
        transforms: what is done to them, first step first.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    source: str
    stored: Source = field(repr=False, compare=False)
    transforms: tuple[Transform, ...] = field(default=(), repr=False, compare=False)

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
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def n_matrix_rows(self) -> int:
        """Rows of one matrix of a stack, or of the whole tensor where it is none."""
        return self.shape[-2] if len(self.shape) > 2 else self.n_rows

    @property
    def is_matrix(self) -> bool:
        """True for what may be quantized: two or more dimensions, a ``.weight``, not integers."""
        return len(self.shape) >= 2 and self.name.endswith(".weight") and not self.is_copied

    @property
    def is_copied(self) -> bool:
        """True for tables and indices, which are written as they are stored."""
        return self.dtype in COPIED_TYPES

    def rows(self, index: Rows) -> Float32:
        """Return rows as a fresh ``(n, n_cols)`` float32 array.

        Args:
            index: a slice of step 1, whose ends may be left out, or ``(n,)`` row numbers in any order.

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
        """Yield all rows in order as ``(number of the first, rows)``; sizes as those of ``row_slices``."""
        for some in self.row_slices(max_bytes, multiple_of):
            yield some.start, self.rows(some)

    def row_slices(self, max_bytes: int = SLAB_BYTES, multiple_of: int = 1) -> Iterator[slice]:
        """Yield slices that cover all rows in order; none has rows of two matrices of a stack.

        Args:
            max_bytes: of a slab in float32; one tile may take more.
            multiple_of: rows of a tile: a slab is whole tiles, but for the last of a matrix.

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
        """Return rows of a tensor that ``is_copied`` as they are stored, ``(n, row bytes)`` uint8.

        Raises ``ValueError`` for any other tensor.
        """
        if not self.is_copied or self.transforms:
            raise ValueError(f"{self.name}: stored rows of {self.dtype} are not the rows of the tensor")
        return self.stored.stored_rows(slice(*rows.indices(self.n_rows)))
