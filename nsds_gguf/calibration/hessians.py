"""Second moments of what matrices multiply, ``E[x x^T]``, for rounding with feedback: from tokens drawn or written.

As many are gathered in one reading of the tokens as fit in memory; their factors go to disk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..compute.layers import view_layer
from ..llamacpp.rules import kept_reason
from ..quantize.rounding import Feedbacks
from ..records import Float32, Model, Progress, no_progress
from ..sensitivity.fisher import Tokens, mixed_roles, read_tokens
from ..system.resources import available_memory_bytes
from .generated_text import OwnText

N_DRAWN = 8192  # tokens, where the model does not write them itself
SHRINKAGE_DRAWN, SHRINKAGE_OWN = 0.3, 0.05  # of what is off the diagonal: how far it is mistrusted (docs/log.md)
BATCH_SEQUENCES = 4  # read at a time
SHARE_OF_MEMORY = 0.25  # of what is available, for the Hessians of one reading
LEAST_BYTES = 1 << 28

# Names of matrices with one input, and that input's moments.
Found = tuple[list[str], NDArray[np.floating]]


def make_feedbacks(
    model: Model,
    source: Tokens | OwnText,
    looked_up: float,
    folder: Path,
    n_threads: int,
    progress: Progress = no_progress,
) -> Feedbacks:
    """Factor the Hessian of every plain matrix that is multiplied.

    Stacked experts have none, nor has an embedding whose rows are only looked up.

    Args:
        model: the model; to read drawn tokens, one of which nothing ``what_is_missing``.
        source: ``(n_sequences, n_positions)`` drawn ids, or what the model wrote.
        looked_up: for a tied embedding, the share of its sensitivity that is not the output's.
        folder: where the factors go.
        n_threads: threads.
        progress: called with matrices done and matrices in all.

    Raises:
        ModelError: a Hessian cannot be factored.

    """
    feedbacks = Feedbacks(folder)
    shrinkage = SHRINKAGE_OWN if isinstance(source, OwnText) else SHRINKAGE_DRAWN
    total = len(multiplied(model))
    progress(0, total)
    found = _written(model, source, n_threads) if isinstance(source, OwnText) else _drawn(model, source, n_threads)
    for names, hessian in found:
        if model.is_tied and model.unembedding().name in names:
            hessian = mixed_roles(hessian.astype(np.float64), looked_up)
        if hessian.diagonal().mean() > 0:
            feedbacks.add(names, hessian, shrinkage)
        progress(len(feedbacks.names), total)
    progress(total, total)
    return feedbacks


def multiplied(model: Model) -> list[str]:
    """Return the names of the plain matrices that are multiplied and quantized: those of layers, and the output."""
    output = model.unembedding().name
    quantized = [tensor for tensor in model.tensors if not kept_reason(tensor, model.architecture)]
    return [t.name for t in quantized if len(t.shape) == 2 and (t.layer is not None or t.name == output)]


def note(model: Model, feedbacks: Feedbacks) -> str:
    """Return what the user must know: how many matrices are rounded with feedback, and which are not."""
    matrices = [t for t in model.tensors if t.is_matrix and not kept_reason(t, model.architecture)]
    lacking = [tensor.name for tensor in matrices if tensor.name not in feedbacks.names]
    n_weights = sum(tensor.n_weights for tensor in matrices)
    share = sum(tensor.n_weights for tensor in matrices if tensor.name in feedbacks.names) / max(n_weights, 1)
    told = (
        f"GPTQ rounding covers {len(matrices) - len(lacking)} of {len(matrices)} matrices "
        f"({100 * share:.0f} % of their weights)"
    )
    if not lacking:
        return f"{told}."
    others = [*lacking[:3], *([f"{len(lacking) - 3} more"] if len(lacking) > 3 else [])]
    return f"{told}; rounded to nearest: {', '.join(others)}."


def disk_bytes(model: Model) -> int:
    """Return the bytes that the factors take on disk, at most: as if no two matrices had the same input."""
    columns = {name: model.by_name[name].n_cols for name in multiplied(model)}
    return sum(4 * n**2 for n in columns.values())


def _budget_bytes() -> int:
    return max(LEAST_BYTES, int(SHARE_OF_MEMORY * available_memory_bytes()))


def _written(model: Model, text: OwnText, n_threads: int) -> Iterator[Found]:
    names = [name for name in multiplied(model) if name in text.moments]
    for group in text.full_moments(names, _budget_bytes(), n_threads):
        by_input: dict[int, list[str]] = {}
        for name, moments in group.items():
            by_input.setdefault(id(moments.full), []).append(name)
        for alike in by_input.values():
            full = group[alike[0]].full
            if full is not None:
                yield alike, full


def _drawn(model: Model, tokens: Tokens, n_threads: int) -> Iterator[Found]:
    """Read the tokens as often as the Hessians of some layers fit in memory."""
    layers = {name: model.by_name[name].layer for name in multiplied(model)}
    for start, stop in _stretches(model):
        wanted = {name for name, layer in layers.items() if layer is not None and start <= layer < stop}
        wanted |= {model.unembedding().name} if stop == model.hparams.n_layers else set()
        sums = _Sums(wanted)
        for first in range(0, len(tokens), BATCH_SEQUENCES):
            read_tokens(model, tokens[first : first + BATCH_SEQUENCES], n_threads, sums.add, stop)
        for names, total in sums.by_input():
            yield names, total / tokens.size


class _Sums:
    """Sums of ``x x^T`` of the inputs of some matrices; those told the same array have the same input."""

    def __init__(self, wanted: Collection[str]) -> None:
        self._wanted = wanted
        self._totals: dict[str, Float32] = {}
        self._alike: dict[str, str] = {}  # by name, the first matrix with that input
        self._last: tuple[str, Float32] | None = None

    def add(self, name: str, x: Float32) -> None:
        """Add the input of a matrix, ``(n, n_cols)``."""
        if name not in self._wanted:
            return
        if self._last is not None and self._last[1] is x:
            self._alike[name] = self._last[0]
            return
        self._last = name, x
        self._alike[name] = name
        product = x.T @ x
        self._totals[name] = self._totals[name] + product if name in self._totals else product

    def by_input(self) -> Iterator[tuple[list[str], Float32]]:
        """Yield names of matrices with one input, and its sum."""
        for first, total in self._totals.items():
            yield [name for name, of in self._alike.items() if of == first], total


def _stretches(model: Model) -> Iterator[tuple[int, int]]:
    """Yield first and last layers whose Hessians fit in memory together."""
    n_layers, budget, plain = model.hparams.n_layers, _budget_bytes(), set(multiplied(model))
    start = held = 0
    for index in range(n_layers):
        view = view_layer(model, index)
        with_own = [m for m in view.matrices() if m.name in plain and m.role not in ("attn_k", "attn_v", "ffn_up")]
        n_bytes = 4 * sum({m.role: m.n_cols**2 for m in with_own}.values())
        if held and held + n_bytes > budget:
            yield start, index
            start, held = index, 0
        held += n_bytes
    yield start, n_layers
