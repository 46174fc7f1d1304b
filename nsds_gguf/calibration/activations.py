"""Second moments of the inputs of a GGUF's matrices, collected while llama.cpp evaluates tokens.

The diagonal, the mean square of every column's input, is the content of llama.cpp's importance matrices; sums and
counts are those of llama-imatrix (tools/imatrix/imatrix.cpp, ``collect_imatrix``), but in double precision. The full
matrix ``E[x x^T]`` is the Hessian of a row's squared output error, up to a factor (GPTQ, arXiv 2210.17323, section 3).

Matrices that share an input (q, k and v; gate and up) share one computation and one set of arrays. Names are those of
the GGUF: the output matrix of a tied model is ``token_embd.weight``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..compute.input_moments import Moments
from ..errors import GgmlError, TextError
from ..llamacpp import graph
from ..llamacpp.llama import N_PHYSICAL_BATCH, Int32, open_context, open_model
from ..records import Progress, no_progress


def collect(
    file: Path,
    tokens: Int32,
    *,
    only: Collection[str] | None = None,
    full_for: Collection[str] = (),
    n_threads: int | None = None,
    progress: Progress = no_progress,
) -> dict[str, Moments]:
    """Evaluate token sequences with llama.cpp and return the second moments of the inputs of matrices.

    In memory besides the model: the logits of 512 tokens, and ``8 * n_cols**2`` bytes for every distinct input of
    ``full_for``. Products use the threads allowed to BLAS (``resources.blas_threads``).

    Args:
        file: the GGUF.
        tokens: ``(n_sequences, n_tokens)`` int32, without added BOS; sequences are independent.
        only: names of the weights to observe; default: all that multiply an input.
        full_for: names of the matrices for which to collect full second moments; stacks have none.
        n_threads: CPU threads of llama.cpp; default: ``llama.default_threads()``.
        progress: called with (tokens done, total).

    Returns:
        Moments by GGUF name. Matrices that share an input share the arrays: compare with ``is``.

    Raises:
        TextError: no tokens, or tokens outside the vocabulary.
        VerifyError: the file cannot be loaded, or is not a decoder.
        GgmlError: llama.cpp is missing or fails, its tensors have an unknown layout, activations are not finite, or
            ``full_for`` names a stack or a tensor that multiplies no input.

    """
    collector = _Collector(None if only is None else {*only, *full_for}, frozenset(full_for))
    found: dict[str, Moments] = {}
    with open_model(file) as model:
        if not tokens.size or tokens.min() < 0 or tokens.max() >= model.n_vocab:
            raise TextError(f"{file}: wanted tokens from 0 to {model.n_vocab - 1}, got {_range(tokens)}")
        n_sequences, n_tokens = tokens.shape
        n_seq = min(n_sequences, max(1, N_PHYSICAL_BATCH // n_tokens))
        n_batch = min(n_seq * n_tokens, N_PHYSICAL_BATCH)
        with open_context(
            model, n_ctx=n_tokens, n_batch=n_batch, n_seq=n_seq, n_threads=n_threads, observer=collector
        ) as context:
            progress(0, tokens.size)
            for start in range(0, n_sequences, n_seq):
                group = tokens[start : start + n_seq]
                context.clear()
                for first, last in _pieces(n_tokens):
                    context.read(group[:, first:last], start=first)
                progress((start + len(group)) * n_tokens, tokens.size)
            for names, moments in context.observed():
                found |= dict.fromkeys(names, _read_only(replace(moments, names=tuple(names))))
    missing = sorted(set(full_for) - found.keys())
    if missing:
        raise GgmlError(f"{file}: {missing[0]} multiplies no input, so it has no second moments")
    return found


def _range(tokens: Int32) -> str:
    return f"{tokens.min()} to {tokens.max()}" if tokens.size else "none"


def _pieces(n_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield the token range of each graph: llama.cpp evaluates 512 tokens of a sequence at a time."""
    for start in range(0, n_tokens, N_PHYSICAL_BATCH):
        yield start, min(start + N_PHYSICAL_BATCH, n_tokens)


def _read_only(moments: Moments) -> Moments:
    arrays = (moments.mean_squares, moments.counts)
    for array in arrays if moments.full is None else (*arrays, moments.full):
        array.flags.writeable = False
    return moments


class _Collector:
    """An ``llama.Observer`` that sums. Weights that share an input use the sums of the first of them, their owner."""

    def __init__(self, only: Collection[str] | None, full_for: Collection[str]) -> None:
        self._only, self._full_for = only, full_for
        self._sums: dict[str, _Sums] = {}  # by owner
        self._owners: dict[str, str] = {}
        self._read: dict[tuple[int, int | None, int, bool], str] = {}  # in the current graph: input -> owner

    def begin(self) -> None:
        """Begin a graph: discard the addresses of the last one."""
        self._read = {}

    def wants(self, product: graph.Product) -> bool:
        """Return whether to add the rows of a product; register their owner."""
        name = product.weight
        if product.is_lookup or (self._only is not None and name not in self._only):
            return False
        full = name in self._full_for
        if full and product.n_matrices > 1:
            raise GgmlError(f"{name}: a stack of {product.n_matrices} matrices has no single matrix of second moments")
        if name not in self._owners:
            key = (product.inputs, product.ids, product.n_matrices, full)
            self._owners[name] = self._read.setdefault(key, name)
            if self._owners[name] == name:
                self._sums[name] = _Sums(product.n_matrices, product.n_cols, full)
        return self._owners[name] == name

    def take(self, product: graph.Product) -> None:
        """Add the rows of a product."""
        rows, matrices = graph.product_rows(product)
        self._sums[product.weight].add(rows, matrices, product.weight)

    def results(self) -> Iterator[tuple[list[str], Moments]]:
        """Yield the names of weights that share an input, and its moments; drop the sums."""
        for owner in list(self._sums):
            names = [name for name, of in self._owners.items() if of == owner]
            yield names, self._sums.pop(owner).moments()


class _Sums:
    def __init__(self, n_matrices: int, n_cols: int, full: bool) -> None:
        self._squares = np.zeros((n_matrices, n_cols))
        self._counts = np.zeros(n_matrices, np.int64)
        self._products = np.zeros((n_cols, n_cols)) if full else None

    def add(self, rows: NDArray[np.float32], matrices: NDArray[np.intp] | None, name: str) -> None:
        """Add rows ``(n_rows, n_cols)``, each to its matrix."""
        owners = [(0, rows)] if matrices is None else [(m, rows[matrices == m]) for m in np.unique(matrices)]
        for matrix, own in owners:
            self._squares[matrix] += np.einsum("ij,ij->j", own, own, dtype=np.float64)
            self._counts[matrix] += len(own)
        if not np.isfinite(self._squares).all():
            raise GgmlError(f"{name}: multiplies values that are not finite; the weights are damaged")
        if self._products is not None:
            self._products += rows.T @ rows

    def moments(self) -> Moments:
        """Convert the sums to means, in place."""
        counts = np.maximum(self._counts, 1)[:, np.newaxis]
        squares = self._squares / counts
        if self._products is not None:
            self._products /= counts
        return Moments(squares[0] if len(squares) == 1 else squares, self._counts, self._products)
