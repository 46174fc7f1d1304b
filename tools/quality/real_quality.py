"""Measure plans of real language models on texts of several kinds and write docs/real-models.md and .json.

    python tools/quality/real_quality.py --work DIR --models DIR --text NAME=FILE [--text ...] [--chunks N]

``--models`` is a folder of ``real_models.py``, texts are files of the user and of ``real_texts.py``; one whose name
begins with ``chat`` is a conversation, of the model that its name ends with if it names one. Every text is cut in two:
imatrix files come from the first halves of all, tables from the second halves. Everything measured is kept in
``--work``, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from quality import compact, last_commit, named
from quality_figures import table, with_error
from quality_measure import Bench, Measured, Passage, Yardstick, halves, planned
from quality_model import DEFAULT, FREE
from quality_statistics import geometric_mean, mean_and_error, paired_ratio
from quality_zoo import OURS, ROOT, RTN, STOCK, STOCK_IMATRIX
from real_models import MODELS

from nsds_gguf.comparison import exact_bpw
from nsds_gguf.evaluate.texts import read_text
from nsds_gguf.llamacpp import llama
from nsds_gguf.read import open_model
from nsds_gguf.records import Recipe, Target
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session
from nsds_gguf.system.workfolder import WorkFolder

FORMAT = "nsds-gguf real 1"

BUDGETS = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M")
VARIANTS: dict[str, Recipe] = {OURS: DEFAULT, RTN: FREE}
KINDS = (STOCK, STOCK_IMATRIX, *VARIANTS)

IMATRIX_CHARACTERS = 60_000  # of each text's first half

CHAT = "chat"


@dataclass(frozen=True)
class Row:
    """One file on one text: divergence by chunk, nats per token, and what else describes it."""

    text: str
    budget: str
    kind: str
    tensor_bytes: int
    bpw: float
    kld: float
    kld_error: float
    kld_99: float
    same_top: float
    ppl: float
    original_ppl: float
    chunks: tuple[float, ...]


class RealBench:
    """One model; what is measured stays in ``folder``."""

    def __init__(self, source: Path, folder: Path, texts: Sequence[tuple[str, str]], n_chunks: int) -> None:
        """Open the GGUF in ``source``; texts are names and contents."""
        self.name = source.stem
        folder.mkdir(parents=True, exist_ok=True)
        session = Session(open_model(source), Run(), WorkFolder(folder, ("real.gguf",), resume=True))
        self.bench = Bench(session, folder)
        self.passages = [
            Passage(name, "final", halves(text)[1], n_chunks, name.startswith(CHAT)) for name, text in texts
        ]
        mixed = "\n\n".join(halves(text)[0][:IMATRIX_CHARACTERS] for _, text in texts)
        self.imatrix = self.bench.imatrix(mixed, is_chat=True)
        self.rows: list[Row] = []

    @cached_property
    def yardsticks(self) -> list[Yardstick]:
        """The original's logits on every text."""
        return [self.bench.yardstick(passage) for passage in self.passages]

    def run(self, budgets: Sequence[str]) -> dict[str, Any]:
        """Measure everything and return it."""
        session = self.bench.session
        for preset in budgets:
            found = self.bench.stock(preset, None, self.yardsticks)
            self.keep(preset, STOCK, found)
            self.keep(preset, STOCK_IMATRIX, self.bench.stock(preset, self.imatrix, self.yardsticks))
            target = Target("bpw", exact_bpw(found[0].tensor_bytes, session.model.n_weights))
            for kind, recipe in VARIANTS.items():
                plan = planned(session, recipe.to(target), session.score(recipe))
                self.keep(preset, kind, self.bench.plan(plan, self.yardsticks))
        return {"name": self.name, "n_weights": session.model.n_weights, "rows": [asdict(row) for row in self.rows]}

    def keep(self, budget: str, kind: str, found: Sequence[Measured]) -> None:
        """Keep the rows of one file, one a text."""
        for passage, m in zip(self.passages, found, strict=True):
            kld, error = mean_and_error(m.kld)
            ppl, original = (float(np.exp(np.mean(values))) for values in (m.nll, m.original_nll))
            bpw = m.tensor_bytes * 8 / self.bench.session.model.n_weights
            self.rows.append(Row(passage.name, budget, kind, m.tensor_bytes, bpw, kld, error, m.kld_99,
                                 float(np.mean(m.same_top)), ppl, original, m.kld))  # fmt: skip
            print(f"{self.name} {passage.name} {budget} {kind}: {kld:.5f} ± {error:.5f}", file=sys.stderr, flush=True)


# --- tables -----------------------------------------------------------------------------------------------------------


def row_of(result: dict[str, Any], text: str, budget: str, kind: str) -> dict[str, Any]:
    """Return a row."""
    wanted = (text, budget, kind)
    return next(row for row in result["rows"] if (row["text"], row["budget"], row["kind"]) == wanted)


def names(result: dict[str, Any], column: str) -> list[str]:
    """Return the values of a column, in order."""
    return list(dict.fromkeys(row[column] for row in result["rows"]))


def ratio(result: dict[str, Any], text: str, budget: str, ours: str, others: str) -> tuple[float, float]:
    """Return the divergence of one kind over that of another, and its error."""
    rows = (row_of(result, text, budget, kind) for kind in (ours, others))
    return paired_ratio(*(row["chunks"] for row in rows))


def means_table(results: Sequence[dict[str, Any]]) -> str:
    """Return ours over the presets, geometric means over texts and the worst text."""
    rows = []
    for result in results:
        for budget in names(result, "budget"):
            cells = [f"{row_of(result, names(result, 'text')[0], budget, OURS)['bpw']:.3f}"]
            for ours in VARIANTS:
                for others in (STOCK, STOCK_IMATRIX):
                    found = [ratio(result, text, budget, ours, others)[0] for text in names(result, "text")]
                    cells.append(f"{geometric_mean(found):.3f} ({max(found):.3f})")
            rows.append((result["name"], budget, *cells))
    head = (f"{ours} over {others}" for ours in VARIANTS for others in (STOCK, STOCK_IMATRIX))
    return table(("model", "bytes of", "bpw", *head), rows)


def full_table(result: dict[str, Any]) -> str:
    """Return every text at every budget: divergence, 99th percentile, same top token, perplexity."""
    rows = []
    for budget in names(result, "budget"):
        for text in names(result, "text"):
            found = [row_of(result, text, budget, kind) for kind in KINDS]
            over = [with_error(ratio(result, text, budget, kind, STOCK_IMATRIX)) for kind in VARIANTS]
            rows.append((
                budget, text, *over,
                *(f"{row['kld']:.4f}, {row['kld_99']:.3f}, {100 * row['same_top']:.1f} %, {row['ppl']:.2f}"
                  for row in found),
                f"{found[0]['original_ppl']:.2f}",
            ))  # fmt: skip
    head = ("bytes of", "text", *(f"{kind} over {STOCK_IMATRIX}" for kind in VARIANTS), *KINDS, "original")
    return table(head, rows)


def page(results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the whole page."""
    parts = [
        "# Real models",
        f"Made by `python tools/quality/real_quality.py` at commit {facts['commit']}, llama.cpp {facts['build']}; the "
        "numbers are in [real-models.json](real-models.json). The models are packaged quantized; "
        "`tools/quality/real_models.py` fetches them and moves them off their grid without changing what they compute. "
        "Files have the bytes of the llama.cpp preset that the row names.",
        f"Texts: {', '.join(facts['texts'])}; {facts['n_chunks']} chunks of 512 tokens of each second half. The "
        f"imatrix is collected on {IMATRIX_CHARACTERS // 1000},000 characters of the first half of each. *Ours* is the "
        "default of `convert`, *ours, rtn* round-to-nearest with column weights from random tokens.",
        "Divergence of ours over that of the presets, geometric mean over the texts, and in brackets the worst text:",
        means_table(results),
    ]
    for result in results:
        cells = "mean KL divergence (nats per token), its 99th percentile, share of equal top tokens, perplexity"
        size = f"{result['n_weights'] / 1e6:.0f} M weights"
        parts += [f"## {result['name']}", f"{size}. Cells: {cells}.", full_table(result)]
    return "\n\n".join(parts) + "\n"


def texts_of(name: str, arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Return names and contents of the texts of a model: conversations are those of this model."""
    found = []
    for text in arguments.text:
        label, path = named(text)
        if label.startswith(f"{CHAT}-") and not label.endswith(name):
            continue
        found.append((CHAT if label.startswith(CHAT) else label, read_text(path)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument(
        "--names", default=",".join(MODELS), help="files of --models without .gguf; default: %(default)s"
    )
    parser.add_argument("--text", action="append", required=True, metavar="[NAME=]FILE")
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--budgets", default=",".join(BUDGETS))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "real-models.md")
    parser.add_argument("--numbers", type=Path, default=ROOT / "docs" / "real-models.json")
    arguments = parser.parse_args()
    results = []
    for name in arguments.names.split(","):
        texts = texts_of(name, arguments)
        bench = RealBench(arguments.models / f"{name}.gguf", arguments.work / name, texts, arguments.chunks)
        results.append(bench.run(arguments.budgets.split(",")))
    facts = {"texts": list(dict.fromkeys(row["text"] for r in results for row in r["rows"])), "commit": last_commit(),
             "n_chunks": arguments.chunks, "build": llama.llama_build()}  # fmt: skip
    arguments.page.write_text(page(results, facts), encoding="utf-8")
    bare = [{**r, "rows": [{k: v for k, v in row.items() if k != "chunks"} for row in r["rows"]]} for r in results]
    arguments.numbers.write_text(compact({"format": FORMAT, **facts, "results": bare}) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
