"""What the matrices of a model multiply, row by row, as the pass over tokens names it."""

from __future__ import annotations

import numpy as np

from nsds_gguf.compute.decoder import Decoder
from nsds_gguf.compute.embedding import embed
from nsds_gguf.compute.layers import view_layer
from nsds_gguf.compute.output import Head, output_norm
from nsds_gguf.compute.tape import Node, Tape


def recorded_inputs(model, tokens):
    """Return ``(n, n_cols)`` rows by stored name, and for stacks ``{expert: (tokens, rows)}``; all tokens at once."""
    n_positions, plain, stacks = tokens.shape[1], {}, {}
    decoder = Decoder.of(model, n_positions)

    def add_expert(name, expert, routed, x):
        stacks.setdefault(name, {})[expert] = routed, x

    tape = Tape(None, n_positions, {}, plain.setdefault, False, add_expert)
    stream = embed(model, decoder, tape, tokens)[1]
    for index in range(model.hparams.n_layers):
        stream = decoder.layer(tape, view_layer(model, index), Node(stream.value))
    plain[model.unembedding().name] = output_norm(model, decoder, tape, stream).value
    return plain, stacks


def logits_of(model, tokens):
    """Return the pass's logits for one sequence, ``(n, n_vocab)``."""
    read = recorded_inputs(model, np.asarray(tokens)[np.newaxis])[0][model.unembedding().name]
    head = Head(model, read, 0)
    return np.concatenate([head.logits(slab)[1] for slab in head.slabs], axis=1)


def without_first(rows, n_positions):
    """Return rows without the first of every sequence."""
    return rows[np.arange(len(rows)) % n_positions > 0]
