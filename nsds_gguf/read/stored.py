"""One tensor of a checkpoint: the interface between weight formats and the model folder."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UnsupportedError
from ..records import Source
from ..records.sources import row_slices

READABLE = ("F32", "F16", "BF16", "F8_E4M3", "F8_E8M0")  # the last holds scales of FP8 weights


@dataclass(frozen=True)
class FileTensor(Source):
    """A tensor in a file: ``shape`` is in numpy order, ``dtype`` in the spelling of the format.

    As a matrix it is ``(n_rows, n_cols)``: leading dimensions flattened; a vector or a scalar is one row.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def where(self) -> str:
        """File and name of the tensor, for messages."""
        return f"{self.file}: tensor {self.name}"

    @property
    def n_rows(self) -> int:
        """Number of rows: the product of all sizes but the last."""
        return math.prod(self.shape[:-1])

    @property
    def n_cols(self) -> int:
        """Number of weights in a row."""
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True)
class StoredTensor(FileTensor):
    """One tensor of a checkpoint; ``dtype`` is in the spelling of safetensors.

    Any dtype may be listed; reading fails for those that are not ``READABLE``.
    """

    @abstractmethod
    def first_bytes(self, n_bytes: int) -> bytes:
        """Return at most ``n_bytes`` bytes of the stored data, from its start; works for any dtype."""

    def require_readable(self) -> None:
        """Raise ``UnsupportedError`` unless the dtype is ``READABLE``."""
        if self.dtype not in READABLE:
            raise UnsupportedError(
                f"{self.where}: stored as {self.dtype!r}; wanted F32, F16, BF16 or FP8 (F8_E4M3): "
                "use the unquantized checkpoint"
            )


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Return whether two matrices have the same values; reads slabs of rows up to the first difference."""
    if first.shape != second.shape:
        return False
    slabs = row_slices(first.n_rows, first.n_cols)
    return all(np.array_equal(first.rows(slab), second.rows(slab)) for slab in slabs)


def some(names: Sequence[str], n_shown: int = 3) -> str:
    """Return the first names and the number of others, as text."""
    shown = ", ".join(names[:n_shown])
    return f"{shown}, … ({len(names) - n_shown} more)" if len(names) > n_shown else shown
