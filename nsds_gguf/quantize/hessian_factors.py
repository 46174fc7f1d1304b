"""Hessians of matrices' inputs, factored for GPTQ, and stored on disk, a file per input."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError
from ..records import Float32, Float64
from ..system.store import Store, file_name
from ..system.workfolder import output_error
from .cholesky import cholesky
from .triangle import packed, unpacked

FACTORS = "Hessian factors"  # begins the names of their records

SHRINKAGE = 0.05  # share by which entries off a Hessian's diagonal are reduced
DAMPING = 1e-3  # share of the mean of a Hessian's diagonal that is added to it

_IN_MEMORY = 3  # factors in memory: of the current tensor, the next one, and one spare
_PANEL = 256  # columns of one matrix product over a triangle
_PACKED = "upper"  # the field that files hold as a triangle
_NESTED = (16, 32, 64, 256)  # columns of blocks and sub-blocks of all formats

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class HessianFactors:
    """A Hessian ``H``, for all matrices with the same input, its columns in the order in which they are rounded.

    ``H[order][:, order] = U diag(v) U^T``.

    Attributes:
        upper: ``(n_cols, n_cols)`` float32, U: unit upper triangular.
        variances: ``(n_cols,)`` float32, v: variance of each column given the columns that are rounded after it.
        diagonal: ``(n_cols,)`` float32, diagonal of H, in the order of the matrix.
        order: ``(n_cols,)`` int64, the column of the matrix that is rounded first, second and so on.

    """

    upper: Float32
    variances: Float32
    diagonal: Float32
    order: Int64

    def row_errors(self, errors: Float32) -> Float64:
        """Return ``e^T H e`` of every row: ``(n_rows, n_cols)`` float32 to ``(n_rows,)``."""
        total: Float64 = np.zeros(len(errors))
        ordered = errors[:, self.order]
        for start in range(0, errors.shape[1], _PANEL):
            stop = min(start + _PANEL, errors.shape[1])
            reduced = ordered[:, :stop] @ self.upper[:stop, start:stop]
            total += np.square(reduced, out=reduced) @ self.variances[start:stop]
        return total

    def spread(self, order: NDArray[np.intp]) -> HessianFactors:
        """Return the factors for padded columns: column i is column ``order[i]``, or always zero where it is negative.

        Zero inputs get the variance that damping gives dead columns, and no correlation with other columns. The columns
        are ordered and factored again: their blocks are those of the padded rows.
        """
        stored = np.flatnonzero(order >= 0)
        mine: Float64 = (self.upper * self.variances).astype(np.float64) @ self.upper.T
        place = np.empty(len(stored), dtype=np.intp)  # of each column of this Hessian among the padded ones
        place[order[stored]] = stored
        padded = np.zeros((len(order), len(order)))
        padded[np.ix_(place[self.order], place[self.order])] = mine
        dead = np.flatnonzero(order < 0)
        padded[dead, dead] = DAMPING * self.diagonal.mean()
        return factor_hessian(padded, shrinkage=0.0, damping=0.0)


def rounding_order(diagonal: NDArray[np.floating]) -> Int64:
    """Return the order in which GPTQ rounds columns: those with large inputs first, as later columns compensate them.

    Blocks of 256 columns come by falling mean of the diagonal; so do the blocks of 64 within them, those of 32 and of
    16 within these, and single columns last. So every block and sub-block of every type keeps its columns, and they
    stay neighbours (Frantar et al., arXiv 2210.17323, call the order of single columns act-order).

    Args:
        diagonal: ``(n_cols,)`` of a Hessian.

    """
    keys, numbers = list[NDArray[Any]]([-diagonal]), np.arange(len(diagonal))
    for size in (each for each in _NESTED if len(diagonal) % each == 0):
        means = diagonal.reshape(-1, size).mean(axis=1)
        keys += [numbers // size, -means.repeat(size)]
    return np.lexsort(keys)


def factor_hessian(
    hessian: NDArray[np.floating], *, shrinkage: float = SHRINKAGE, damping: float = DAMPING, n_threads: int = 1
) -> HessianFactors:
    """Factor a Hessian.

    In memory: one float64 matrix of its size, and one of float32 that stays.

    Args:
        hessian: ``(n_cols, n_cols)``, symmetric, positive semidefinite up to rounding. It may have low rank and columns
            of zeros.
        shrinkage: share by which entries off the diagonal are reduced, against sampling noise: 0.05 suits moments of
            8000 tokens and more, 0.2 those of 2000 (docs/log.md, 2026-11-25). Unlike damping it treats columns of small
            and large moments alike.
        damping: share of the mean of the diagonal that is added to the diagonal, for dead columns.
        n_threads: CPU threads; they do not change the result.

    Raises:
        ModelError: the Hessian is not finite, is zero, or is not positive definite after both.

    """
    n_cols = len(hessian)
    order = rounding_order(hessian.diagonal())
    reverse: Float64 = np.empty(hessian.shape)
    for start in range(0, n_cols, _PANEL):
        rows = order[::-1][start : start + _PANEL]
        reverse[start : start + _PANEL] = hessian[np.ix_(rows, order[::-1])]
    diagonal = reverse.diagonal().copy()
    mean = float(diagonal.mean())
    check_factorable(bool(np.isfinite(reverse).all()), mean)
    diagonal += damping * mean
    reverse *= 1 - shrinkage
    np.fill_diagonal(reverse, diagonal)
    failed = cholesky(reverse, n_threads)
    if failed:
        raise not_definite(shrinkage, damping, order[n_cols - failed])
    pivots = reverse.diagonal()[::-1].copy()
    upper = np.empty((n_cols, n_cols), dtype=np.float32)
    for start in range(0, n_cols, _PANEL):
        stop = min(start + _PANEL, n_cols)
        upper[:, start:stop] = reverse[::-1, n_cols - stop : n_cols - start][:, ::-1] / pivots[start:stop]
    kept = hessian.diagonal() + damping * mean
    return HessianFactors(upper, np.square(pivots).astype(np.float32), kept.astype(np.float32), order)


def check_factorable(is_finite: bool, mean: float) -> None:
    """Raise ``ModelError`` for a Hessian that is not finite, or whose diagonal has no positive mean."""
    if not is_finite or mean <= 0:
        raise ModelError(f"Hessian: wanted finite numbers and a positive diagonal, got a diagonal of mean {mean:g}")


def not_definite(shrinkage: float, damping: float, column: int) -> ModelError:
    """Return the error of a Hessian that cannot be factored; ``column`` is the first that fails."""
    return ModelError(
        f"Hessian: not positive definite with shrinkage {shrinkage:g} and damping {damping:g} (column {column})"
    )


class _Recent:
    """The factors last read from files; a pickle of it stands for those of the process that loads it."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[Path, int, int], HessianFactors] = OrderedDict()
        self._lock = Lock()

    def read(self, path: Path) -> HessianFactors:
        """Return the factors in a file."""
        state = path.stat()
        key = path, state.st_size, state.st_mtime_ns
        with self._lock:
            if key not in self._found:
                with np.load(path, allow_pickle=False) as stored:
                    arrays = {name: stored[name] for name in stored.files}
                self._found[key] = HessianFactors(**{**arrays, _PACKED: unpacked(arrays[_PACKED])})
            self._found.move_to_end(key)
            while len(self._found) > _IN_MEMORY:
                self._found.popitem(last=False)
            return self._found[key]

    def __reduce__(self) -> tuple[Callable[[], _Recent], tuple[()]]:
        return _recent_of_process, ()


@functools.lru_cache(maxsize=1)
def _recent_of_process() -> _Recent:
    return _Recent()


# Factors a Hessian; takes ``hessian`` and the keyword ``shrinkage``. It pickles.
Factoring = Callable[..., HessianFactors]


class FactorStore:
    """Hessian factors by tensor name, as files in a folder that the caller removes, or as records.

    Records outlive the run: an input with recorded factors is not factored again. A store pickles: another process
    reads and writes the same files.
    """

    def __init__(self, folder: Path, records: Store | None = None, factoring: Factoring = factor_hessian) -> None:
        """Take an existing folder, a store to use instead of it, and the function that factors."""
        self._folder, self._records, self._factoring = folder, records, factoring
        self._files: dict[str, Path] = {}
        self._recent = _Recent()

    def add(self, names: Collection[str], hessian: NDArray[np.floating], shrinkage: float) -> None:
        """Factor the Hessian, ``(n_cols, n_cols)``, of an input that these tensors share; see ``factor_hessian``.

        Raises ``OutputError`` when the disk is full.
        """
        self.know(names, self.write(names, hessian, shrinkage))

    def write(self, names: Collection[str], hessian: NDArray[np.floating], shrinkage: float) -> Path:
        """Do the work of ``add``, in any process, and return the file."""
        factors = self._factoring(hessian, shrinkage=shrinkage)
        arrays = {f.name: getattr(factors, f.name) for f in fields(HessianFactors)}
        arrays[_PACKED] = packed(factors.upper)
        name = record_name(names)
        if self._records is not None:
            with self._records.put_file(name) as path, path.open("wb") as stream:
                np.savez(stream, **arrays)
            return self._records.file_path(name)
        path = self._folder / f"{file_name(name)}.npz"
        try:
            np.savez(path, **arrays)
        except OSError as error:
            raise output_error(path, error) from error
        return path

    def know(self, names: Collection[str], path: Path) -> None:
        """Take the file that ``write`` returned for an input."""
        self._files.update(dict.fromkeys(names, path))

    def only(self, names: Collection[str] = ()) -> FactorStore:
        """Return the store of a few tensors, small enough to send."""
        part = FactorStore(self._folder, self._records)
        part._files = {name: self._files[name] for name in names if name in self._files}
        part._recent = self._recent
        return part

    def recall(self, names: Collection[str]) -> bool:
        """Load the factors of an input from the records; return whether there are any."""
        path = None if self._records is None else self._records.get_file(record_name(names))
        if path is not None:
            self._files.update(dict.fromkeys(names, path))
        return path is not None

    def of(self, name: str) -> HessianFactors | None:
        """Return the factors of a tensor, ``None`` where it has none."""
        path = self._files.get(name)
        return None if path is None else self._recent.read(path)

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


def record_name(names: Collection[str]) -> str:
    """Return the name of the record of an input's factors."""
    return f"{FACTORS}/{' '.join(sorted(names))}"
