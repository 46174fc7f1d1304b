"""The pass over tokens: its logits against transformers', its derivatives against differences and its theory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nsds_gguf.allocate.fisher import Head, _Pass
from nsds_gguf.allocate.tape import Node
from nsds_gguf.records import no_progress
from nsds_gguf.views import view_layer


def logits_of(model, tokens):
    """Return the pass's logits for one sequence, ``(n, n_vocab)``."""
    reader = _Pass(model, np.asarray(tokens)[np.newaxis], 1, no_progress, 0)
    with ThreadPoolExecutor(1) as pool:
        stream = reader.embed(reader.tape(pool))[1].value
        for index in range(model.hparams.n_layers):
            stream = reader.decoder.layer(reader.tape(pool), view_layer(model, index), Node(stream)).value
        read = reader.behind_norm(reader.tape(pool), Node(stream)).value
    head = Head(model, read, 0)
    return np.concatenate([head.logits(slab)[1] for slab in head.slabs], axis=1)
