"""Second moments of what the matrices of a GGUF multiply, collected while llama.cpp runs tokens through it.

The diagonal, the mean square of every column's input, is what llama.cpp calls an importance matrix; sums and counts
are those of llama-imatrix (tools/imatrix/imatrix.cpp, ``collect_imatrix``), but in double precision. The full matrix
``E[x x^T]`` is the Hessian of a row's squared output error, up to a factor (GPTQ, arXiv 2210.17323, section 3).

Matrices that read the same rows (q, k and v; gate and up) share one computation and one set of arrays. Weights keep
their GGUF name: a tied embedding appears under its own as the output matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..compute.input_moments import Moments
from ..errors import GgmlError, TextError
from ..llamacpp import ggml
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
    """Run token sequences through a GGUF and return the moments of what its matrices multiply.

    In memory besides the model: the logits of 512 tokens, and ``8 * n_cols**2`` bytes for every distinct input of
    ``full_for``. Products use as many threads as the BLAS is allowed (``resources.blas_threads``).

    Args:
        file: the GGUF.
        tokens: ``(n_sequences, n_tokens)`` int32, ids as they are (no BOS is added); every sequence starts anew.
        only: names of the weights to look at; ``None`` for all that are multiplied.
        full_for: names of the matrices whose full second moments are wanted; stacks have none.
        n_threads: CPU threads of llama.cpp; ``None`` for ``llama.default_threads()``.
        progress: called with (tokens done, tokens in all).

    Returns:
        By GGUF name. Matrices that read the same rows share their arrays: compare with ``is``.

    Raises:
        TextError: no tokens, or tokens that the vocabulary does not have.
        VerifyError: the file cannot be loaded, or is no decoder.
        GgmlError: llama.cpp is missing or refuses, its tensors have another layout than the one known, activations
            are not finite, or what ``full_for`` names is a stack, or is not multiplied at all.

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
    lacking = sorted(set(full_for) - found.keys())
    if lacking:
        raise GgmlError(f"{file}: {lacking[0]} multiplies nothing; its second moments cannot be had")
    return found


def _range(tokens: Int32) -> str:
    return f"{tokens.min()} to {tokens.max()}" if tokens.size else "none"


def _pieces(n_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield first and last tokens of each graph: llama.cpp computes 512 of a sequence at a time."""
    for start in range(0, n_tokens, N_PHYSICAL_BATCH):
        yield start, min(start + N_PHYSICAL_BATCH, n_tokens)


def _read_only(moments: Moments) -> Moments:
    arrays = (moments.mean_squares, moments.counts)
    for array in arrays if moments.full is None else (*arrays, moments.full):
        array.flags.writeable = False
    return moments


class _Collector:
    """An ``llama.Observer`` that sums. Weights with the same input share the sums of the first of them, their owner."""

    def __init__(self, only: Collection[str] | None, full_for: Collection[str]) -> None:
        self._only, self._full_for = only, full_for
        self._sums: dict[str, _Sums] = {}  # by owner
        self._owners: dict[str, str] = {}
        self._read: dict[tuple[int, int | None, int, bool], str] = {}  # in the graph at hand: input -> owner

    def begin(self) -> None:
        """Begin a graph: addresses of the last one mean nothing any more."""
        self._read = {}

    def wants(self, product: ggml.Product) -> bool:
        """Return whether the product's rows are to be added; note whose they are."""
        name = product.weight
        if self._only is not None and name not in self._only:
            return False
        full = name in self._full_for
        if full and product.n_matrices > 1:
            raise GgmlError(f"{name}: a stack of {product.n_matrices} matrices has no one matrix of second moments")
        if name not in self._owners:
            key = (product.inputs, product.ids, product.n_matrices, full)
            self._owners[name] = self._read.setdefault(key, name)
            if self._owners[name] == name:
                self._sums[name] = _Sums(product.n_matrices, product.n_cols, full)
        return self._owners[name] == name

    def take(self, product: ggml.Product) -> None:
        """Add the rows of a product."""
        rows, matrices = ggml.product_rows(product)
        self._sums[product.weight].add(rows, matrices, product.weight)

    def results(self) -> Iterator[tuple[list[str], Moments]]:
        """Yield the names of weights with one input, and its moments, which are forgotten."""
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
        """Return means of the sums, which are gone then."""
        counts = np.maximum(self._counts, 1)[:, np.newaxis]
        squares = self._squares / counts
        if self._products is not None:
            self._products /= counts
        return Moments(squares[0] if len(squares) == 1 else squares, self._counts, self._products)
