"""Compare our perplexity and KL divergence with llama-perplexity's, and record its numbers for the tests.

    python tools/check_perplexity.py --llama-perplexity PATH [--record]
    python tools/check_perplexity.py --llama-perplexity PATH --gguf FILE --text FILE [--against FILE] [--ctx N,N]

The first form runs the tiny models of ``tests/tiny_gguf.py`` in every setting of ``CASES``; ``--record`` writes what
llama-perplexity says to ``tests/golden/perplexity.json``. The second runs files of your own. Every number is printed
next to ours; the exit code is 1 when one is off by more than the tolerance, when the tool is missing or when it fails.

llama-perplexity runs with --no-repack: its AMX kernels crash when built by some compilers (llama.cpp issue 20824).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the maker of the very files that the tests use

from tiny_gguf import tiny_text, write_tiny_gguf  # noqa: E402

from nsds_gguf.errors import NsdsError  # noqa: E402
from nsds_gguf.llama import llama_build  # noqa: E402
from nsds_gguf.perplexity import Perplexity, perplexity  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "perplexity.json"

# llama-perplexity prints 4 to 6 decimals, and keeps the reference's log-probabilities in 16 bits.
RELATIVE_TOLERANCE = 1e-3
ABSOLUTE_TOLERANCE = 5e-6

# The fraction of equal top tokens counts positions: rounding tips a few of them.
SAME_TOP_TOLERANCE = 4e-3

# llama-perplexity now and then exits 0 without its last lines, more often on a busy machine.
N_ATTEMPTS = 25


@dataclass(frozen=True)
class Case:
    """One setting: a model, how it is read and, for a divergence, what it is compared with."""

    model: str
    n_ctx: int
    n_batch: int = 2048
    n_chunks: int | None = None
    against: str | None = None


# The text makes 2702 tokens: 21 chunks of 128, 5 of 512, 27 of 100, and tails. 16, 4 and 20 of those fit in a batch
# of 2048; in one of 48 a chunk is cut in three, the first of them without a scored token.
CASES = (
    Case("bos-F32", 128),
    Case("bos-F32", 512),
    Case("bos-F32", 100),
    Case("bos-F32", 128, n_batch=48),
    Case("bos-F32", 128, n_batch=300, n_chunks=5),
    Case("plain-F32", 128),
    Case("plain-F32", 512),
    Case("bos-Q8_0", 128, against="bos-F32"),
    Case("bos-Q8_0", 512, against="bos-F32"),
    Case("bos-Q4_0", 128, against="bos-F32"),
    Case("plain-Q4_0", 128, n_batch=48, against="plain-F32"),
)

# What llama-perplexity prints, by the name of our field. The reference's perplexity comes from its own run: what the
# second run says of it, and of the ratio, is off where a token's logit is more than 16 below the largest.
_NUMBER = r"\s*(-?[\d.]+)"
_PLAIN = {"ppl": rf"PPL ={_NUMBER}", "ppl_error": rf"PPL = .* \+/-{_NUMBER}"}
_REFERENCE = {f"reference_{name}": pattern for name, pattern in _PLAIN.items()}
_PAIR = {
    "ppl": rf"Mean PPL\(Q\) +:{_NUMBER}",
    "ppl_error": rf"Mean PPL\(Q\) .*±{_NUMBER}",
    "kld_mean": rf"Mean +KLD:{_NUMBER}",
    "kld_error": rf"Mean +KLD: .*±{_NUMBER}",
    "kld_median": rf"Median +KLD:{_NUMBER}",
    "kld_p99": rf"99\.0% +KLD:{_NUMBER}",
    "kld_max": rf"Maximum KLD:{_NUMBER}",
    "same_top": rf"Same top p:{_NUMBER}",
    "same_top_error": rf"Same top p: .*±{_NUMBER}",
}
_PERCENT = ("same_top", "same_top_error")


def main() -> int:
    args = _arguments()
    print(llama_build())
    try:
        with tempfile.TemporaryDirectory() as folder:
            if args.gguf:
                return _check_own(args, Path(folder))
            return _check_tiny(args.llama_perplexity, Path(folder), args.record)
    except (NsdsError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare our perplexity with llama-perplexity's.")
    parser.add_argument("--llama-perplexity", type=Path, required=True, metavar="PATH")
    parser.add_argument("--record", action="store_true", help=f"write {GOLDEN.relative_to(ROOT)}")
    parser.add_argument("--gguf", type=Path, help="a file of your own")
    parser.add_argument("--against", type=Path, help="its reference")
    parser.add_argument("--text", type=Path, help="the text for it")
    parser.add_argument("--ctx", default="512", help="context lengths in tokens, separated by commas")
    parser.add_argument("--batch", type=int, default=2048, help="tokens decoded at once")
    parser.add_argument("--chunks", type=int, help="chunks to take at most")
    args = parser.parse_args()
    if not args.llama_perplexity.is_file():
        parser.error(f"{args.llama_perplexity}: no such file; build llama.cpp's llama-perplexity")
    if args.gguf and not args.text:
        parser.error("--gguf needs --text")
    return args


def _check_tiny(tool: Path, folder: Path, record: bool) -> int:
    text = folder / "text.txt"
    text.write_text(tiny_text(), encoding="utf-8", newline="")
    recorded, n_wrong = [], 0
    for case in CASES:
        for model in (case.model, case.against):
            if model:
                kind, type_name = model.split("-")
                write_tiny_gguf(folder / f"{model}.gguf", type_name, add_bos=kind == "bos")
        theirs = _theirs(tool, folder, text, case)
        n_wrong += _compare(theirs, _ours(folder, text, case), case)
        recorded.append({"case": asdict(case), "llama_perplexity": theirs})
    if record:
        GOLDEN.write_text(
            json.dumps({"llama.cpp": _version(tool), "cases": recorded}, indent=1) + "\n", encoding="utf-8"
        )
    return 1 if n_wrong else 0


def _check_own(args: argparse.Namespace, folder: Path) -> int:
    for name, file in (("own", args.gguf), ("reference", args.against)):
        if file:
            (folder / f"{name}.gguf").symlink_to(file.resolve())
    against = "reference" if args.against else None
    n_wrong = 0
    for n_ctx in map(int, args.ctx.split(",")):
        case = Case("own", n_ctx, args.batch, args.chunks, against)
        n_wrong += _compare(
            _theirs(args.llama_perplexity, folder, args.text, case), _ours(folder, args.text, case), case
        )
    return 1 if n_wrong else 0


def _ours(folder: Path, text: Path, case: Case) -> dict[str, float | list[float]]:
    running: list[float] = []
    result: Perplexity = perplexity(
        folder / f"{case.model}.gguf",
        text.read_bytes().decode(),
        n_ctx=case.n_ctx,
        n_batch=case.n_batch,
        n_chunks=case.n_chunks,
        against=folder / f"{case.against}.gguf" if case.against else None,
        on_chunk=lambda _, ppl: running.append(ppl),
    )
    return {**result.to_json(), "running_ppl": running}


def _theirs(tool: Path, folder: Path, text: Path, case: Case) -> dict[str, float | list[float]]:
    """Return what llama-perplexity prints: with a reference, from a second run over what the first has stored."""
    options = ["--ctx-size", str(case.n_ctx), "--batch-size", str(case.n_batch), "--no-repack", "--file", str(text)]
    options += ["--chunks", str(case.n_chunks)] if case.n_chunks else []
    if case.against is None:
        output = _run(tool, folder / f"{case.model}.gguf", options, "Final estimate")
        running = [float(value) for value in re.findall(r"\[\d+\]([\d.]+),", output)]
        return {**_numbers(_PLAIN, output), "running_ppl": running}
    options += ["--kl-divergence-base", str(folder / "base.kld")]
    reference = _run(tool, folder / f"{case.against}.gguf", options, "Final estimate")
    output = _run(tool, folder / f"{case.model}.gguf", [*options, "--kl-divergence"], "Same top p:")
    return {**_numbers(_REFERENCE, reference), **_numbers(_PAIR, output)}


def _run(tool: Path, model: Path, options: list[str], last: str) -> str:
    command = [str(tool), "--model", str(model), *options]
    for _ in range(N_ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr[-300:]}")
        if last in done.stdout + done.stderr:
            return done.stdout + done.stderr
    raise RuntimeError(f"{' '.join(command)}: {N_ATTEMPTS} runs without {last!r} in the output")


def _numbers(patterns: dict[str, str], output: str) -> dict[str, float]:
    numbers = {}
    for name, pattern in patterns.items():
        match = re.search(pattern, output)
        if match is None:
            raise RuntimeError(f"llama-perplexity printed no {name}: {output[-300:]}")
        numbers[name] = float(match[1]) / (100 if name in _PERCENT else 1)
    return numbers


def _compare(theirs: dict[str, float | list[float]], ours: dict[str, float | list[float]], case: Case) -> int:
    """Print both, and return how many numbers are off."""
    print(case)
    n_wrong = 0
    for name, wanted in theirs.items():
        got = ours[name]
        wants, gots = (wanted, got) if isinstance(wanted, list) and isinstance(got, list) else ([wanted], [got])
        slack = SAME_TOP_TOLERANCE if name in _PERCENT else ABSOLUTE_TOLERANCE
        off = [abs(a - b) > slack + RELATIVE_TOLERANCE * abs(a) for a, b in zip(wants, gots, strict=True)]
        worst = max(abs(a - b) / max(abs(a), 1e-9) for a, b in zip(wants, gots, strict=True))
        n_wrong += any(off)
        print(
            f"  {name:20} llama-perplexity {wants[-1]:12.6f}  ours {gots[-1]:12.6f}  relative {worst:8.1e}"
            f"{'  WRONG' if any(off) else ''}"
        )
    return n_wrong


def _version(tool: Path) -> str:
    done = subprocess.run([str(tool), "--version"], capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
