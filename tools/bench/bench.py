"""Measure what this project promises and print it as ratios: scoring, writing, quality.

    python tools/bench/bench.py [--model DIR] [--text FILE] [--only score,write,quality] [--chunks N]

Quality is what ``nsds-gguf compare`` measures; the speed of perplexity has a tool of its own, bench_perplexity.py.

Every figure is a ratio of two things measured side by side in this run, because absolute times mean little on a shared
machine. Without options the shipped demo model and text are used for quality; scoring and writing use synthetic
weights of the sizes named in the output.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import bench_score
import bench_write
from rich.console import Console

from nsds_gguf.cli.display import comparison_view
from nsds_gguf.comparison import Budgets, compare
from nsds_gguf.evaluate.texts import VerifyOptions

DEMO = Path(__file__).resolve().parents[2] / "examples" / "books-4.6m"
PARTS = ("score", "write", "quality")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--text", type=Path, help="held-out text (the one that ships with the package unless told)")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--chunks", type=int, help="chunks of 512 tokens for quality, all unless told")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if "score" in parts:
        print(bench_score.report(bench_score.bench()), flush=True)
    if "write" in parts:
        print(bench_write.report(bench_write.bench()), flush=True)
    if "quality" in parts:
        options = VerifyOptions(text=arguments.text, n_chunks=arguments.chunks)
        with tempfile.TemporaryDirectory() as folder:
            found = compare(arguments.model, Path(folder), Budgets(), verifying=options)
        Console(width=140).print(comparison_view(found))


if __name__ == "__main__":
    main()
