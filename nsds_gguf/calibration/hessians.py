"""Hessians for GPTQ rounding: ``E[x x^T]`` of the inputs of matrices, on disk until they are factored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..compute.backend import Tokens
from ..compute.input_moments import Moments, NamedHessian
from ..llamacpp.rules import kept_reason
from ..quantize.equalization import Equalization
from ..quantize.hessian_factors import FactorStore
from ..quantize.triangle import mirrored, n_packed, packed, unpacked
from ..records import Float32, Float64, Model, Progress, no_progress
from ..system.resources import available_memory_bytes
from ..system.store import Store
from ..system.workers import FAR_AHEAD, Workers
from ..system.workfolder import output_error
from .activations import collect

HESSIANS = "Hessians"  # begins the names of their records
_INPUTS = f"{HESSIANS}/inputs"

_SHARE_OF_MEMORY = 0.25  # of the available memory, for the Hessians of one run of llama.cpp
_LEAST_BYTES = 1 << 28


@dataclass(frozen=True)
class HessianFile:
    """A Hessian in a file.

    Attributes:
        path: of its upper triangle, float32, ``packed``, as ``numpy.save`` writes it.
        record: the store that it is a record of, and its name there.

    """

    path: Path
    record: tuple[Store, str] | None = None

    def read(self) -> Float32:
        """Return the Hessian."""
        return mirrored(unpacked(np.load(self.path, mmap_mode="r", allow_pickle=False)))

    def remove(self) -> None:
        """Remove the file."""
        if self.record is None:
            self.path.unlink(missing_ok=True)
        else:
            store, name = self.record
            store.remove(name)


# Stored names of the matrices that share an input, and its Hessian.
FoundHessian = tuple[tuple[str, ...], Float32 | HessianFile]


class HessianFiles:
    """Hessians on disk, one file per input: in a folder of the caller, who removes it, or as records."""

    def __init__(self, folder: Path, records: Store | None = None) -> None:
        """Take an existing folder, and a store to use instead of it."""
        self._folder, self._records = folder, records
        self._files: dict[tuple[str, ...], HessianFile] = {}

    def add(self, names: tuple[str, ...], hessian: NDArray[np.float32]) -> None:
        """Write the Hessian of the matrices that share an input; raise ``OutputError`` when the disk is full."""
        if self._records is not None:
            with self._records.put_file(_record_name(names)) as path, path.open("wb") as file:
                np.save(file, packed(hessian), allow_pickle=False)
            self._know(names, self._records)
            return
        path = self._folder / f"hessian-{len(self._files)}.npy"
        try:
            np.save(path, packed(hessian))
        except OSError as error:
            raise output_error(path, error) from error
        self._files[names] = HessianFile(path)

    def recall(self, names: tuple[str, ...]) -> bool:
        """Take the Hessian of an input from the records; return whether it is there."""
        if self._records is None or self._records.get_file(_record_name(names)) is None:
            return False
        self._know(names, self._records)
        return True

    def take(self) -> Iterator[FoundHessian]:
        """Yield the Hessians that were added or recalled, in that order; the caller removes their files."""
        while self._files:
            names = next(iter(self._files))
            yield names, self._files.pop(names)

    def put_inputs(self) -> None:
        """Record that the Hessians are all there."""
        if self._records is not None:
            self._records.put(_INPUTS, sorted({*self.recorded_inputs(), *self._files}))

    def recorded_inputs(self) -> list[tuple[str, ...]]:
        """Return the names that share an input, for every input of which ``put_inputs`` recorded the Hessian."""
        found = None if self._records is None else self._records.get(_INPUTS)
        return [tuple(names) for names in found or ()]

    def _know(self, names: tuple[str, ...], records: Store) -> None:
        name = _record_name(names)
        self._files[names] = HessianFile(records.file_path(name), (records, name))


def _record_name(names: tuple[str, ...]) -> str:
    return f"{HESSIANS}/{' '.join(names)}"


def callback_hessians(
    original: Callable[[], AbstractContextManager[Path]],
    tokens: Tokens,
    moments: Mapping[str, Moments],
    inputs: Sequence[tuple[str, ...]],
    n_threads: int | None = None,
) -> Iterator[NamedHessian]:
    """Yield Hessians collected by llama.cpp's callback, for models that the Fisher pass does not support.

    llama.cpp reads the tokens once per group of inputs whose Hessians fit in a quarter of the available memory, at 8
    bytes per entry.

    Args:
        original: provides the model as a GGUF.
        tokens: ``(n_sequences, n_positions)`` ids.
        moments: of the same tokens, by stored name.
        inputs: names of the matrices that share an input, as ``shared_inputs`` returns them.
        n_threads: CPU threads.

    Raises:
        GgmlError: llama.cpp refuses.

    """
    if not inputs:
        return
    ids = tokens.astype(np.int32)
    with original() as file:
        for group in _groups(moments, inputs, _budget_bytes()):
            names = [name for sharing in group for name in sharing]
            found = collect(file, ids, only=names, full_for=names, n_threads=n_threads)
            for sharing in group:
                full = found[sharing[0]].full
                if full is not None:
                    yield sharing, full.astype(np.float32)


def shared_inputs(moments: Mapping[str, Moments], names: Collection[str]) -> list[tuple[str, ...]]:
    """Return the names of the matrices that share an input, for every input; matrices without moments are left out."""
    by_input: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        if name in moments:
            by_input.setdefault(moments[name].names, []).append(name)
    return [tuple(sharing) for sharing in by_input.values()]


def _groups(
    moments: Mapping[str, Moments], inputs: Sequence[tuple[str, ...]], max_bytes: int
) -> Iterator[list[tuple[str, ...]]]:
    """Yield groups of inputs whose Hessians fit in ``max_bytes``, at least one per group."""
    group, n_bytes = list[tuple[str, ...]](), 0
    for sharing in inputs:
        n_cols = moments[sharing[0]].mean_squares.shape[-1]
        if group and n_bytes + 8 * n_cols**2 > max_bytes:
            yield group
            group, n_bytes = [], 0
        group, n_bytes = [*group, sharing], n_bytes + 8 * n_cols**2
    if group:
        yield group


def _budget_bytes() -> int:
    return max(_LEAST_BYTES, int(_SHARE_OF_MEMORY * (available_memory_bytes() or 0)))


def factor_hessians(
    model: Model,
    hessians: Iterable[FoundHessian],
    factors: FactorStore,
    shrinkage: float,
    roles: Roles,
    workers: Workers,
    progress: Progress = no_progress,
) -> FactorStore:
    """Factor the Hessians of a model's matrices, one at a time in each process.

    Args:
        model: the model.
        hessians: of the stored matrices; files are removed once factored. Inputs that are all zero are skipped, their
            files stay.
        factors: receives the factors, and is returned.
        shrinkage: of the off-diagonal; see ``factor_hessian``.
        roles: how the matrices are used and equalized.
        workers: factor, an input per task.
        progress: called with (matrices done, total).

    Raises:
        ModelError: a Hessian cannot be factored.
        OutputError: the disk is full.

    """
    total, head = len(multiplied(model)), model.unembedding().name
    progress(len(factors.names), total)

    def tasks() -> Iterator[_Factoring]:
        for names, hessian in hessians:
            if factors.recall(names):
                _remove(hessian)
                continue
            looked_up = roles.looked_up if model.is_tied and head in names else None
            equalization = roles.equalization.only(names[0])
            yield _Factoring(names, hessian, looked_up, equalization, factors.only(), shrinkage)

    with closing(workers.ordered(_factor, tasks(), ahead=FAR_AHEAD, is_large=True)) as factored:
        for task, path in factored:
            if path is not None:
                factors.know(task.names, path)
                _remove(task.hessian)
            progress(len(factors.names), total)
    progress(total, total)
    return factors


@dataclass(frozen=True)
class Roles:
    """How matrices whose Hessians are factored are used.

    Attributes:
        looked_up: for a tied embedding, the share of its sensitivity that is due to lookups.
        equalization: of the matrices: their Hessians are those of the equalized ones.

    """

    looked_up: float = 0.0
    equalization: Equalization = field(default_factory=Equalization)


@dataclass(frozen=True)
class _Factoring:
    """A Hessian or its file, what becomes of it, and where its factors go."""

    names: tuple[str, ...]
    hessian: Float32 | HessianFile
    looked_up: float | None
    equalization: Equalization
    factors: FactorStore
    shrinkage: float


def _remove(hessian: Float32 | HessianFile) -> None:
    if isinstance(hessian, HessianFile):
        hessian.remove()


def _factor(task: _Factoring) -> Path | None:
    """Write the factors of a Hessian; return their file, or ``None`` for an input that is all zero."""
    found = task.hessian.read() if isinstance(task.hessian, HessianFile) else task.hessian
    hessian: NDArray[np.floating] = task.equalization.moments(task.names[0], found)
    if task.looked_up is not None:
        hessian = mixed_roles(hessian.astype(np.float64), task.looked_up)
    if hessian.diagonal().mean() <= 0:
        return None
    return task.factors.write(task.names, hessian, task.shrinkage)


def mixed_roles(moments: Float64, looked_up: float) -> Float64:
    """Return column moments, or a Hessian, of a tied embedding: both roles, weighted by share of the sensitivity.

    Looked-up rows enter the stream, where noise counts equally in all channels.

    Args:
        moments: ``(n_cols,)`` or ``(n_cols, n_cols)``, of the input of the output matrix.
        looked_up: share of lookups, from 0 to 1.

    """
    scale = (moments if moments.ndim == 1 else moments.diagonal()).mean()
    uniform = np.ones(len(moments)) if moments.ndim == 1 else np.eye(len(moments))
    mixed: Float64 = (1 - looked_up) * moments + looked_up * scale * uniform
    return mixed


def multiplied(model: Model) -> list[str]:
    """Return the names of the quantized plain matrices that multiply an input: those of layers, and the output."""
    output = model.unembedding().name
    quantized = [tensor for tensor in model.tensors if not kept_reason(tensor, model.architecture)]
    return [t.name for t in quantized if len(t.shape) == 2 and (t.layer is not None or t.name == output)]


def note(model: Model, factors: FactorStore) -> str:
    """Return the note on the matrices that GPTQ rounding covers, and those that it does not."""
    matrices = [t for t in model.tensors if t.is_matrix and not kept_reason(t, model.architecture)]
    uncovered = [tensor.name for tensor in matrices if tensor.name not in factors.names]
    n_weights = sum(tensor.n_weights for tensor in matrices)
    share = sum(tensor.n_weights for tensor in matrices if tensor.name in factors.names) / max(n_weights, 1)
    coverage = (
        f"GPTQ rounding covers {len(matrices) - len(uncovered)} of {len(matrices)} matrices "
        f"({100 * share:.0f} % of their weights)"
    )
    if not uncovered:
        return f"{coverage}."
    others = [*uncovered[:3], *([f"{len(uncovered) - 3} more"] if len(uncovered) > 3 else [])]
    return f"{coverage}; rounded to nearest: {', '.join(others)}."


def disk_bytes(model: Model) -> int:
    """Return an upper bound on the disk space of Hessians and factors: as if no matrices shared an input."""
    columns = {name: model.by_name[name].n_cols for name in multiplied(model)}
    return sum(4 * n_packed(n) for n in columns.values())
