"""How close the embeddings of a GGUF are to those of another: the check of embedding models.

Perplexity does not apply to such a model: its head, if it has one, was never trained for its hidden states. Its users
compute cosines between embeddings, so the check measures the cosine between the file's and the original's embedding of
each passage, over passages of several lengths spread over a text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import TextError, VerifyError
from ..llamacpp.gguf_header import read_gguf_header
from ..llamacpp.llama import Int32, LlamaModel, default_threads, embed, llama_build, open_model
from ..records import Float32, Progress, no_progress

POOLINGS = {1: "mean", 2: "cls", 3: "last"}  # llama.h, enum llama_pooling_type: those that yield one embedding

N_PASSAGES = 64
_LETTERS = (40, 120, 320, 800)  # lengths of passages, in turn: from a short sentence to a paragraph

# Embeddings of unrelated passages have cosines up to about 0.5, those of a usable quantization 0.9 and more: a file
# below the floor no longer tells passages apart.
FLOOR = 0.5


@dataclass(frozen=True)
class EmbeddingCheck:
    """How close the embeddings of a file are to the original's.

    Attributes:
        cosine_mean: mean over passages of the cosine between both embeddings.
        cosine_min: the lowest cosine.
        n_passages: number of passages.
        n_tokens: tokens of all passages.
        n_embd: length of an embedding.
        pooling: pooling of the embedding: ``mean``, ``cls`` or ``last``.
        text_sha256: digest of the text of the passages.
        n_threads: CPU threads.
        versions: of this package and of llama.cpp.

    """

    cosine_mean: float
    cosine_min: float
    n_passages: int
    n_tokens: int
    n_embd: int
    pooling: str
    text_sha256: str
    n_threads: int
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return asdict(self)


def pooling_of(file: Path) -> str:
    """Return the pooling of an embedding model's GGUF; empty for other models."""
    metadata = read_gguf_header(file).metadata
    architecture = metadata.get("general.architecture")
    entry = metadata.get(f"{architecture.value}.pooling_type") if architecture is not None else None
    return POOLINGS.get(entry.value, "") if entry is not None and isinstance(entry.value, int) else ""


def compare_embeddings(
    file: Path,
    reference: Path,
    text: str,
    *,
    n_ctx: int = 512,
    n_threads: int | None = None,
    progress: Progress = no_progress,
) -> EmbeddingCheck:
    """Compare the embeddings of two GGUFs, with one model in memory at a time.

    Args:
        file: the GGUF to check.
        reference: the original, a GGUF with the same vocabulary.
        text: source of the passages.
        n_ctx: largest number of tokens per passage.
        n_threads: CPU threads; ``None`` for one per physical core.
        progress: called with (files done, files in all).

    Raises:
        TextError: the text is empty.
        VerifyError: a file cannot be loaded or computes embeddings that are not finite, or the two are incompatible.
        GgmlError: llama.cpp is missing or refuses.

    """
    tokens = _tokens(file, reference, passages(text), n_ctx)
    found: list[Float32] = []
    for path in (file, reference):
        progress(len(found), 2)
        found.append(_finite(path, embed(path, tokens, n_threads=n_threads)))
    progress(2, 2)
    if found[0].shape != found[1].shape:
        raise VerifyError(
            f"{reference}: embeddings of {found[1].shape[1]} numbers, {file} has {found[0].shape[1]}; "
            "compare files of one model"
        )
    cosines = cosine(*found)
    return EmbeddingCheck(
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        n_passages=len(tokens),
        n_tokens=sum(len(ids) for ids in tokens),
        n_embd=found[0].shape[1],
        pooling=pooling_of(file),
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        n_threads=n_threads or default_threads(),
        versions={"nsds-gguf": __version__, "llama.cpp": llama_build()},
    )


def check_close(file: Path, found: EmbeddingCheck) -> None:
    """Raise ``VerifyError`` when the mean cosine to the original's embeddings is below ``FLOOR``."""
    if not found.cosine_mean >= FLOOR:
        raise VerifyError(
            f"{file}: embeddings are lost: mean cosine similarity to the original {found.cosine_mean:.4f} over "
            f"{found.n_passages} passages, wanted at least {FLOOR}; give it more bits"
        )


def passages(text: str) -> list[str]:
    """Return up to ``N_PASSAGES`` passages of ``_LETTERS`` letters, spread evenly; raises ``TextError`` for no text."""
    n = max(1, min(N_PASSAGES, len(text) // _LETTERS[0]))
    starts = [i * len(text) // n for i in range(n)]
    found = [_whole_words(text[start : start + _LETTERS[i % len(_LETTERS)]], start) for i, start in enumerate(starts)]
    if not any(found):
        raise TextError("text: nothing but white space; wanted sentences to embed")
    return [passage for passage in found if passage]


def _whole_words(passage: str, start: int) -> str:
    """Return a passage without the cut word at its beginning, where spaces separate words."""
    words = passage.split(maxsplit=1)
    return words[1].strip() if start and len(words) > 1 else passage.strip()


def cosine(first: Float32, second: Float32) -> Float32:
    """Return the cosines of the angles between rows: two arrays ``(n, n_embd)`` to ``(n,)``; 0 with a row of zeros."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: Float32 = ((a * b).sum(axis=1) / np.where(norms > 0, norms, 1)).astype(np.float32)
    return found


def _tokens(file: Path, reference: Path, texts: Sequence[str], n_ctx: int) -> list[Int32]:
    """Return the token ids of the passages, at most ``n_ctx`` each; both vocabularies must have the same size."""
    with open_model(file, vocab_only=True) as model, open_model(reference, vocab_only=True) as other:
        if model.n_vocab != other.n_vocab:
            raise VerifyError(
                f"{reference}: has {other.n_vocab} tokens, {file} has {model.n_vocab}; compare files of one model"
            )
        return [_cut(model, model.tokenize(text), n_ctx) for text in texts]


def _cut(model: LlamaModel, tokens: Int32, n_ctx: int) -> Int32:
    """Return at most ``n_ctx`` tokens; keep an EOS at the end, which some models pool."""
    if len(tokens) <= n_ctx:
        return tokens
    return np.append(tokens[: n_ctx - 1], tokens[-1:]).astype(np.int32) if model.adds_eos else tokens[:n_ctx]


def _finite(file: Path, found: Float32) -> Float32:
    if not np.isfinite(found).all():
        n_bad = int((~np.isfinite(found).all(axis=1)).sum())
        raise VerifyError(f"{file}: NaN or infinite embeddings of {n_bad} of {len(found)} passages; it is damaged")
    return found
