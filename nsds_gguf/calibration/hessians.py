"""Hessians for GPTQ rounding: ``E[x x^T]`` of the inputs of matrices, on disk until they are factored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from ..records import Float32, Float64, Model, Progress, no_progress
from ..system.resources import available_memory_bytes
from ..system.workers import FAR_AHEAD, Workers
from ..system.workfolder import output_error
from .activations import collect

_SHARE_OF_MEMORY = 0.25  # of the available memory, for the Hessians of one run of llama.cpp
_LEAST_BYTES = 1 << 28


class HessianFiles:
    """Hessians in a folder of the caller, who removes it: float32, one file per input."""

    def __init__(self, folder: Path) -> None:
        """Take an existing folder."""
        self._folder = folder
        self._files: dict[Path, tuple[str, ...]] = {}

    def add(self, names: tuple[str, ...], hessian: NDArray[np.float32]) -> None:
        """Write the Hessian of the matrices that share an input; raise ``OutputError`` when the disk is full."""
        path = self._folder / f"hessian-{len(self._files)}.npy"
        try:
            np.save(path, hessian)
        except OSError as error:
            raise output_error(path, error) from error
        self._files[path] = names

    def take(self) -> Iterator[NamedHessian]:
        """Yield the Hessians in the order of ``add``, as read-only maps of their files, which the caller removes."""
        for path, names in list(self._files.items()):
            del self._files[path]
            yield names, np.load(path, allow_pickle=False, mmap_mode="r")


def callback_hessians(
    original: Callable[[], AbstractContextManager[Path]],
    tokens: Tokens,
    moments: Mapping[str, Moments],
    names: Collection[str],
    n_threads: int | None = None,
) -> Iterator[NamedHessian]:
    """Yield Hessians collected by llama.cpp's callback, for models that the Fisher pass does not support.

    llama.cpp reads the tokens once per group of inputs whose Hessians fit in a quarter of the available memory, at 8
    bytes per entry.

    Args:
        original: provides the model as a GGUF.
        tokens: ``(n_sequences, n_positions)`` ids.
        moments: of the same tokens, by stored name.
        names: matrices, no stacks; matrices without moments are skipped.
        n_threads: CPU threads.

    Raises:
        GgmlError: llama.cpp refuses.

    """
    ids = tokens.astype(np.int32)
    with original() as file:
        for group in _groups(moments, names, _budget_bytes()):
            found = collect(file, ids, only=group, full_for=group, n_threads=n_threads)
            for moment in {found[name].names: found[name] for name in group}.values():
                if moment.full is not None:
                    yield moment.names, moment.full.astype(np.float32)


def _groups(moments: Mapping[str, Moments], names: Collection[str], max_bytes: int) -> Iterator[list[str]]:
    """Yield groups of names whose Hessians fit in ``max_bytes``: whole inputs, at least one per group."""
    by_input: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        if name in moments:
            by_input.setdefault(moments[name].names, []).append(name)
    group, n_bytes = list[str](), 0
    for sharing in by_input.values():
        n_cols = moments[sharing[0]].mean_squares.shape[-1]
        if group and n_bytes + 8 * n_cols**2 > max_bytes:
            yield group
            group, n_bytes = [], 0
        group, n_bytes = [*group, *sharing], n_bytes + 8 * n_cols**2
    if group:
        yield group


def _budget_bytes() -> int:
    return max(_LEAST_BYTES, int(_SHARE_OF_MEMORY * (available_memory_bytes() or 0)))


def factor_hessians(
    model: Model,
    hessians: Iterable[NamedHessian],
    factors: FactorStore,
    shrinkage: float,
    roles: Roles,
    workers: Workers,
    progress: Progress = no_progress,
) -> FactorStore:
    """Factor the Hessians of a model's matrices, one at a time in each process.

    Args:
        model: the model.
        hessians: of the stored matrices; inputs that are all zero are skipped. The files of those that are maps are
            removed once factored.
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
    progress(0, total)

    def tasks() -> Iterator[_Factoring]:
        for names, found in hessians:
            hessian = Path(str(found.filename)) if isinstance(found, np.memmap) else found
            del found  # the map of a file that will be removed
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
    hessian: Float32 | Path
    looked_up: float | None
    equalization: Equalization
    factors: FactorStore
    shrinkage: float


def _remove(hessian: Float32 | Path) -> None:
    if isinstance(hessian, Path):
        hessian.unlink()


def _factor(task: _Factoring) -> Path | None:
    """Write the factors of a Hessian; return their file, or ``None`` for an input that is all zero."""
    found = np.load(task.hessian, allow_pickle=False) if isinstance(task.hessian, Path) else task.hessian
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
    return sum(4 * n**2 for n in columns.values())
