"""Generated calibration text: text that the model generates itself.

It needs nothing but the file. The model samples tokens one after another at temperature 1, many sequences in parallel.
A sequence begins with BOS if the vocabulary adds one, else with a uniformly random token. Tokens that end a text are
never sampled, so that all sequences have the same length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..compute.backend import Tokens
from ..compute.input_moments import Moments
from ..errors import VerifyError
from ..llamacpp.llama import Int32, LlamaContext, LlamaModel, open_context, open_model
from ..llamacpp.rules import kept_reason
from ..records import Float32, Float64, Progress, no_progress
from .column_weights import FLOOR, normalized
from .evidence import TokenRequest
from .random_tokens import RandomTokens

N_TOKENS = 8192  # more do not improve column weights; Hessians would need four times as many (docs/log.md)
LENGTH = 256  # tokens of a sequence
N_PARALLEL = 32  # sequences sampled in parallel
SEED = 0

_BLOCK = 512  # tokens of the vocabulary whose chances are summed first: the sums of one block decide

_TABLES = ("token_embd", "position_embd", "token_types")  # lookup tables: multiplied only if tied


@dataclass(frozen=True)
class GeneratedText(RandomTokens):
    """A ``Calibration``: statistics of generated calibration text, over all positions."""

    def column_moments(self, name: str) -> Float64 | None:
        """Return mean squares; those of ``evidence.columns`` for tensors that the text does not reach."""
        moments = self.evidence.moments.get(name)
        return super().column_moments(name) if moments is None else moments.mean_squares

    def column_weights(self, name: str) -> Float32 | None:
        """Return weights of mean 1; those of ``evidence.columns`` for tensors and experts without text."""
        moments, other = self.evidence.moments.get(name), self.evidence.columns.get(name)
        if moments is None:
            return None if other is None else normalized(other)
        n_cols = moments.mean_squares.shape[-1]
        return _weights(moments, np.ones(n_cols, np.float32) if other is None else normalized(other))

    def note(self) -> str:
        """Return the note on the source of column weights, with the tensors that the text does not reach."""
        tokens = self.evidence.tokens
        if tokens is None:
            return ""
        start = "" if (tokens[:, 0] == tokens[0, 0]).all() else ", each beginning with a random token"
        return (
            f"Column weights come from {tokens.size:,} tokens that the model generated (sequences of "
            f"{tokens.shape[1]}{start}); another CPU or llama.cpp version may generate others.{self._missed()}"
        )

    def _missed(self) -> str:
        """Return a sentence on the matrices without input."""
        found, model = self.evidence.moments, self.evidence.model
        quantized = [t for t in model.tensors if t.is_matrix and not kept_reason(t, model.architecture)]
        matrices = [t.name for t in quantized if t.role not in _TABLES or t.name in found]
        unseen = [name for name in matrices if name not in found or not found[name].counts.any()]
        n_experts = sum(int((found[name].counts == 0).sum()) for name in matrices if name not in unseen)
        missed = [*unseen[:3], *([f"{len(unseen) - 3} more tensors"] if len(unseen) > 3 else [])]
        missed += [f"{n_experts} matrices of experts"] if n_experts else []
        return f" The text does not reach {', '.join(missed)}: their weights come from random tokens." if missed else ""


def generated_tokens(request: TokenRequest) -> Tokens:
    """Generate the tokens in sequences of ``LENGTH``: as many sequences as hold them all."""
    n_tokens = request.n_tokens or N_TOKENS
    with request.original() as file:
        tokens = write_tokens(
            file, n_sequences=-(-n_tokens // LENGTH), length=LENGTH, seed=request.seed,
            n_threads=request.n_threads, progress=request.progress,
        )  # fmt: skip
    return tokens.astype(np.int64)


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
    """Generate token sequences, ``(n_sequences, length)`` int32.

    The tokens are the same for the same file, seed, threads, llama.cpp version and kind of processor. ``temperature``
    divides the logits; ``progress`` is called with (tokens done, total).

    Raises:
        VerifyError: the file cannot be loaded, or does not predict the next token.
        GgmlError: llama.cpp is missing or refuses.

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
    """Return the first token of each sequence: BOS if the vocabulary adds it, else uniformly random tokens."""
    if model.bos is not None:
        return np.full(n, model.bos, np.int32)
    allowed = np.setdiff1d(np.arange(model.n_vocab, dtype=np.int32), banned)
    return rng.choice(allowed, n)


def _write(
    context: LlamaContext, group: Int32, temperature: float, banned: NDArray[np.intp], rng: np.random.Generator
) -> Iterator[int]:
    """Fill ``(n, length)`` sequences after their first tokens; yield the number of tokens after each step."""
    context.clear()
    for at in range(1, group.shape[1]):
        logits = context.decode(group[:, at - 1 : at], start=at - 1)[:, 0]
        group[:, at] = draw(logits, temperature, banned, rng)
        yield (at + 1) * len(group)


def draw(logits: Float32, temperature: float, banned: NDArray[np.intp], rng: np.random.Generator) -> Int32:
    """Sample a token for each row of logits, by inverting the distribution function.

    Args:
        logits: ``(n, n_vocab)`` float32; processed one row at a time.
        temperature: divisor of the logits.
        banned: tokens to exclude.
        rng: source of randomness, one number per row.

    Returns:
        ``(n,)`` int32.

    Raises:
        VerifyError: the logits are not finite.

    """
    tokens = np.empty(len(logits), np.int32)
    for i, row in enumerate(logits):
        chances = np.zeros(-(-len(row) // _BLOCK) * _BLOCK, np.float32)
        chances[: len(row)] = np.exp((row - row.max()) / np.float32(temperature))
        chances[banned] = 0.0
        blocks = chances.reshape(-1, _BLOCK)
        sums = np.cumsum(blocks.sum(axis=1, dtype=np.float64))
        if not np.isfinite(sums[-1]) or sums[-1] <= 0:
            raise VerifyError("the model's logits are not finite; its weights are damaged")
        at = min(rng.random() * sums[-1], np.nextafter(sums[-1], 0))
        block = int(np.searchsorted(sums, at, side="right"))
        within = np.cumsum(blocks[block], dtype=np.float64)
        place = np.searchsorted(within, at - sums[block] + within[-1], side="right")
        tokens[i] = block * _BLOCK + min(int(place), int(np.flatnonzero(blocks[block])[-1]))  # sums round differently
    return tokens


def _weights(moments: Moments, other: Float32) -> Float32:
    """Return mean squares over their mean, at least ``FLOOR``; ``other`` for a matrix without input."""
    means = moments.mean_squares
    seen = (moments.counts > 0) & (np.atleast_2d(means).mean(axis=1) > 0)
    if not seen.any():
        return other
    if means.ndim == 1:
        only: Float32 = np.maximum(means / means.mean(), FLOOR).astype(np.float32)
        return only
    own = means / means[seen].mean()
    rows = np.where(seen[:, np.newaxis], np.maximum(own, FLOOR * own.mean(axis=1, keepdims=True)), other)
    weights: Float32 = rows.astype(np.float32)
    return weights
