"""Text that a model writes itself, and the second moments of what its matrices multiply while it reads it.

Nothing is needed but the file. Tokens are drawn one after another from the model's own predictions at temperature 1,
many sequences at a time. A sequence begins with BOS where the vocabulary begins every text so, else with a token drawn
uniformly. Tokens that end a text are not drawn, so that all sequences are of one length.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import VerifyError
from ..llamacpp.llama import Int32, LlamaContext, LlamaModel, open_context, open_model
from ..quantize.equalization import Equalization
from ..records import Float32, Model, Progress, no_progress
from .activations import Moments, collect

N_TOKENS = 8192  # more change no column weight that shows; full matrices want four times as many (docs/log.md)
LENGTH = 256  # tokens of a sequence
N_PARALLEL = 32  # sequences drawn at a time
SEED = 0

_TABLES = ("token_embd", "position_embd", "token_types")  # rows are looked up, nothing is multiplied unless tied

_FLOOR = 1e-4  # of a matrix's mean: a block of columns that no token touched would make ggml divide by zero


@dataclass(frozen=True)
class OwnText:
    """Tokens that a model wrote, and the moments of all that its matrices multiply when it reads them.

    Attributes:
        file: the GGUF.
        tokens: ``(n_sequences, length)`` int32.
        seed: of the draws.
        moments: by GGUF name, without full matrices.
        balance: what the matrices are multiplied by before full moments are used; ``moments`` are those from before.

    """

    file: Path
    tokens: Int32
    seed: int
    moments: Mapping[str, Moments]
    balance: Equalization = field(default_factory=Equalization)

    def full_moments(
        self, names: Collection[str], max_bytes: int, n_threads: int | None = None
    ) -> Iterator[dict[str, Moments]]:
        """Yield the moments of matrices with their full ``E[x x^T]``, as many at a time as fit; ``file`` must exist.

        The text is read once for every group. Matrices with the same input are in one group and share their arrays.

        Args:
            names: matrices, no stacks.
            max_bytes: of the full matrices of one group, at 8 bytes an entry; a group has one input at least.
            n_threads: CPU threads; ``None`` for ``llama.default_threads()``.

        Raises:
            GgmlError: a name is that of a stack, or of nothing that is multiplied.

        """
        for group in self._groups(names, max_bytes):
            yield self._even(collect(self.file, self.tokens, only=group, full_for=group, n_threads=n_threads))

    def _even(self, found: dict[str, Moments]) -> dict[str, Moments]:
        even: dict[int, Moments] = {}  # by the full matrix of one input
        for name, moments in found.items():
            if moments.full is not None and id(moments.full) not in even:
                even[id(moments.full)] = replace(moments, full=self.balance.moments(name, moments.full))
        return {name: even.get(id(moments.full), moments) for name, moments in found.items()}

    def _groups(self, names: Collection[str], max_bytes: int) -> Iterator[list[str]]:
        by_input: dict[int, list[str]] = {}
        for name in names:
            by_input.setdefault(id(self.moments.get(name, name)), []).append(name)
        group, n_bytes = list[str](), 0
        for alike in by_input.values():
            n_cols = self.moments[alike[0]].mean_squares.shape[-1] if alike[0] in self.moments else 0
            if group and n_bytes + 8 * n_cols**2 > max_bytes:
                yield group
                group, n_bytes = [], 0
            group, n_bytes = [*group, *alike], n_bytes + 8 * n_cols**2
        if group:
            yield group

    def weights(self, model: Model, others: Mapping[str, Float32]) -> dict[str, Float32]:
        """Return column weights of the model's matrices, ``(n_cols,)`` or ``(n_experts, n_cols)``, of mean 1.

        Args:
            model: the model that the file was made from.
            others: column weights of mean 1 for what the text does not reach: tensors, and single experts.

        """
        found = dict(others)
        for tensor in model.tensors:
            moments = self.moments.get(tensor.name)
            if tensor.is_matrix and moments is not None:
                other = others.get(tensor.name, np.ones(tensor.n_cols, np.float32))
                found[tensor.name] = _weights(moments, other)
        return found

    def note(self, model: Model) -> str:
        """Return what the user must know: where the columns' importance comes from, and what the text did not reach."""
        start = "" if self._begins_alike else ", each begun with a token drawn uniformly"
        text = (
            f"Column importance comes from {self.tokens.size:,} tokens that the model generated (seed {self.seed}, "
            f"sequences of {self.tokens.shape[1]}{start}); another CPU or llama.cpp version may generate others."
        )
        matrices = [t for t in model.tensors if t.is_matrix and (t.role not in _TABLES or t.name in self.moments)]
        lacking = [tensor.name for tensor in matrices if not self._counts(tensor.name).any()]
        n_experts = sum(int((self._counts(t.name) == 0).sum()) for t in matrices if t.name not in lacking)
        missed = [*lacking[:3], *([f"{len(lacking) - 3} more tensors"] if len(lacking) > 3 else [])]
        missed += [f"{n_experts} matrices of experts"] if n_experts else []
        told = f" They do not reach {', '.join(missed)}, which take that of --importance sweep." if missed else ""
        return text + told

    @property
    def _begins_alike(self) -> bool:
        return len(self.tokens) == 1 or bool((self.tokens[:, 0] == self.tokens[0, 0]).all())

    def _counts(self, name: str) -> NDArray[np.int64]:
        return self.moments[name].counts if name in self.moments else np.zeros(1, np.int64)


def own_text(
    file: Path,
    *,
    n_tokens: int = N_TOKENS,
    length: int = LENGTH,
    seed: int = SEED,
    n_threads: int | None = None,
    progress: Progress = no_progress,
) -> OwnText:
    """Let a model write a text and collect the moments of its matrices' inputs on it.

    Args:
        file: the GGUF.
        n_tokens: tokens to write, rounded up to whole sequences.
        length: tokens of a sequence.
        seed: of the draws.
        n_threads: CPU threads; ``None`` for ``llama.default_threads()``.
        progress: called with tokens written and read so far, and those in all.

    Raises:
        VerifyError: the file cannot be loaded, or does not predict the next token.
        GgmlError: llama.cpp is missing or refuses; see ``collect``.

    """
    n_sequences = -(-n_tokens // length)
    total = 2 * n_sequences * length
    tokens = write_tokens(
        file,
        n_sequences=n_sequences,
        length=length,
        seed=seed,
        n_threads=n_threads,
        progress=lambda done, _: progress(done, total),
    )
    half = total // 2
    moments = collect(file, tokens, n_threads=n_threads, progress=lambda done, _: progress(half + done, total))
    return OwnText(file, tokens, seed, moments)


def write_tokens(
    file: Path,
    *,
    n_sequences: int,
    length: int,
    seed: int = SEED,
    temperature: float = 1.0,
    n_threads: int | None = None,
    progress: Progress = no_progress,
) -> Int32:
    """Let a model write token sequences, ``(n_sequences, length)`` int32.

    The same file, seed, threads and llama.cpp write the same tokens on the same kind of processor. ``temperature``
    divides the logits; ``progress`` is called with tokens written and tokens in all. Errors are those of ``own_text``.
    """
    rng = np.random.default_rng(seed)
    tokens = np.empty((n_sequences, length), np.int32)
    n_seq = min(N_PARALLEL, n_sequences)
    with (
        open_model(file) as model,
        open_context(model, n_ctx=length, n_batch=n_seq, n_seq=n_seq, n_threads=n_threads) as context,
    ):
        banned = np.array(sorted(model.end_tokens), np.intp)
        for start in range(0, n_sequences, n_seq):
            group = tokens[start : start + n_seq]  # a view
            group[:, 0] = _first_tokens(model, len(group), banned, rng)
            for written in _write(context, group, temperature, banned, rng):
                progress(start * length + written, tokens.size)
    return tokens


def _first_tokens(model: LlamaModel, n: int, banned: NDArray[np.intp], rng: np.random.Generator) -> Int32:
    """Return what sequences begin with: BOS where every text of the vocabulary does, else uniform draws."""
    if model.bos is not None:
        return np.full(n, model.bos, np.int32)
    allowed = np.setdiff1d(np.arange(model.n_vocab, dtype=np.int32), banned)
    return rng.choice(allowed, n)


def _write(
    context: LlamaContext, group: Int32, temperature: float, banned: NDArray[np.intp], rng: np.random.Generator
) -> Iterator[int]:
    """Fill ``(n, length)`` sequences from their first tokens on; yield the tokens there are after each step."""
    context.clear()
    for at in range(1, group.shape[1]):
        logits = context.decode(group[:, at - 1 : at], start=at - 1)[:, 0]
        group[:, at] = draw(logits, temperature, banned, rng)
        yield (at + 1) * len(group)


def draw(logits: Float32, temperature: float, banned: NDArray[np.intp], rng: np.random.Generator) -> Int32:
    """Draw a token for each row of logits, by inverting the distribution function.

    Args:
        logits: ``(n, n_vocab)`` float32; one row is looked at at a time.
        temperature: divides them.
        banned: tokens that are never drawn.
        rng: where the draws come from, one a row.

    Returns:
        ``(n,)`` int32.

    Raises:
        VerifyError: the logits are not finite.

    """
    tokens = np.empty(len(logits), np.int32)
    for i, row in enumerate(logits):
        chances = np.exp((row - row.max()) / temperature, dtype=np.float64)
        chances[banned] = 0.0
        sums = np.cumsum(chances)
        if not np.isfinite(sums[-1]) or sums[-1] <= 0:
            raise VerifyError("the model's logits are not finite; its weights are damaged")
        tokens[i] = np.searchsorted(sums, rng.random() * sums[-1], side="right")
    return tokens


def _weights(moments: Moments, other: Float32) -> Float32:
    """Return mean squares over their mean, at least ``_FLOOR``; where a matrix saw nothing, ``other``."""
    means = moments.mean_squares
    seen = (moments.counts > 0) & (np.atleast_2d(means).mean(axis=1) > 0)
    if not seen.any():
        return other
    if means.ndim == 1:
        only: Float32 = np.maximum(means / means.mean(), _FLOOR).astype(np.float32)
        return only
    own = means / means[seen].mean()
    rows = np.where(seen[:, np.newaxis], np.maximum(own, _FLOOR * own.mean(axis=1, keepdims=True)), other)
    weights: Float32 = rows.astype(np.float32)
    return weights
