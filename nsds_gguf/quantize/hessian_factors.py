"""Hessians of matrices' inputs, factored for GPTQ, and stored on disk, a file per input."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError
from ..records import Float32, Float64
from ..system.store import Store
from ..system.workfolder import output_error

_IN_MEMORY = 3  # factors in memory: of the current tensor, the next one, and one spare
_PANEL = 256  # columns of one matrix product over a triangle


@dataclass(frozen=True)
class HessianFactors:
    """A Hessian ``H = U diag(v) U^T``, for all matrices with the same input.

    Attributes:
        upper: ``(n_cols, n_cols)`` float32, U: unit upper triangular.
        variances: ``(n_cols,)`` float32, v: variance of each column given the columns to its right.
        diagonal: ``(n_cols,)`` float32, diagonal of H.

    """

    upper: Float32
    variances: Float32
    diagonal: Float32

    def row_errors(self, errors: Float32) -> Float64:
        """Return ``e^T H e`` of every row: ``(n_rows, n_cols)`` float32 to ``(n_rows,)``."""
        total: Float64 = np.zeros(len(errors))
        for start in range(0, errors.shape[1], _PANEL):
            stop = min(start + _PANEL, errors.shape[1])
            reduced = errors[:, :stop] @ self.upper[:stop, start:stop]
            total += np.square(reduced, out=reduced) @ self.variances[start:stop]
        return total


def factor_hessian(hessian: NDArray[np.floating], *, shrinkage: float = 0.05, damping: float = 1e-3) -> HessianFactors:
    """Factor a Hessian.

    In memory: two float64 matrices of its size, and one of float32 that stays.

    Args:
        hessian: ``(n_cols, n_cols)``, symmetric, positive semidefinite up to rounding. It may have low rank and columns
            of zeros.
        shrinkage: share by which entries off the diagonal are reduced, against sampling noise: 0.05 suits moments of
            8000 tokens and more, 0.2 those of 2000 (docs/log.md, 2026-11-25). Unlike damping it treats columns of small
            and large moments alike.
        damping: share of the mean of the diagonal that is added to the diagonal, for dead columns.

    Raises:
        ModelError: the Hessian is not finite, is zero, or is not positive definite after both.

    """
    h: Float64 = np.array(hessian, dtype=np.float64)
    diagonal = h.diagonal().copy()
    mean = float(diagonal.mean())
    if not np.isfinite(h).all() or mean <= 0:
        raise ModelError(f"Hessian: wanted finite numbers and a positive diagonal, got a diagonal of mean {mean:g}")
    diagonal += damping * mean
    h *= 1 - shrinkage
    np.fill_diagonal(h, diagonal)
    try:
        upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError as error:
        raise ModelError(
            f"Hessian: not positive definite with shrinkage {shrinkage:g} and damping {damping:g}: {error}"
        ) from error
    pivots = upper.diagonal().copy()
    return HessianFactors(
        np.ascontiguousarray(upper / pivots, dtype=np.float32),
        np.square(pivots).astype(np.float32),
        diagonal.astype(np.float32),
    )


# Factors a Hessian; takes ``hessian`` and the keyword ``shrinkage``.
Factoring = Callable[..., HessianFactors]


class FactorStore:
    """Hessian factors by tensor name, as files in a folder that the caller removes, or as records.

    Records outlive the run: an input with recorded factors is not factored again.
    """

    def __init__(self, folder: Path, records: Store | None = None, factoring: Factoring = factor_hessian) -> None:
        """Take an existing folder, a store to use instead of it, and the function that factors."""
        self._folder, self._records, self._factoring = folder, records, factoring
        self._files: dict[str, Path] = {}
        self._recent: OrderedDict[Path, HessianFactors] = OrderedDict()
        self._lock = Lock()

    def add(self, names: Collection[str], hessian: NDArray[np.floating], shrinkage: float) -> None:
        """Factor the Hessian, ``(n_cols, n_cols)``, of an input that these tensors share; see ``factor_hessian``.

        Raises ``OutputError`` when the disk is full.
        """
        factors = self._factoring(hessian, shrinkage=shrinkage)
        arrays = {f.name: getattr(factors, f.name) for f in fields(HessianFactors)}
        if self._records is not None:
            with self._records.put_file(_record_name(names)) as path, path.open("wb") as stream:
                np.savez(stream, **arrays)
            self.recall(names)
            return
        path = self._folder / f"{len(self._files)}.npz"
        try:
            np.savez(path, **arrays)
        except OSError as error:
            raise output_error(path, error) from error
        self._files.update(dict.fromkeys(names, path))

    def recall(self, names: Collection[str]) -> bool:
        """Load the factors of an input from the records; return whether there are any."""
        path = None if self._records is None else self._records.get_file(_record_name(names))
        if path is not None:
            self._files.update(dict.fromkeys(names, path))
        return path is not None

    def of(self, name: str) -> HessianFactors | None:
        """Return the factors of a tensor, ``None`` where it has none."""
        path = self._files.get(name)
        if path is None:
            return None
        with self._lock:
            if path not in self._recent:
                with np.load(path, allow_pickle=False) as arrays:
                    self._recent[path] = HessianFactors(**{key: arrays[key] for key in arrays.files})
            self._recent.move_to_end(path)
            while len(self._recent) > _IN_MEMORY:
                self._recent.popitem(last=False)
            return self._recent[path]

    @property
    def inputs(self) -> list[list[str]]:
        """Tensors with factors, grouped by input."""
        alike: dict[Path, list[str]] = {}
        for name, path in self._files.items():
            alike.setdefault(path, []).append(name)
        return list(alike.values())

    @property
    def names(self) -> Collection[str]:
        """Tensors with factors."""
        return self._files.keys()


def _record_name(names: Collection[str]) -> str:
    return f"Hessian factors/{' '.join(sorted(names))}"
