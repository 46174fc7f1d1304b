"""Perplexity of a GGUF, and its KL divergence from another, by the algorithm of llama-perplexity.

The text is tokenized as a whole and cut into chunks of ``n_ctx`` tokens that do not overlap; the tail is dropped.
Every chunk starts with an empty KV cache; where the vocabulary has a BOS, it replaces the first token of the chunk.
The tokens of the second half are scored, each by the logits of the position before it; the perplexity is that of all
scored tokens, ``PPL = exp(mean nll)``. ``divergence`` defines the scores and their statistics.

Both models run in step, so that memory holds only one batch of logits of each.

Source: llama.cpp tools/perplexity/perplexity.cpp, ``perplexity`` and ``kl_divergence``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import ModelError, TextError, VerifyError
from ..llamacpp.llama import (
    N_PHYSICAL_BATCH,
    Int32,
    LlamaContext,
    LlamaModel,
    default_threads,
    llama_build,
    open_context,
    open_model,
)
from ..records import Float32, Progress, no_progress
from ..system.resources import check_memory
from .divergence import (
    TOKEN_SCORE,
    Divergence,
    TokenScores,
    divergence,
    perplexity_and_error,
    score_rows,
)
from .embedding import pooling_of

# The shortest context that leaves more than one token of a chunk to score.
MIN_CTX = 8

# Tokens decoded at once by default, as in llama-perplexity (llama.cpp common/common.h, n_batch).
DEFAULT_BATCH = 2048

# A file this many times worse than guessing uniformly is broken, not merely bad.
ABSURD_FACTOR = 10


@dataclass(frozen=True)
class Window:
    """How to cut and decode a text.

    Attributes:
        n_ctx: tokens per chunk.
        n_chunks: largest number of chunks; ``None`` for all.
        n_batch: tokens decoded at once: several chunks where they fit, parts of one where it does not.

    """

    n_ctx: int = 512
    n_chunks: int | None = None
    n_batch: int = DEFAULT_BATCH

    @property
    def n_seq(self) -> int:
        """Chunks decoded together."""
        return max(1, self.n_batch // self.n_ctx)


@dataclass(frozen=True)
class Perplexity:
    """The result of a run over a text, and its settings.

    Attributes:
        ppl: perplexity of the file.
        ppl_error: its standard error, propagated from the mean over the tokens.
        bits_per_byte: mean bits per scored token times tokens per byte of the text; comparable across vocabularies.
        n_ctx: tokens per chunk.
        n_chunks: scored chunks.
        n_chunks_wanted: chunks to score: more than ``n_chunks`` after an interruption.
        n_scored_tokens: scored tokens of all chunks.
        n_text_tokens: tokens of the whole text.
        n_text_bytes: its bytes.
        text_sha256: its digest.
        adds_bos: whether BOS replaced the first token of every chunk.
        n_vocab: size of the vocabulary.
        n_ctx_train: tokens of the longest sequence that the model was trained for.
        n_batch: tokens decoded at once.
        n_threads: CPU threads.
        versions: of this package and of llama.cpp.
        divergence: how the file differs from the reference; ``None`` without one.

    """

    ppl: float
    ppl_error: float
    bits_per_byte: float
    n_ctx: int
    n_chunks: int
    n_chunks_wanted: int
    n_scored_tokens: int
    n_text_tokens: int
    n_text_bytes: int
    text_sha256: str
    adds_bos: bool
    n_vocab: int
    n_ctx_train: int
    n_batch: int
    n_threads: int
    versions: dict[str, str]
    divergence: Divergence | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values, without ``divergence`` when there was no reference."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Measurement:
    """A run in progress: the scores of the finished chunks.

    Attributes:
        n_chunks: finished chunks.
        n_chunks_wanted: all chunks.

    """

    def __init__(self, shape: tuple[int, int], has_reference: bool, tokens_per_byte: float, facts: dict[str, Any]):
        """Begin without finished chunks.

        Args:
            shape: number of chunks, scored tokens per chunk.
            has_reference: whether the scores include a reference.
            tokens_per_byte: tokens of the text over its bytes.
            facts: the other fields of ``Perplexity``.

        """
        self.n_chunks, self.n_chunks_wanted = 0, shape[0]
        self._scores = np.zeros(shape, dtype=TOKEN_SCORE)
        self._has_reference, self._tokens_per_byte, self._facts = has_reference, tokens_per_byte, facts

    def add(self, scores: TokenScores) -> None:
        """Add the scores of the next chunk."""
        self._scores[self.n_chunks] = scores
        self.n_chunks += 1

    @property
    def ppl(self) -> float:
        """Perplexity over the finished chunks."""
        return perplexity_and_error(self._done["nll"])[0]

    @property
    def kld_mean(self) -> float | None:
        """Mean KL divergence over the finished chunks, in nats per token; ``None`` without a reference."""
        return float(self._done["kld"].mean()) if self._has_reference else None

    def result(self) -> Perplexity:
        """Return the result over the finished chunks, at least one."""
        scores = self._done
        ppl, ppl_error = perplexity_and_error(scores["nll"])
        return Perplexity(
            ppl=ppl,
            ppl_error=ppl_error,
            bits_per_byte=float(scores["nll"].mean()) / math.log(2) * self._tokens_per_byte,
            n_chunks=self.n_chunks,
            n_chunks_wanted=self.n_chunks_wanted,
            n_scored_tokens=scores.size,
            divergence=divergence(scores) if self._has_reference else None,
            **self._facts,
        )

    @property
    def _done(self) -> TokenScores:
        return self._scores[: self.n_chunks].ravel()


# Called after each chunk with the run so far.
OnChunk = Callable[[Measurement], None]


def perplexity(
    file: Path,
    text: str,
    window: Window | None = None,
    *,
    n_threads: int | None = None,
    reference: Path | None = None,
    progress: Progress = no_progress,
    on_chunk: OnChunk | None = None,
) -> Perplexity:
    """Measure the perplexity of a GGUF on a text and, with ``reference``, its KL divergence from another GGUF.

    In memory: both models, and for each the logits of one batch, at most ``n_batch * n_vocab`` float32, or half of that
    where whole chunks fit in a batch.

    Args:
        file: the GGUF to measure; for a split model the first part.
        text: the text; one newline at its end is dropped, as in llama-perplexity.
        window: context, chunks and batch; ``None`` for the defaults of ``Window``.
        n_threads: CPU threads; ``None`` for one per physical core.
        reference: a GGUF with the same vocabulary.
        progress: called with (chunks done, chunks in all).
        on_chunk: called after each chunk with the run so far, which stays usable after an interruption.

    Raises:
        TextError: the text has fewer than ``2 * n_ctx`` tokens, or the window scores no token.
        VerifyError: a file cannot be loaded, gives NaN or infinite logits, or the vocabularies differ.
        OutputError: the models and their logits do not fit in memory.
        GgmlError: llama.cpp is missing or refuses.

    """
    window = window or Window()
    _check_window(window)
    _check_predicts(file)
    n_threads = n_threads or default_threads()
    n_ctx, n_seq = window.n_ctx, window.n_seq
    n_batch = min(window.n_batch, n_seq * n_ctx)
    with ExitStack() as stack:
        models = [stack.enter_context(open_model(path)) for path in (file, reference) if path is not None]
        tokens = _tokenize(models, text, n_ctx)
        chunks = _cut(tokens, n_ctx, window.n_chunks, models[0].bos)
        _check_memory(models, n_ctx, n_batch)
        contexts = [
            stack.enter_context(open_context(model, n_ctx=n_ctx, n_batch=n_batch, n_seq=n_seq, n_threads=n_threads))
            for model in models
        ]
        pool = stack.enter_context(ThreadPoolExecutor(n_threads))
        scorer = _Scorer(contexts, pool, n_threads, n_batch)
        run = _measurement(models, text, tokens, chunks, n_batch, n_threads)
        _score_chunks(scorer, chunks, n_seq, [model.file for model in models], run, progress, on_chunk)
    return run.result()


def check_sane(file: Path, result: Perplexity) -> None:
    """Raise ``VerifyError`` when a perplexity is higher than any working model can have.

    Guessing uniformly gives a perplexity of ``n_vocab``. A model that is ``ABSURD_FACTOR`` times worse is confidently
    wrong: its weights are damaged or its tensors mixed up.
    """
    limit = ABSURD_FACTOR * result.n_vocab
    if not result.ppl <= limit:
        raise VerifyError(
            f"{file}: perplexity {result.ppl:.4g} is absurd: wanted at most {limit} ({ABSURD_FACTOR} times that of "
            "guessing); the file is damaged, or the text does not suit the model"
        )


def check_comparable(file: Path, reference: Path, text: str, n_ctx: int) -> None:
    """Raise the errors of ``perplexity`` for these vocabularies and this text, from the files' headers alone."""
    with open_model(file, vocab_only=True) as model, open_model(reference, vocab_only=True) as other:
        _tokenize([model, other], text, n_ctx)


def _check_window(window: Window) -> None:
    """Raise ``TextError`` for a window that scores no token."""
    if window.n_ctx < MIN_CTX:
        raise TextError(
            f"perplexity: wanted a context of at least {MIN_CTX} tokens, got {window.n_ctx}; use a larger --ctx-size"
        )
    if window.n_chunks is not None and window.n_chunks < 1:
        raise TextError(f"perplexity: wanted at least 1 chunk, got {window.n_chunks}; leave out --chunks to take all")
    if window.n_batch < 1:
        raise TextError(f"perplexity: wanted batches of at least 1 token, got {window.n_batch}")


def _check_predicts(file: Path) -> None:
    """Raise ``VerifyError`` for an embedding model, which predicts no token."""
    try:
        pooling = pooling_of(file)
    except ModelError:  # llama.cpp reports what is wrong with the file
        return
    if pooling:
        raise VerifyError(
            f"{file}: is an embedding model ({pooling} pooling), which perplexity cannot measure; convert checks it "
            "by the cosine similarity of its embeddings to the original's"
        )


def _scored_text(text: str) -> str:
    """Return the text without one newline at its end, as llama-perplexity reads a file."""
    return text.removesuffix("\n")


def _tokenize(models: Sequence[LlamaModel], text: str, n_ctx: int) -> Int32:
    """Return the tokens of the text, ``(n_tokens,)``, on which all models must agree."""
    tokens = [_without_eos(model, model.tokenize(_scored_text(text))) for model in models]
    if len(tokens[0]) < 2 * n_ctx:
        raise TextError(
            f"text: too short: wanted at least {2 * n_ctx} tokens for a context of {n_ctx}, got {len(tokens[0])}; "
            "use a longer text or a smaller --ctx-size"
        )
    for model, others in zip(models[1:], tokens[1:], strict=True):
        _check_same_vocabulary(models[0], model, np.array_equal(tokens[0], others))
    return tokens[0]


def _without_eos(model: LlamaModel, tokens: Int32) -> Int32:
    """Return the tokens without the EOS that some vocabularies append: chunks do not end the text."""
    return tokens[:-1] if model.adds_eos else tokens


def _check_same_vocabulary(model: LlamaModel, reference: LlamaModel, same_tokens: bool) -> None:
    wrong = f"{reference.file}: cannot be the reference of {model.file}"
    if model.n_vocab != reference.n_vocab:
        raise VerifyError(
            f"{wrong}: wanted a vocabulary of {model.n_vocab}, got {reference.n_vocab}; compare files of one model"
        )
    if not same_tokens or model.bos != reference.bos:
        raise VerifyError(f"{wrong}: it tokenizes the text differently; compare files with the same tokenizer")


def _check_memory(models: Sequence[LlamaModel], n_ctx: int, n_batch: int) -> None:
    """Raise ``OutputError`` when weights and logits do not fit in memory."""
    logits_bytes = sum(_logits_bytes(model.n_vocab, n_ctx, n_batch) for model in models)
    what = "perplexity of two models" if len(models) > 1 else "perplexity"
    check_memory(sum(model.n_bytes for model in models) + logits_bytes, what, "close other programs or lower --batch")


def needed_bytes(files: Sequence[int], n_vocab: int, n_ctx: int) -> int:
    """Return the memory of ``perplexity`` for files of these bytes and one vocabulary, with the default batch."""
    n_batch = min(DEFAULT_BATCH, Window(n_ctx).n_seq * n_ctx)
    return sum(files) + len(files) * _logits_bytes(n_vocab, n_ctx, n_batch)


def _logits_bytes(n_vocab: int, n_ctx: int, n_batch: int) -> int:
    """Return the bytes of one model's logits: those of a batch and those being computed."""
    n_rows = _n_outputs(n_ctx, n_batch) + min(n_batch, N_PHYSICAL_BATCH)
    return n_rows * n_vocab * np.dtype(np.float32).itemsize


def _n_outputs(n_ctx: int, n_batch: int) -> int:
    """Return the largest number of rows of logits per batch: half of the batch where whole chunks fit."""
    return n_batch // n_ctx * (n_ctx - n_ctx // 2) if n_batch >= n_ctx else n_batch


def _cut(tokens: Int32, n_ctx: int, n_chunks: int | None, bos: int | None) -> Int32:
    """Return the chunks, ``(n_chunks, n_ctx)`` int32, each starting with BOS where there is one."""
    n_whole = len(tokens) // n_ctx
    n_taken = n_whole if n_chunks is None else min(n_chunks, n_whole)
    chunks: Int32 = tokens[: n_taken * n_ctx].reshape(n_taken, n_ctx).copy()
    if bos is not None:
        chunks[:, 0] = bos
    return chunks


def _measurement(
    models: Sequence[LlamaModel], text: str, tokens: Int32, chunks: Int32, n_batch: int, n_threads: int
) -> Measurement:
    """Return a run without finished chunks."""
    n_chunks, n_ctx = chunks.shape
    facts = {
        "n_ctx": n_ctx,
        "n_text_tokens": len(tokens),
        "n_text_bytes": len(text.encode()),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "adds_bos": models[0].bos is not None,
        "n_vocab": models[0].n_vocab,
        "n_ctx_train": models[0].n_ctx_train,
        "n_batch": n_batch,
        "n_threads": n_threads,
        "versions": {"nsds-gguf": __version__, "llama.cpp": llama_build()},
    }
    shape = (n_chunks, n_ctx - 1 - n_ctx // 2)
    return Measurement(shape, len(models) > 1, len(tokens) / len(_scored_text(text).encode()), facts)


@dataclass(frozen=True)
class _Scorer:
    """Decodes chunks with the file, then the reference, and scores their second halves."""

    contexts: Sequence[LlamaContext]
    pool: Executor
    n_threads: int
    n_batch: int

    def score(self, chunks: Int32) -> TokenScores:
        """Return the scores of chunks decoded together: ``(n, n_ctx)`` tokens to ``(n, n_scored)``."""
        n, n_ctx = chunks.shape
        first = n_ctx // 2
        scores = np.zeros((n, n_ctx - 1 - first), dtype=TOKEN_SCORE)
        for context in self.contexts:
            context.clear()
        for start in range(0, n_ctx, self.n_batch):
            block = chunks[:, start : start + self.n_batch]
            logits = [context.decode(block, start=start, first_output=first) for context in self.contexts]
            begin, end = max(start, first), min(start + self.n_batch, n_ctx - 1)  # positions that predict a token
            if begin < end:
                scored = scores[:, begin - first : end - first]
                self._score_block(scored, [x[:, : end - begin] for x in logits], chunks[:, begin + 1 : end + 1])
        return scores

    def _score_block(self, scores: TokenScores, logits: Sequence[Float32], targets: Int32) -> None:
        n, n_rows = targets.shape
        step = -(-n_rows // self.n_threads)
        jobs = [(i, slice(row, row + step)) for i in range(n) for row in range(0, n_rows, step)]
        futures = [
            self.pool.submit(score_rows, scores[i, rows], [x[i, rows] for x in logits], targets[i, rows])
            for i, rows in jobs
        ]
        for future in futures:
            future.result()


def _score_chunks(
    scorer: _Scorer,
    chunks: Int32,
    n_seq: int,
    files: Sequence[Path],
    run: Measurement,
    progress: Progress,
    on_chunk: OnChunk | None,
) -> None:
    """Fill in the scores of all chunks, ``n_seq`` chunks at a time."""
    n_chunks = len(chunks)
    progress(0, n_chunks)
    for start in range(0, n_chunks, n_seq):
        stop = min(start + n_seq, n_chunks)
        scores = scorer.score(chunks[start:stop])
        for chunk in range(start, stop):
            _check_finite(scores[chunk - start], files, chunk, n_chunks)
            run.add(scores[chunk - start])
            if on_chunk is not None:
                on_chunk(run)
        progress(stop, n_chunks)


def _check_finite(scores: TokenScores, files: Sequence[Path], chunk: int, n_chunks: int) -> None:
    """Raise ``VerifyError`` when the scores of a chunk hold NaN or infinity."""
    culprits = {"nll": files[0], "reference_nll": files[-1], "kld": " or ".join(map(str, files))}
    for name, culprit in culprits.items():
        n_bad = scores.size - int(np.isfinite(scores[name]).sum())
        if n_bad:
            raise VerifyError(
                f"{culprit}: NaN or infinite logits at {n_bad} of {scores.size} scored tokens of chunk {chunk + 1} of "
                f"{n_chunks}; the file is damaged"
            )
