"""Perplexity of a GGUF, and its KL divergence from another, by the algorithm of llama-perplexity.

The text is tokenized as a whole and cut into chunks of ``n_ctx`` tokens that do not overlap; the tail is dropped.
Every chunk starts with an empty KV cache; where the vocabulary has a BOS, it replaces the first token of the chunk.
The tokens of the second half are scored, each by the logits of the position before it::

    nll_i = -log softmax(logits[i - 1])[token_i]        PPL = exp(mean_i nll_i)
    kld_i = sum_v p_i(v) log(p_i(v) / q_i(v))           p: reference, q: file

Source: llama.cpp tools/perplexity/perplexity.cpp, ``perplexity`` and ``kl_divergence``. That one keeps the reference
as log-probabilities of 16 bits and leaves out those below -16; here both models run in step, and the divergence is
summed over the whole vocabulary in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import TextError, VerifyError
from .llama import Int32, LlamaContext, LlamaModel, default_threads, open_context, open_model
from .records import Float32, Float64, Progress, no_progress

# Called after each chunk with the number of chunks done and the perplexity over them.
OnChunk = Callable[[int, float], None]

# The shortest context that leaves more than one token of a chunk to score.
MIN_CTX = 8

# A file this many times worse than guessing every token with equal chance is broken, not merely bad.
ABSURD_FACTOR = 10

# Logits handled at once by a thread: 256 KiB as float64, so that the passes over them stay in its cache.
_SLAB_LOGITS = 2**15

# What is kept of a scored token; without a reference only ``nll`` is filled.
_SCORE = np.dtype([("nll", "f8"), ("reference_nll", "f8"), ("kld", "f8"), ("same_top", "?")])
Scores = NDArray[np.void]


@dataclass(frozen=True)
class Perplexity:
    """What a run over a text found.

    Errors are standard errors of the mean over the scored tokens; that of a perplexity is carried through the
    exponential to first order. Logarithms are natural: divergences are in nats per token.

    Attributes:
        ppl: perplexity of the file.
        ppl_error: its standard error.
        bits_per_byte: mean bits per scored token times tokens per byte of the text; comparable across vocabularies.
        n_ctx: tokens of a chunk.
        n_chunks: chunks taken.
        n_scored_tokens: tokens that were scored, all chunks together.
        n_text_tokens: tokens of the whole text.
        n_vocab: size of the vocabulary.
        n_batch: tokens decoded at once.
        n_threads: CPU threads.
        reference_ppl: perplexity of the reference; this and the rest are ``None`` without a reference.
        reference_ppl_error: its standard error.
        ppl_ratio: perplexity over that of the reference.
        ppl_ratio_error: its standard error, from the differences token by token.
        kld_mean: mean KL divergence of the file from the reference.
        kld_error: its standard error.
        kld_median: median KL divergence.
        kld_p99: 99th percentile of it.
        kld_max: largest of it.
        same_top: fraction of the positions at which both give the same token the highest probability.
        same_top_error: its standard error.

    """

    ppl: float
    ppl_error: float
    bits_per_byte: float
    n_ctx: int
    n_chunks: int
    n_scored_tokens: int
    n_text_tokens: int
    n_vocab: int
    n_batch: int
    n_threads: int
    reference_ppl: float | None = None
    reference_ppl_error: float | None = None
    ppl_ratio: float | None = None
    ppl_ratio_error: float | None = None
    kld_mean: float | None = None
    kld_error: float | None = None
    kld_median: float | None = None
    kld_p99: float | None = None
    kld_max: float | None = None
    same_top: float | None = None
    same_top_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values, without what belongs to a reference when there was none."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def perplexity(
    file: Path,
    text: str,
    *,
    n_ctx: int = 512,
    n_chunks: int | None = None,
    n_threads: int | None = None,
    n_batch: int = 2048,
    against: Path | None = None,
    progress: Progress = no_progress,
    on_chunk: OnChunk | None = None,
) -> Perplexity:
    """Measure the perplexity of a GGUF on a text and, with ``against``, its KL divergence from another GGUF.

    In memory: both models, and for each the logits of one batch: at most ``n_batch * n_vocab`` float32, half of that
    where whole chunks fit in a batch.

    Args:
        file: the GGUF to measure.
        text: the text; one newline at its end is dropped, as llama-perplexity does to the file it reads.
        n_ctx: tokens of a chunk.
        n_chunks: chunks to take at most; ``None`` for all.
        n_threads: CPU threads; ``None`` for one a physical core.
        n_batch: tokens to decode at once: several chunks where they fit, parts of one where it does not.
        against: the reference, a GGUF of the same vocabulary.
        progress: called with (chunks done, chunks in all).
        on_chunk: called after each chunk with its number and the perplexity so far.

    Raises:
        TextError: the text has fewer than ``2 * n_ctx`` tokens, or nothing would be scored.
        VerifyError: a file cannot be loaded, gives NaN or infinite logits, or the vocabularies differ.
        GgmlError: llama.cpp is missing or refuses.

    """
    _check_options(n_ctx, n_chunks, n_batch)
    text = text.removesuffix("\n")
    n_threads = n_threads or default_threads()
    n_seq = max(1, n_batch // n_ctx)
    n_batch = min(n_batch, n_seq * n_ctx)
    with ExitStack() as stack:
        models = [stack.enter_context(open_model(path)) for path in (file, against) if path is not None]
        tokens = _tokenize(models, text, n_ctx)
        chunks = _cut(tokens, n_ctx, n_chunks, models[0].bos)
        contexts = [
            stack.enter_context(open_context(model, n_ctx=n_ctx, n_batch=n_batch, n_seq=n_seq, n_threads=n_threads))
            for model in models
        ]
        pool = stack.enter_context(ThreadPoolExecutor(n_threads))
        scorer = _Scorer(contexts, pool, n_threads, n_batch)
        scores = _score_chunks(scorer, chunks, n_seq, [model.file for model in models], progress, on_chunk)
        n_vocab = models[0].n_vocab
    mean_nll = float(scores["nll"].mean())
    return Perplexity(
        **_perplexity_statistics(scores["nll"].ravel(), ""),
        **(_divergence_statistics(scores.ravel()) if against else {}),
        bits_per_byte=mean_nll / math.log(2) * len(tokens) / len(text.encode()),
        n_ctx=n_ctx,
        n_chunks=len(chunks),
        n_scored_tokens=scores.size,
        n_text_tokens=len(tokens),
        n_vocab=n_vocab,
        n_batch=n_batch,
        n_threads=n_threads,
    )


def check_sane(file: Path, result: Perplexity) -> None:
    """Raise ``VerifyError`` when a perplexity is beyond what a working model can have.

    Guessing every token with the same chance gives a perplexity of ``n_vocab``. A model that is ``ABSURD_FACTOR``
    times worse is confidently wrong: its weights are damaged or its tensors mixed up.
    """
    limit = ABSURD_FACTOR * result.n_vocab
    if not result.ppl <= limit:
        raise VerifyError(
            f"{file}: perplexity {result.ppl:.4g} is absurd: wanted at most {limit} ({ABSURD_FACTOR} times that of "
            "guessing); the file is damaged, or the text is nothing that the model was made for"
        )


def _check_options(n_ctx: int, n_chunks: int | None, n_batch: int) -> None:
    if n_ctx < MIN_CTX:
        raise TextError(f"perplexity: wanted a context of at least {MIN_CTX} tokens, got {n_ctx}; use a larger --ctx")
    if n_chunks is not None and n_chunks < 1:
        raise TextError(f"perplexity: wanted at least 1 chunk, got {n_chunks}; leave out --chunks to take all")
    if n_batch < 1:
        raise TextError(f"perplexity: wanted batches of at least 1 token, got {n_batch}")


def _tokenize(models: Sequence[LlamaModel], text: str, n_ctx: int) -> Int32:
    """Return the tokens of the text, ``(n_tokens,)``, on which all models must agree."""
    for model in models:
        if model.adds_eos:
            raise VerifyError(
                f"{model.file}: ends every text with EOS; wanted a vocabulary without, as llama-perplexity does"
            )
    tokens = [model.tokenize(text) for model in models]
    if len(tokens[0]) < 2 * n_ctx:
        raise TextError(
            f"text: too short: wanted at least {2 * n_ctx} tokens for a context of {n_ctx}, got {len(tokens[0])}; "
            "use a longer text or a smaller --ctx"
        )
    for model, others in zip(models[1:], tokens[1:], strict=True):
        _check_same_vocabulary(models[0], model, np.array_equal(tokens[0], others))
    return tokens[0]


def _check_same_vocabulary(model: LlamaModel, reference: LlamaModel, same_tokens: bool) -> None:
    wrong = f"{reference.file}: cannot be the reference of {model.file}"
    if model.n_vocab != reference.n_vocab:
        raise VerifyError(
            f"{wrong}: wanted a vocabulary of {model.n_vocab}, got {reference.n_vocab}; compare files of one model"
        )
    if not same_tokens or model.bos != reference.bos:
        raise VerifyError(f"{wrong}: it tokenizes the text to other ids; compare files with the same tokenizer")


def _cut(tokens: Int32, n_ctx: int, n_chunks: int | None, bos: int | None) -> Int32:
    """Return the chunks, ``(n_chunks, n_ctx)`` int32, each begun by BOS where there is one."""
    n_whole = len(tokens) // n_ctx
    n_taken = n_whole if n_chunks is None else min(n_chunks, n_whole)
    chunks: Int32 = tokens[: n_taken * n_ctx].reshape(n_taken, n_ctx).copy()
    if bos is not None:
        chunks[:, 0] = bos
    return chunks


@dataclass(frozen=True)
class _Scorer:
    """Decodes chunks with the file and, after it, the reference, and scores their second halves."""

    contexts: Sequence[LlamaContext]
    pool: Executor
    n_threads: int
    n_batch: int

    def score(self, chunks: Int32) -> Scores:
        """Return the scores of a few chunks decoded together: ``(n, n_ctx)`` tokens to ``(n, n_scored)``."""
        n, n_ctx = chunks.shape
        first = n_ctx // 2
        scores = np.zeros((n, n_ctx - 1 - first), dtype=_SCORE)
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

    def _score_block(self, scores: Scores, logits: Sequence[Float32], targets: Int32) -> None:
        n, n_rows = targets.shape
        step = -(-n_rows // self.n_threads)
        jobs = [(i, slice(row, row + step)) for i in range(n) for row in range(0, n_rows, step)]
        futures = [
            self.pool.submit(_score_rows, scores[i, rows], [x[i, rows] for x in logits], targets[i, rows])
            for i, rows in jobs
        ]
        for future in futures:
            future.result()


def _score_chunks(
    scorer: _Scorer,
    chunks: Int32,
    n_seq: int,
    files: Sequence[Path],
    progress: Progress,
    on_chunk: OnChunk | None,
) -> Scores:
    """Return the scores of all chunks, ``(n_chunks, n_scored)``, ``n_seq`` chunks at a time."""
    n_chunks, n_ctx = chunks.shape
    scores = np.zeros((n_chunks, n_ctx - 1 - n_ctx // 2), dtype=_SCORE)
    progress(0, n_chunks)
    for start in range(0, n_chunks, n_seq):
        stop = min(start + n_seq, n_chunks)
        scores[start:stop] = scorer.score(chunks[start:stop])
        for chunk in range(start, stop):
            _check_finite(scores[chunk], files, chunk, n_chunks)
            if on_chunk is not None:
                on_chunk(chunk + 1, _exp(float(scores["nll"][: chunk + 1].mean())))
        progress(stop, n_chunks)
    return scores


def _score_rows(scores: Scores, logits: Sequence[Float32], targets: Int32) -> None:
    """Fill the scores of some rows of logits: of the file alone, or of the file and the reference.

    Args:
        scores: ``(n,)``, filled in.
        logits: one or two ``(n, n_vocab)`` float32.
        targets: ``(n,)`` int32, the token that each row should predict.

    """
    n, n_vocab = logits[0].shape
    step = min(n, max(1, _SLAB_LOGITS // n_vocab))
    dtype = np.float32 if len(logits) == 1 else np.float64
    work = np.empty((2 * len(logits), step, n_vocab), dtype=dtype)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        slab = [x[rows] for x in logits]
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are looked for in the scores
            if len(slab) == 1:
                scores["nll"][rows] = _nll(slab[0], targets[rows], work[:, : len(slab[0])])
            else:
                _score_pair(scores[rows], slab[0], slab[1], targets[rows], work[:, : len(slab[0])])


def _score_pair(scores: Scores, logits: Float32, reference: Float32, targets: Int32, work: Float64) -> None:
    """Fill the scores of a slab of both models; ``work`` is ``(4, n, n_vocab)`` float64."""
    scores["nll"] = nll = _nll(logits, targets, work[:2])
    scores["reference_nll"] = reference_nll = _nll(reference, targets, work[2:])
    rows = np.arange(len(targets))
    # log p - log q = (x_p - x_q) - (log Z_p - log Z_q), x the shifted logits; log Z = nll + x[target].
    log_z, reference_log_z = nll + work[0][rows, targets], reference_nll + work[2][rows, targets]
    np.subtract(work[2], work[0], out=work[0])
    scores["kld"] = np.einsum("nv,nv->n", work[3], work[0]) / np.exp(reference_log_z) + log_z - reference_log_z
    scores["same_top"] = logits.argmax(axis=1) == reference.argmax(axis=1)


def _nll(logits: Float32, targets: Int32, work: NDArray[np.floating[Any]]) -> Float64:
    """Return ``-log softmax(logits)[target]`` of each row, ``(n,)`` float64.

    Args:
        logits: ``(n, n_vocab)`` float32.
        targets: ``(n,)`` int32.
        work: ``(2, n, n_vocab)`` float32 or float64, in which to compute: left holding the logits minus their
            largest, and the exponentials of those.

    """
    shifted, powers = work
    np.subtract(logits, logits.max(axis=1, keepdims=True), out=shifted, dtype=shifted.dtype)
    np.exp(shifted, out=powers)
    log_z = np.log(powers.sum(axis=1, dtype=np.float64))
    nll: Float64 = log_z - shifted[np.arange(len(targets)), targets]
    return nll


def _check_finite(scores: Scores, files: Sequence[Path], chunk: int, n_chunks: int) -> None:
    """Raise ``VerifyError`` when the scores of a chunk hold NaN or infinity."""
    culprits = {"nll": files[0], "reference_nll": files[-1], "kld": " or ".join(map(str, files))}
    for name, culprit in culprits.items():
        n_bad = scores.size - int(np.isfinite(scores[name]).sum())
        if n_bad:
            raise VerifyError(
                f"{culprit}: NaN or infinite logits at {n_bad} of {scores.size} scored tokens of chunk {chunk + 1} of "
                f"{n_chunks}; the file is damaged"
            )


def _perplexity_statistics(nll: Float64, prefix: str) -> dict[str, float]:
    """Return ``ppl`` and ``ppl_error`` of ``(n,)`` negative log-likelihoods, the names after a prefix."""
    mean, error = _mean_and_error(nll)
    ppl = _exp(mean)
    return {f"{prefix}ppl": ppl, f"{prefix}ppl_error": ppl * error}


def _divergence_statistics(scores: Scores) -> dict[str, float]:
    """Return what compares the file with the reference, from ``(n,)`` scores."""
    kld_mean, kld_error = _mean_and_error(scores["kld"])
    median, p99, largest = np.percentile(scores["kld"], (50, 99, 100))
    log_ratio, log_ratio_error = _mean_and_error(scores["nll"] - scores["reference_nll"])
    same_top, same_top_error = _mean_and_error(scores["same_top"].astype(np.float64))
    return {
        **_perplexity_statistics(scores["reference_nll"], "reference_"),
        "ppl_ratio": _exp(log_ratio),
        "ppl_ratio_error": _exp(log_ratio) * log_ratio_error,
        "kld_mean": kld_mean,
        "kld_error": kld_error,
        "kld_median": float(median),
        "kld_p99": float(p99),
        "kld_max": float(largest),
        "same_top": same_top,
        "same_top_error": same_top_error,
    }


def _mean_and_error(values: Float64) -> tuple[float, float]:
    """Return the mean and its standard error, ``sqrt((E[x^2] - E[x]^2) / (n - 1))``, as llama-perplexity has it."""
    return float(values.mean()), math.sqrt(float(values.var()) / (values.size - 1))


def _exp(x: float) -> float:
    """Return ``exp(x)``, infinity where a float cannot hold it."""
    return math.exp(x) if x < math.log(np.finfo(np.float64).max) else math.inf
