"""Compare our perplexity and KL divergence with llama-perplexity's, and record its numbers for the tests.

    python tools/check/check_perplexity.py --llama-perplexity PATH [--record]
    python tools/check/check_perplexity.py --llama-perplexity PATH --gguf FILE --text FILE [--reference FILE]
        [--ctx-size N,N]

The first form runs every setting of ``tests/perplexity_cases.py``: the tiny models and the demo model, with BOS and
without, at 128, 512 and 2048 tokens, in full and reduced precision, over texts that end inside a chunk; ``--record``
writes what llama-perplexity says to ``tests/golden/perplexity.json``. The second runs files of your own.

A perplexity must be equal to 4 decimals. A divergence is compared twice: what llama-perplexity prints with
``tests/llama_perplexity_oracle.py``, which rounds the reference to 16 bits as that program does, to 4 digits; and our
exact numbers with that oracle's exact ones, to 9. The file of log-probabilities itself is compared code by code. The
exit code is 1 when anything is off, when the tool is missing or when it fails.

The same build is compared where LLAMA_CPP_LIB_PATH names the folder of the libraries that PATH uses. llama-perplexity
runs with --no-repack: its AMX kernels crash when built by some compilers (llama.cpp issue 20824).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the makers of the very files that the tests use, and the oracle

from llama_perplexity_oracle import exact_scores, flat, rounded_scores, statistics, stored_log_probs
from perplexity_cases import CASES, Case, case_file, case_text, scored_logits

from nsds_gguf.errors import NsdsError
from nsds_gguf.evaluate.perplexity import Window, perplexity
from nsds_gguf.llamacpp.llama import llama_build

GOLDEN = ROOT / "tests" / "golden" / "perplexity.json"

# Besides half a unit of the last decimal that llama-perplexity prints. Its divergences are sums of float32 terms.
PERPLEXITY_TOLERANCE = 5e-5  # absolute
FLOAT32_TOLERANCE = 1e-6  # absolute
DIGITS_TOLERANCE = 5e-5  # relative
EXACT_TOLERANCE = 1e-9  # relative

# Positions whose top token a rounding may tip, and codes that it may move.
TIPPED_FRACTION = 2e-3
MOVED_FRACTION = 1e-3

# llama-perplexity now and then exits 0 without its last lines, more often on a busy machine.
N_ATTEMPTS = 25

# What llama-perplexity prints, by the name of our field. The reference's perplexity comes from its own run too: what
# the second run says of it, and of the ratio, is off where a token's logit is more than 16 below the largest.
_NUMBER = r"\s*(-?[\d.]+)"
_ALONE = {"ppl": rf"PPL ={_NUMBER}", "ppl_error": rf"PPL = .* \+/-{_NUMBER}"}


def _with_error(name: str, error: str, label: str) -> dict[str, str]:
    return {name: rf"{label} *:{_NUMBER}", error: rf"{label} *:.*±{_NUMBER}"}


def _percentiles(name: str, symbol: str, shown: str) -> dict[str, str]:
    labels = {key: rf"{float(key):.1f}%" for key in shown.split()}
    labels |= {"0": "Minimum", "50": "Median", "100": "Maximum"}
    return {f"{name}.{key}": rf"(?m:^ *{label} +{symbol}):{_NUMBER}" for key, label in labels.items()}


_PAIR = {
    **_with_error("ppl", "ppl_error", r"Mean PPL\(Q\)"),
    **_with_error("reference_ppl", "reference_ppl_error", r"Mean PPL\(base\)"),
    "log_ppl_correlation": rf"Cor\(.*\):{_NUMBER}",
    **_with_error("log_ppl_ratio", "log_ppl_ratio_error", r"Mean ln\(PPL\(Q\)/PPL\(base\)\)"),
    **_with_error("ppl_ratio", "ppl_ratio_error", r"Mean PPL\(Q\)/PPL\(base\)"),
    **_with_error("ppl_difference", "ppl_difference_error", r"Mean PPL\(Q\)-PPL\(base\)"),
    **_with_error("kld_mean", "kld_error", r"Mean +KLD"),
    **_percentiles("kld_percentiles", "KLD", "0.1 1 5 10 90 95 99 99.9"),
    **_with_error("delta_p_mean", "delta_p_error", r"Mean +Δp"),
    **_with_error("delta_p_rms", "delta_p_rms_error", r"RMS +Δp"),
    **_percentiles("delta_p_percentiles", "Δp", "0.1 1 5 10 25 75 90 95 99 99.9"),
    **_with_error("same_top", "same_top_error", "Same top p"),
}
_IN_PERCENT = ("delta_p", "same_top", "log_ppl_correlation")


@dataclass(frozen=True)
class Printed:
    """A number that llama-perplexity printed, and half a unit of its last decimal."""

    value: float
    slack: float


def main() -> int:
    args = _arguments()
    print(llama_build())
    try:
        with tempfile.TemporaryDirectory() as folder:
            n_wrong = _check_own(args, Path(folder)) if args.gguf else _check_cases(args, Path(folder))
    except (NsdsError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{n_wrong} numbers are off" if n_wrong else "all numbers agree")
    return 1 if n_wrong else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare our perplexity with llama-perplexity's.")
    parser.add_argument("--llama-perplexity", type=Path, required=True, metavar="PATH")
    parser.add_argument("--record", action="store_true", help=f"write {GOLDEN.relative_to(ROOT)}")
    parser.add_argument("--gguf", type=Path, help="a file of your own")
    parser.add_argument("--reference", type=Path, help="its reference")
    parser.add_argument("--text", type=Path, help="the text for it")
    parser.add_argument("--ctx-size", default="512", help="context lengths in tokens, separated by commas")
    parser.add_argument("--batch", type=int, default=2048, help="tokens decoded at once")
    parser.add_argument("--chunks", type=int, help="chunks to take at most")
    args = parser.parse_args()
    if not args.llama_perplexity.is_file():
        parser.error(f"{args.llama_perplexity}: no such file; build llama.cpp's llama-perplexity")
    if args.gguf and not args.text:
        parser.error("--gguf needs --text")
    return args


def _check_cases(args: argparse.Namespace, folder: Path) -> int:
    recorded, n_wrong = [], 0
    for case in CASES:
        for model in filter(None, (case.model, case.reference)):
            case_file(folder, model)
        printed, running, n_off = _check(args.llama_perplexity, folder, case_text(case), case)
        n_wrong += n_off
        numbers = {name: number.value for name, number in printed.items()}
        recorded.append({"case": asdict(case), "llama_perplexity": numbers, "running_ppl": running})
    if args.record:
        golden = {"llama.cpp": _version(args.llama_perplexity), "cases": recorded}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    return n_wrong


def _check_own(args: argparse.Namespace, folder: Path) -> int:
    for name, file in (("own", args.gguf), ("reference", args.reference)):
        if file:
            (folder / f"{name}.gguf").symlink_to(file.resolve())
    reference = "reference" if args.reference else None
    text = args.text.read_bytes().decode()
    cases = [Case("own", int(n_ctx), 0, args.batch, args.chunks, reference) for n_ctx in args.ctx_size.split(",")]
    return sum(_check(args.llama_perplexity, folder, text, case)[2] for case in cases)


def _check(tool: Path, folder: Path, text: str, case: Case) -> tuple[dict[str, Printed], list[float], int]:
    """Run both in one setting; return what llama-perplexity prints, chunk by chunk too, and how much is off."""
    print(case)
    running: list[float] = []
    result = perplexity(
        folder / f"{case.model}.gguf",
        text,
        Window(n_ctx=case.n_ctx, n_batch=case.n_batch, n_chunks=case.n_chunks),
        reference=folder / f"{case.reference}.gguf" if case.reference else None,
        on_chunk=lambda run: running.append(run.ppl),
    )
    ours = flat(result.to_json())
    options = ["--ctx-size", str(case.n_ctx), "--batch-size", str(case.n_batch), "--no-repack"]
    options += ["--file", str(_text_file(folder, text))]
    options += ["--chunks", str(case.n_chunks)] if case.n_chunks else []
    if case.reference is None:
        output = _run(tool, folder / f"{case.model}.gguf", options, "Final estimate")
        printed = _numbers(_ALONE, output)
        chunks = [float(value) for value in re.findall(r"\[\d+\]([\d.]+),", output)]
        wanted = {**printed, **{f"chunk {i}": Printed(ppl, 5e-5) for i, ppl in enumerate(chunks, 1)}}
        got = {**ours, **{f"chunk {i}": ppl for i, ppl in enumerate(running, 1)}}
        return printed, chunks, _compare(wanted, got, PERPLEXITY_TOLERANCE, 0)
    return _check_pair(tool, folder, text, case, ours, options)


def _check_pair(
    tool: Path, folder: Path, text: str, case: Case, ours: Mapping[str, float], options: list[str]
) -> tuple[dict[str, Printed], list[float], int]:
    """Compare a divergence with both forms of the oracle, and the stored log-probabilities with its codes."""
    stored = folder / "base.kld"
    options = [*options, "--kl-divergence-base", str(stored)]
    alone = _numbers(_ALONE, _run(tool, folder / f"{case.reference}.gguf", options, "Final estimate"))
    n_wrong = _compare({f"reference_{name}": number for name, number in alone.items()}, ours, PERPLEXITY_TOLERANCE, 0)
    printed = _numbers(_PAIR, _run(tool, folder / f"{case.model}.gguf", [*options, "--kl-divergence"], "Same top p:"))
    logits, targets = scored_logits(folder / f"{case.model}.gguf", text, case)
    base, _ = scored_logits(folder / f"{case.reference}.gguf", text, case)
    n_wrong += _compare_codes(stored, base)
    n_wrong += _compare(printed, statistics(rounded_scores(logits, base, targets)), FLOAT32_TOLERANCE, DIGITS_TOLERANCE)
    exact = statistics(exact_scores(logits, base, targets))
    n_wrong += _compare({name: Printed(exact[name], 1e-12) for name in exact}, ours, 0, EXACT_TOLERANCE)
    return printed, [], n_wrong


def _compare_codes(stored: Path, base: np.ndarray) -> int:
    """Compare the file of ``--kl-divergence-base`` with the oracle's codes of these logits; 1 when they differ."""
    data = stored.read_bytes()
    n_ctx, n_vocab, n_chunks = np.frombuffer(data, dtype=np.int32, count=3, offset=8).tolist()
    width = 2 * ((n_vocab + 1) // 2) + 4  # two float32 before the codes, and a code to fill
    rows = np.frombuffer(data, dtype=np.uint16, offset=20 + 4 * n_ctx * n_chunks).reshape(-1, width)
    codes, scale, least = stored_log_probs(base)
    heads = np.ascontiguousarray(rows[:, :4]).view(np.float32)
    moved = np.abs(rows[:, 4 : 4 + n_vocab].astype(int) - codes)
    close = np.allclose(heads, np.hstack([scale, least]), rtol=1e-4, atol=1e-4)
    wrong = bool((moved > 1).mean() > MOVED_FRACTION) or not close
    print(f"  16-bit codes: {100 * (moved == 0).mean():.3f} % equal, largest difference {moved.max()}"
          f"{'  WRONG' if wrong else ''}")  # fmt: skip
    return int(wrong)


def _text_file(folder: Path, text: str) -> Path:
    path = folder / "text.txt"
    path.write_bytes(text.encode())
    return path


def _run(tool: Path, model: Path, options: list[str], last: str) -> str:
    command = [str(tool), "--model", str(model), *options]
    for _ in range(N_ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr[-300:]}")
        if last in done.stdout + done.stderr:
            return done.stdout + done.stderr
    raise RuntimeError(f"{' '.join(command)}: {N_ATTEMPTS} runs without {last!r} in the output")


def _numbers(patterns: Mapping[str, str], output: str) -> dict[str, Printed]:
    numbers = {}
    for name, pattern in patterns.items():
        match = re.search(pattern, output)
        if match is None:
            raise RuntimeError(f"llama-perplexity printed no {name}: {output[-300:]}")
        unit = 10.0 ** -len(match[1].partition(".")[2]) / (100 if name.startswith(_IN_PERCENT) else 1)
        numbers[name] = Printed(float(match[1]) / (100 if name.startswith(_IN_PERCENT) else 1), unit / 2)
    return numbers


def _compare(wanted: Mapping[str, Printed], got: Mapping[str, float], absolute: float, relative: float) -> int:
    """Print the worst number and those that are off, and return how many these are."""
    n_wrong, worst = 0, ("", -1.0)
    for name, printed in wanted.items():
        slack = printed.slack + absolute + relative * abs(printed.value)
        if name.startswith("same_top") and relative != EXACT_TOLERANCE:
            slack += TIPPED_FRACTION
        off = abs(got[name] - printed.value)
        worst = max(worst, (name, off / slack), key=lambda item: item[1])
        if not off <= slack:
            n_wrong += 1
            print(f"  {name:26} wanted {printed.value:13.6f}  got {got[name]:13.6f}  WRONG")
    name = worst[0]
    print(f"  {len(wanted)} numbers, the worst {name}: wanted {wanted[name].value:.6f}, got {got[name]:.8f}")
    return n_wrong


def _version(tool: Path) -> str:
    done = subprocess.run([str(tool), "--version"], capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
