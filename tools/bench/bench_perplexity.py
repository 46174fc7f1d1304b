"""Compare the speed of our perplexity with llama-perplexity's: whole runs of both, in turn, on one build.

    python tools/bench/bench_perplexity.py --llama-perplexity PATH [--gguf FILE --text FILE] [--threads N] [--pairs N]

Without a file of your own: the demo model in BF16 and Q4_K, and a model of two tiny layers with 50 000 tokens, whose
time goes into logits. A figure is the median, over pairs of runs, of llama-perplexity's time over ours: above 1 ours
is the faster. Wall time and CPU time are both shown, since on a busy machine only the latter means something. Start-up
(Python's takes half a second) does not count: every run is made over one batch too, and its time taken off.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the makers of the files that the tests use

from perplexity_cases import case_file
from tiny_gguf import tiny_text, tiny_vocabulary, tiny_weights, write_tiny_gguf

from nsds_gguf.evaluate.perplexity import DEFAULT_BATCH

SHIPPED_TEXT = ROOT / "nsds_gguf" / "evaluate" / "old_curiosity_shop.txt"
N_WIDE_VOCAB = 50_000


@dataclass(frozen=True)
class Seconds:
    """What a run took."""

    wall: float
    cpu: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-perplexity", type=Path, required=True, metavar="PATH")
    parser.add_argument("--gguf", type=Path, help="a file of your own")
    parser.add_argument("--text", type=Path, help="the text for it")
    parser.add_argument("--ctx-size", type=int, default=512, help="tokens of a chunk")
    parser.add_argument("--chunks", type=int, default=80, help="chunks to take at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each")
    args = parser.parse_args()
    if not args.llama_perplexity.is_file():
        parser.error(f"{args.llama_perplexity}: no such file; build llama.cpp's llama-perplexity")
    if (args.gguf is None) != (args.text is None):
        parser.error("--gguf and --text belong together")
    with tempfile.TemporaryDirectory() as folder:
        own = [(args.gguf, args.text)]
        for file, text in own if args.gguf else shipped_files(Path(folder)):
            print(report(file.name, measure(args, file, text)), flush=True)
    return 0


def shipped_files(folder: Path) -> list[tuple[Path, Path]]:
    """Return the files and texts of a run without options."""
    weights = tiny_weights()
    for name in ("token_embd.weight", "output.weight"):
        n_missing = N_WIDE_VOCAB - len(weights[name])
        weights[name] = np.concatenate([weights[name], np.resize(weights[name], (n_missing, weights[name].shape[1]))])
    tokens = tiny_vocabulary()
    tokens += [f"token{i}" for i in range(N_WIDE_VOCAB - len(tokens))]
    wide = write_tiny_gguf(folder / "wide-vocabulary-F32.gguf", weights=weights, vocabulary=tokens)
    text = folder / "tiny.txt"
    text.write_text(tiny_text(42_000), encoding="utf-8", newline="")
    demo = [(case_file(folder, f"demo-bos-{kind}"), SHIPPED_TEXT) for kind in ("BF16", "Q4_K")]
    return [*demo, (wide, text)]


def measure(args: argparse.Namespace, file: Path, text: Path) -> list[tuple[Seconds, Seconds]]:
    """Run both in turn; each pair begins with the other one."""
    ctx, chunks, threads = str(args.ctx_size), str(args.chunks), str(args.threads)
    batch = str(max(1, DEFAULT_BATCH // args.ctx_size))
    theirs = [str(args.llama_perplexity), "-m", str(file), "-f", str(text), "-c", ctx, "-t", threads, "-tb", threads,
              "--no-repack"]  # fmt: skip
    ours = [sys.executable, "-m", "nsds_gguf", "perplexity", str(file), "--text", str(text), "--ctx-size", ctx,
            "--threads", threads, "-q"]  # fmt: skip

    def seconds(command: list[str]) -> Seconds:
        short, long = (run([*command, "--chunks", n], args.llama_perplexity.parent) for n in (batch, chunks))
        return Seconds(long.wall - short.wall, long.cpu - short.cpu)

    pairs = []
    for i in range(args.pairs):
        first, second = (theirs, ours) if i % 2 == 0 else (ours, theirs)
        times = seconds(first), seconds(second)
        pairs.append(times if i % 2 == 0 else times[::-1])
    return pairs


def run(command: list[str], libraries: Path) -> Seconds:
    """Run a command and return its times; our binding loads llama-perplexity's own libraries."""
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(libraries)}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
    return Seconds(wall, usage.ru_utime + usage.ru_stime)


def report(name: str, pairs: list[tuple[Seconds, Seconds]]) -> str:
    """Return one line: medians of both, and of the ratios."""
    cells = []
    for kind in ("wall", "cpu"):
        theirs, ours = zip(*((getattr(a, kind), getattr(b, kind)) for a, b in pairs), strict=True)
        ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
        times = f"llama-perplexity {statistics.median(theirs):.2f} s, ours {statistics.median(ours):.2f} s"
        cells.append(f"{kind}: {times}, ratio {ratio:.3f}")
    return f"{name}: {'; '.join(cells)}"


if __name__ == "__main__":
    sys.exit(main())
