"""Measure what this project promises and print it as ratios: scoring, writing, quality.

    python tools/bench.py [--model DIR] [--text FILE] [--only score,write,quality] [--chunks N]

Every figure is a ratio of two things measured side by side in this run, because absolute times mean little on a shared
machine. Without options the shipped demo model and text are used for quality; scoring and writing use synthetic
weights of the sizes named in the output.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import bench_quality
import bench_score
import bench_write

from nsds_gguf.convert import VerifyOptions, evaluation_text

PARTS = ("score", "write", "quality")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=bench_quality.DEMO)
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
        text = evaluation_text(VerifyOptions(text=arguments.text))
        rows = bench_quality.bench(arguments.model, text, n_chunks=arguments.chunks)
        print(bench_quality.report(rows))


if __name__ == "__main__":
    main()
