"""Random tokens: sampled by Zipf's law from the vocabulary, whose ids are ordered by frequency."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..compute.backend import Tokens
from ..records import Float32, Float64, Model
from .column_weights import normalized
from .evidence import Evidence, TokenRequest
from .hessians import FoundHessian

N_SEQUENCES, N_POSITIONS = 4, 512  # for sensitivities
N_SEQUENCES_LARGE, LARGE_WEIGHTS = 2, 10**8  # half is as good (docs/log.md) where more would take minutes
N_SEQUENCES_HESSIANS = 16  # for Hessians
ZIPF_SHIFT = 27.0  # added to ranks (Mandelbrot's form of the law): the most common token is 1 % of the text

_NORMAL = 1  # LLAMA_TOKEN_TYPE_NORMAL


@dataclass(frozen=True)
class RandomTokens:
    """A ``Calibration``: statistics of random tokens, or predictions of moment propagation."""

    evidence: Evidence

    @property
    def tokens(self) -> Tokens | None:
        """The random tokens."""
        return self.evidence.tokens

    def column_moments(self, name: str) -> Float64 | None:
        """Return mean squares over all positions."""
        return self.evidence.columns.get(name)

    def column_weights(self, name: str) -> Float32 | None:
        """Return the mean squares, scaled to a mean of 1."""
        moments = self.column_moments(name)
        return None if moments is None else normalized(moments)

    def hessians(self) -> Iterator[FoundHessian]:
        """Yield the Hessians, without first positions."""
        return self.evidence.hessians()

    def note(self) -> str:
        """Return an empty string."""
        return ""


def random_tokens(request: TokenRequest) -> Tokens:
    """Return the requested random tokens; those for sensitivities are the first of those for Hessians."""
    model = request.model
    n_sequences = N_SEQUENCES_HESSIANS if request.for_hessians else n_sequences_for(model)
    return draw_tokens(model, n_sequences, seed=request.seed)


def draw_tokens(model: Model, n_sequences: int = N_SEQUENCES, n_positions: int = N_POSITIONS, seed: int = 0) -> Tokens:
    """Sample ``(n_sequences, n_positions)`` token ids by Zipf's law, after BOS if the model has one.

    Ranks follow the scores of the vocabulary if it has any (sentencepiece), else its ids; control tokens and bytes are
    excluded. Without a vocabulary, all rows of the embedding are equally likely. Sequences are at most as long as the
    training context.
    """
    rng = np.random.default_rng(seed)
    n_vocab, n_positions = model.hparams.n_vocab, min(n_positions, model.hparams.n_ctx_train or n_positions)
    chance = token_chances(model)
    tokens: Tokens = rng.choice(n_vocab, (n_sequences, n_positions), p=chance)
    bos = model.metadata.get("tokenizer.ggml.bos_token_id")
    adds = model.metadata.get("tokenizer.ggml.add_bos_token")
    if bos is not None and 0 <= int(bos.value) < n_vocab and (adds is None or adds.value):
        tokens[:, 0] = int(bos.value)
    return tokens


def n_sequences_for(model: Model) -> int:
    """Return the number of sequences for sensitivities of a model."""
    return N_SEQUENCES if model.n_weights < LARGE_WEIGHTS else N_SEQUENCES_LARGE


def token_chances(model: Model) -> Float64:
    """Return the probability of each row of the embedding, ``(n_vocab,)``."""
    n_vocab = model.hparams.n_vocab
    types, scores = (model.metadata.get(f"tokenizer.ggml.{key}") for key in ("token_type", "scores"))
    order = np.arange(n_vocab, dtype=np.float64)
    if scores is not None and len(scores.value) == n_vocab:
        order = -np.asarray(scores.value, dtype=np.float64)
    known = np.ones(n_vocab, dtype=bool)
    if types is not None and len(types.value) == n_vocab:
        known = np.asarray(types.value) == _NORMAL
    if not known.any():
        known[:] = True
    ranks = np.empty(n_vocab)
    ranks[np.argsort(np.where(known, order, np.inf), kind="stable")] = np.arange(n_vocab)
    chance = np.where(known, 1 / (ranks + ZIPF_SHIFT), 0.0) if types is not None else np.ones(n_vocab)
    total: Float64 = chance / chance.sum()
    return total
