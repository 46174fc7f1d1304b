"""What the logits tests measure, and what is recorded of transformers' logits in ``golden/logits.npz``.

That is the best token at every position, and every ``STRIDE``-th number at ``N_POSITIONS`` positions.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from mutations import mutations
from numpy.typing import NDArray
from recipes import uniform
from zoo import EXACT, ZooSpec, zoo_tokens

from nsds_gguf.allocate import make_plan
from nsds_gguf.errors import VerifyError
from nsds_gguf.llamacpp.llama import logits
from nsds_gguf.quantize import TensorQuantizers
from nsds_gguf.quantize.header import header_bytes
from nsds_gguf.quantize.write import write_gguf
from nsds_gguf.records import Float32, Model
from nsds_gguf.system.workers import Threads

GOLDEN = Path(__file__).parent / "golden" / "logits.npz"

BITE = 20 * EXACT  # what every error must move, as a part of the largest logit

N_POSITIONS = 8
STRIDE = 5

F32 = uniform("F32")


def positions(n_tokens: int) -> NDArray[np.intp]:
    """Return the positions whose logits are recorded, the first and the last among them."""
    return np.linspace(0, n_tokens - 1, N_POSITIONS).astype(np.intp)


def recorded(rows: Float32) -> Float32:
    """Return the part of ``(n_tokens, n_vocab)`` logits that is recorded."""
    return rows[positions(len(rows))][:, ::STRIDE]


def best_tokens(rows: Float32, tolerance: float) -> NDArray[np.int16]:
    """Return the argmax at every position; -1 where the second best is so close that the tolerance allows either."""
    second, first = np.sort(rows, axis=1)[:, -2:].T
    is_clear = first - second > 2 * tolerance * np.abs(rows).max()
    return np.where(is_clear, rows.argmax(axis=1), -1).astype(np.int16)


def difference(rows: Float32, wanted: Float32, largest: float | None = None) -> float:
    """Return the largest difference as a part of the largest logit."""
    return float(np.abs(rows - wanted).max() / (np.abs(wanted).max() if largest is None else largest))


def model_logits(model: Model, path: Path, tokens: list[int]) -> Float32:
    """Write a model as F32 GGUF to ``path`` and return llama.cpp's logits."""
    plan = make_plan(model, None, F32, header_bytes(model, F32))
    write_gguf(model, plan, TensorQuantizers(), path, workers=Threads(1))
    return logits(path, tokens, n_threads=1)


def moves(model: Model, spec: ZooSpec, folder: Path, known: Collection[str] = ()) -> dict[str, float]:
    """Return how far each error that is not ``known`` moves the logits of a spec, as a part of the largest.

    An error with which llama.cpp does not load the file moves them infinitely far.
    """
    tokens, path = zoo_tokens(spec), folder / "mutant.gguf"
    mutants = {error: mutant for error, mutant in mutations(model).items() if error not in known}
    right = model_logits(model, path, tokens) if mutants else None
    moved = {}
    for error, mutant in mutants.items():
        try:
            moved[error] = difference(model_logits(mutant, path, tokens), right)
        except VerifyError:
            moved[error] = float("inf")
    return moved
