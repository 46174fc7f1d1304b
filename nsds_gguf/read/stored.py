"""One tensor of a checkpoint, whatever file holds it: the contract between the weight formats and the model folder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError, UnsupportedError
from ..records import Float32

READABLE = ("F32", "F16", "BF16", "F8_E4M3", "F8_E8M0")  # the last holds scales of FP8 weights

_COMPARED_AT_ONCE = 1 << 20  # weights, 4 MiB as float32
_COUNTED_AT_ONCE = 1 << 20  # weights, 4 MiB as float32


@dataclass(frozen=True)
class StoredTensor(ABC):
    """One tensor of a checkpoint: ``shape`` is in numpy order, ``dtype`` in the spelling of safetensors.

    As a matrix it is ``(n_rows, n_cols)``: leading dimensions flattened, a vector or a number one row. Any dtype may
    be listed; those that are not ``READABLE`` fail when they are read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def n_rows(self) -> int:
        """Rows: the product of all sizes but the last."""
        return math.prod(self.shape[:-1])

    @property
    def n_cols(self) -> int:
        """Weights of a row."""
        return self.shape[-1] if self.shape else 1

    @abstractmethod
    def values(self, rows: slice | NDArray[np.intp], columns: slice) -> Float32:
        """Return the weights of some rows and columns as a fresh float32 matrix, finite or not."""

    @abstractmethod
    def first_bytes(self, n_bytes: int) -> bytes:
        """Return at most ``n_bytes`` bytes of what is stored, from its start; any dtype will do."""

    def read_rows(self, index: slice | NDArray[np.intp]) -> Float32:
        """Return the rows of ``index`` as a fresh ``(n, n_cols)`` float32 array.

        Raises ``UnsupportedError`` when the dtype is not ``READABLE``, ``ModelError`` when the file has shrunk since it
        was opened, or a weight is NaN or infinite.
        """
        return self._finite(self.values(index, slice(None)))

    def read_columns(self, start: int, stop: int) -> Float32:
        """Return columns ``start`` to ``stop`` as a fresh ``(n_rows, stop - start)`` float32 array.

        Raises what ``read_rows`` does.
        """
        return self._finite(self.values(slice(None), slice(start, stop)))

    def require_readable(self) -> None:
        """Raise ``UnsupportedError`` unless the dtype is ``READABLE``."""
        if self.dtype not in READABLE:
            raise UnsupportedError(
                f"{self.file}: tensor {self.name}: stored as {self.dtype!r}; wanted F32, F16, BF16 or FP8 (F8_E4M3): "
                "use the unquantized checkpoint"
            )

    def _finite(self, values: Float32) -> Float32:
        if not np.isfinite(values).all():
            raise self._not_finite()
        return values

    def _not_finite(self) -> ModelError:
        """Return the error that counts what is not finite in the whole tensor."""
        n_nan = n_infinite = 0
        step = max(1, _COUNTED_AT_ONCE // self.n_cols)
        for start in range(0, self.n_rows, step):
            rows = self.values(slice(start, start + step), slice(None))
            n_nan += int(np.isnan(rows).sum())
            n_infinite += int(np.isinf(rows).sum())
        return ModelError(
            f"{self.file}: tensor {self.name}: {n_nan} NaN and {n_infinite} infinite of {math.prod(self.shape)} "
            "weights; wanted finite numbers: the checkpoint is damaged, download it again"
        )


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Return whether two matrices hold the same numbers, reading a slab of rows at a time up to a difference."""
    if first.shape != second.shape:
        return False
    step = max(1, _COMPARED_AT_ONCE // max(1, first.n_cols))
    slabs = (slice(start, start + step) for start in range(0, first.n_rows, step))
    return all(np.array_equal(first.read_rows(slab), second.read_rows(slab)) for slab in slabs)


def some(names: Sequence[str], n_shown: int = 3) -> str:
    """Return the first of many names, and how many more there are."""
    shown = ", ".join(names[:n_shown])
    return f"{shown}, … ({len(names) - n_shown} more)" if len(names) > n_shown else shown
