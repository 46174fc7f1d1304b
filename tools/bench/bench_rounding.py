"""Measure the compiled rounding loop on one thread: GPTQ against sgemm, round-to-nearest against ggml.

    python tools/bench/bench_rounding.py [--columns 2048] [--rows 256] [--variant avx2]

CPU time of a thread, the least of some tries that alternate. GPTQ takes ``n_cols / 2`` multiplications a weight to the
left of its block and about 640 in it (``quantize/gptq.py``); "over sgemm" is its time over that of as many by sgemm.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from nsds_gguf.llamacpp import ggml
from nsds_gguf.quantize import kernel
from nsds_gguf.quantize.formats import FORMATS
from nsds_gguf.quantize.hessian_factors import factor_hessian
from nsds_gguf.system.resources import blas_threads

_TRIES = 5
_WITHIN_BLOCKS = 640  # multiplications a weight
_SGEMM_SIZE = 1024


def seconds(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least CPU seconds of each function, in tries that alternate."""
    found = dict.fromkeys(functions, np.inf)
    for _ in range(_TRIES):
        for name, function in functions.items():
            start = time.thread_time()
            function()
            found[name] = min(found[name], time.thread_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--variant", default=kernel.variants()[0], choices=kernel.variants())
    arguments = parser.parse_args()
    rng, n_cols = np.random.default_rng(0), arguments.columns
    rows = rng.standard_normal((arguments.rows, n_cols), dtype=np.float32)
    inputs = rng.standard_normal((2 * n_cols, n_cols), dtype=np.float32) * np.exp(rng.standard_normal(n_cols) / 2)
    square = rng.standard_normal((_SGEMM_SIZE, _SGEMM_SIZE), dtype=np.float32)
    table = Table(title=f"{arguments.rows} rows of {n_cols} columns, {arguments.variant}, ns a weight")
    for column in ("type", "GPTQ", "over sgemm", "to nearest", "ggml to nearest"):
        table.add_column(column, justify="left" if column == "type" else "right")
    with blas_threads(1):
        factors = factor_hessian(inputs.T @ inputs / len(inputs))
        for name in FORMATS:
            trials = {
                "sgemm": lambda: square @ square,
                "gptq": lambda name=name: kernel.round_rows(rows, name, factors, 1, arguments.variant),
                "ggml": lambda name=name: ggml.quantize(rows, name, factors.diagonal),
            }
            if name in kernel.NEAREST_TYPES:
                trials["nearest"] = lambda name=name: kernel.nearest_rows(
                    rows, name, factors.diagonal, arguments.variant
                )
            found = {trial: least / rows.size * 1e9 for trial, least in seconds(trials).items()}
            per_product = found["sgemm"] * rows.size / _SGEMM_SIZE**3
            ratio = found["gptq"] / (per_product * (n_cols / 2 + _WITHIN_BLOCKS))
            nearest = f"{found['nearest']:.0f}" if "nearest" in found else ""
            table.add_row(name, f"{found['gptq']:.0f}", f"{ratio:.1f}", nearest, f"{found['ggml']:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
