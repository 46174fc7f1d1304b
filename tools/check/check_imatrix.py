"""Compare collected activations with llama-imatrix's, and record its files for the tests.

    python tools/check/check_imatrix.py --llama-imatrix PATH [--record]

Every case of ``tests/imatrix_cases.py``: mean squares and counts of every matrix that llama-imatrix looks at, the
output matrix included, must agree to a thousandth of a matrix's largest (it sums in single precision; builds for other
processors round elsewhere). ``--record`` writes its files to ``tests/golden``. The exit code is 1 when anything is off,
when the tool is missing or when it fails.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the makers of the very files that the tests use

from imatrix_cases import CASES, Case, case_file, case_tokens
from tiny_gguf import tiny_text

from nsds_gguf.calibration.activations import collect
from nsds_gguf.llamacpp.llama import llama_build

TOLERANCE = 1e-3


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-imatrix", type=Path, required=True, metavar="PATH", help="the built program")
    parser.add_argument("--record", action="store_true", help="write what it says to tests/golden")
    arguments = parser.parse_args()
    if not arguments.llama_imatrix.is_file():
        print(f"{arguments.llama_imatrix}: no such program; build llama-imatrix from llama.cpp")
        return 1
    print(f"ours: {llama_build()}")
    n_wrong = 0
    with tempfile.TemporaryDirectory() as name:
        for case in CASES:
            theirs = _run(arguments.llama_imatrix, Path(name), case)
            n_wrong += _compare(theirs, Path(name), case)
            if arguments.record:
                shutil.copyfile(theirs, ROOT / "tests" / "golden" / f"imatrix-{case.model}.gguf")
    return int(n_wrong > 0)


def _run(tool: Path, folder: Path, case: Case) -> Path:
    text, output = folder / "text.txt", folder / f"imatrix-{case.model}.gguf"
    text.write_text(tiny_text(), encoding="utf-8")
    options = ["--model", str(case_file(folder, case)), "--file", "text.txt", "--output", str(output)]
    options += ["--ctx-size", str(case.n_ctx), "--chunks", str(case.n_chunks)]
    options += ["--process-output", "--no-ppl", "--no-repack"]
    done = subprocess.run([str(tool.resolve()), *options], capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode != 0 or not output.is_file():
        raise RuntimeError(f"{tool} {' '.join(options)}: exit code {done.returncode}: {done.stderr[-300:]}")
    return output


def _compare(theirs: Path, folder: Path, case: Case) -> int:
    file = folder / f"{case.model}.gguf"
    found = collect(file, case_tokens(file, case), n_threads=1)
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in GGUFReader(theirs).tensors}
    names = [name.removesuffix(".counts") for name in tensors if name.endswith(".counts")]
    worst = 0.0
    for name in names:
        counts = tensors[f"{name}.counts"].reshape(-1, 1)
        wanted = tensors[f"{name}.in_sum2"].reshape(-1, found[name].mean_squares.shape[-1]) / np.maximum(counts, 1)
        got = found[name].mean_squares.reshape(wanted.shape)
        worst = max(worst, float(np.abs(got - wanted).max() / wanted.max()))
    print(f"{case.model}: {len(names)} tensors, worst difference {worst:.1e} of a matrix's largest mean square; "
          f"not theirs: {', '.join(sorted(found.keys() - set(names))) or 'none'}")  # fmt: skip
    return int(not names or worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
