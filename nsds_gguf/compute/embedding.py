"""From token ids to the input stream of the first layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..records import Float32, Model, Tensor
from .decoder import Decoder
from .norms import Norm
from .tape import Node, Tape


def embed(model: Model, decoder: Decoder, tape: Tape, tokens: NDArray[np.int64]) -> tuple[Node, Node]:
    """Return the scaled rows of the embedding, and the input stream of the first layer, each ``(n, n_embd)``.

    ``tokens`` are ``(n_sequences, n_positions)`` ids.
    """
    tensors, ids, n_positions = model.by_name, tokens.ravel(), tokens.shape[1]
    rows = Node(_rows(tensors["token_embd.weight"], ids) * np.float32(model.hparams.embedding_scale))
    entry = rows
    for name, which in (("position_embd.weight", np.arange(len(ids)) % n_positions),
                        ("token_types.weight", np.zeros(len(ids), dtype=np.intp))):  # fmt: skip
        if name in tensors:
            entry = tape.add(entry, Node(_rows(tensors[name], which)))
    if "token_embd_norm.weight" in tensors:
        norm = Norm(tensors["token_embd_norm.weight"], tensors.get("token_embd_norm.bias"))
        entry = decoder.norm(tape, norm, entry)
    return rows, entry


def lookup_squared_norm(rows: Node, tokens: NDArray[np.int64]) -> float:
    """Return ``sum (W dL/dW)^2`` of the rows looked up, summed over sequences.

    ``rows`` has received its derivative. The derivatives of all occurrences of a row in a sequence add up.
    """
    if rows.grad is None:
        return 0.0
    total, n_positions = 0.0, tokens.shape[1]
    weighted = rows.grad * rows.value
    for start, sequence in zip(range(0, len(weighted), n_positions), tokens, strict=True):
        ids, at = np.unique(sequence, return_inverse=True)
        sums = np.zeros((len(ids), weighted.shape[1]))
        np.add.at(sums, at, weighted[start : start + n_positions])
        total += float(np.square(sums).sum())
    return total


def _rows(tensor: Tensor, ids: NDArray[np.intp]) -> Float32:
    """Return rows by number, ``(len(ids), n_cols)``; read each distinct row once."""
    distinct, at = np.unique(ids, return_inverse=True)
    return tensor.rows(distinct)[at]
