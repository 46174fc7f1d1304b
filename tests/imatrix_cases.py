"""Models and texts on which collected activations are held against llama-imatrix's, and how that program cuts texts.

``tools/check/check_imatrix.py`` runs them all and records in ``golden/imatrix-NAME.gguf`` what that program writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tiny_archs import write_tiny_arch
from tiny_gguf import tiny_text, write_tiny_gguf

from nsds_gguf.llamacpp.llama import Int32, open_model


@dataclass(frozen=True)
class Case:
    """A model by name, the tokens of a chunk and how many chunks."""

    model: str
    n_ctx: int
    n_chunks: int


# A dense model whose output matrix counts; latent attention, routed and shared experts.
CASES = [Case("tiny", 128, 4), Case("deepseek2", 64, 5)]


def case_file(folder: Path, case: Case) -> Path:
    """Write the model of a case and return its path."""
    path = folder / f"{case.model}.gguf"
    return write_tiny_gguf(path) if case.model == "tiny" else write_tiny_arch(path, case.model)


def case_tokens(file: Path, case: Case) -> Int32:
    """Return the sequences that llama-imatrix makes of the text: chunks that begin with BOS, the tail left out."""
    with open_model(file) as model:
        ids = model.tokenize(tiny_text())
        n_chunks = min(case.n_chunks, len(ids) // case.n_ctx)
        chunks: Int32 = ids[: n_chunks * case.n_ctx].reshape(n_chunks, case.n_ctx).astype(np.int32)
        if model.bos is not None:
            chunks[:, 0] = model.bos
    return chunks
