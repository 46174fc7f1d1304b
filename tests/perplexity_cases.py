"""Settings in which our perplexity is held against llama-perplexity's, and the files and texts for them.

``tools/check/check_perplexity.py`` runs them all and records in ``golden/perplexity.json`` what that program prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray
from tiny_gguf import tiny_text, write_tiny_gguf

from nsds_gguf.conversion import convert
from nsds_gguf.evaluate.texts import VerifyOptions, evaluation_text
from nsds_gguf.llamacpp.llama import open_context, open_model
from nsds_gguf.records import Options
from nsds_gguf.session.run import Run

DEMO = Path(__file__).parent.parent / "examples" / "books-4.6m"


@dataclass(frozen=True)
class Case:
    """One setting: a model, the bytes of its text, how it is read and, for a divergence, what it is compared with.

    A model is named ``SOURCE-BOS-TYPE``: ``tiny`` of ``tiny_gguf`` or ``demo`` of the examples, ``bos`` or ``plain``.
    """

    model: str
    n_ctx: int
    n_text_bytes: int
    n_batch: int = 2048
    n_chunks: int | None = None
    reference: str | None = None


# A byte of the tiny text is a token, three bytes of the demo's make one. Every text ends inside a chunk. 16 chunks of
# 128 tokens, 4 of 512 and 1 of 2048 fit in a batch of 2048; in one of 48 a chunk of 128 is cut in three, the first of
# them without a scored token.
CASES = (
    *(Case(f"tiny-{bos}-{kind}", n_ctx, n_bytes)
      for n_ctx, n_bytes in ((128, 2700), (512, 2700), (2048, 4500))
      for bos in ("bos", "plain")
      for kind in ("F32", "Q4_0")),
    *(Case(f"demo-{bos}-{kind}", n_ctx, n_bytes)
      for n_ctx, n_bytes in ((128, 2000), (512, 4000), (2048, 14000))
      for bos in ("bos", "plain")
      for kind in ("BF16", "Q4_K")),
    Case("tiny-bos-F32", 100, 2700),
    Case("tiny-bos-F32", 128, 2700, n_batch=48),
    Case("tiny-bos-F32", 128, 2700, n_batch=300, n_chunks=5),
    Case("tiny-bos-Q8_0", 128, 2700, reference="tiny-bos-F32"),
    Case("tiny-bos-Q8_0", 512, 2700, reference="tiny-bos-F32"),
    Case("tiny-bos-Q4_0", 128, 2700, reference="tiny-bos-F32"),
    Case("tiny-bos-Q4_0", 2048, 4500, reference="tiny-bos-F32"),
    Case("tiny-plain-Q4_0", 128, 2700, n_batch=48, reference="tiny-plain-F32"),
    Case("demo-bos-Q4_K", 128, 2000, reference="demo-bos-BF16"),
    Case("demo-plain-Q4_K", 512, 4000, reference="demo-plain-BF16"),
)  # fmt: skip


@cache
def case_text(case: Case) -> str:
    """Return the text of a case."""
    if case.model.startswith("tiny"):
        return tiny_text(case.n_text_bytes)
    return evaluation_text(VerifyOptions())[: case.n_text_bytes]


def case_file(folder: Path, model: str) -> Path:
    """Return the GGUF of that name in a folder; it is written when first asked for."""
    path = folder / f"{model}.gguf"
    if path.exists():
        return path
    source, bos, type_name = model.split("-")
    if source == "tiny":
        return write_tiny_gguf(path, type_name, add_bos=bos == "bos")
    options = Options(uniform=type_name, rounding="rtn", calibration="none")
    convert(DEMO, options, output=path, verifying=VerifyOptions(enabled=False), run=Run(1))
    GGUFReader(path, "r+").fields["tokenizer.ggml.add_bos_token"].parts[-1][0] = bos == "bos"
    return path


def scored_logits(file: Path, text: str, case: Case) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return the logits before the scored tokens, ``(n, n_vocab)``, and these tokens, by a short loop of its own."""
    n_seq = max(1, case.n_batch // case.n_ctx)
    n_batch = min(case.n_batch, n_seq * case.n_ctx)
    first, rows = case.n_ctx // 2, []
    with (
        open_model(file) as model,
        open_context(model, n_ctx=case.n_ctx, n_batch=n_batch, n_seq=n_seq, n_threads=1) as context,
    ):
        tokens = model.tokenize(text)
        n_chunks = min(len(tokens) // case.n_ctx, case.n_chunks or len(tokens))
        chunks = tokens[: n_chunks * case.n_ctx].reshape(n_chunks, case.n_ctx)
        chunks[:, 0] = chunks[:, 0] if model.bos is None else model.bos
        for i in range(0, n_chunks, n_seq):
            block = chunks[i : i + n_seq]
            context.clear()
            parts = [
                context.decode(block[:, start : start + n_batch], start=start, first_output=first).copy()
                for start in range(0, case.n_ctx, n_batch)
            ]
            rows.append(np.concatenate(parts, axis=1)[:, :-1].reshape(-1, model.n_vocab))
    return np.concatenate(rows), chunks[:, first + 1 :].ravel()
