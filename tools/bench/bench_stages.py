"""Measure every stage of a conversion: seconds, floating-point operations, and the ratio to sgemm.

    python tools/bench/bench_stages.py MODEL [--target-bpw 4.5] [--rounding gptq] [--threads N] [--no-verify]

For each stage: the estimate shown before it starts; wall and CPU time, llama.cpp's process included; the operations
that it needs at least; and its CPU time over theirs at the rate of sgemm, measured on the same threads in the same run.
On a busy machine CPU time is the more reliable one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import threadpoolctl
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from nsds_gguf import Options, Run, VerifyOptions, convert
from nsds_gguf.calibration.generated_text import LENGTH, N_TOKENS
from nsds_gguf.calibration.hessians import multiplied
from nsds_gguf.calibration.kinds import N_SEQUENCES_GENERATED
from nsds_gguf.llamacpp.llama import default_threads
from nsds_gguf.quantize.measure import sample_rows
from nsds_gguf.records import Model, Progress
from nsds_gguf.session.estimate import input_widths, pass_operations
from nsds_gguf.session.source import open_model

_SGEMM_SIZE = 1024


@dataclass
class Stage:
    """A stage: wall and CPU seconds, summed over its runs."""

    wall: float = 0.0
    cpu: float = 0.0


class Stages:
    """A ``Reporter`` that measures."""

    def __init__(self) -> None:
        self.found: dict[str, Stage] = {}
        self.expected: dict[str, float] = {}
        self._last = time.perf_counter(), _cpu_seconds()

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Measure a stage; what lies between stages counts as ``between``."""
        self._add("between")
        try:
            yield lambda done, total: None
        finally:
            self._add("allocate" if name.startswith("allocate") else name)

    def expect(self, stages: Sequence[tuple[str, float]]) -> None:
        """Keep the estimates, by stage."""
        for name, seconds in stages:
            self.expected[name] = self.expected.get(name, 0.0) + seconds

    def say(self, text: str) -> None:
        """Print a note."""
        print(f"  {text}", flush=True)

    def _add(self, name: str) -> None:
        now = time.perf_counter(), _cpu_seconds()
        stage = self.found.setdefault(name, Stage())
        stage.wall += now[0] - self._last[0]
        stage.cpu += now[1] - self._last[1]
        self._last = now


def _cpu_seconds() -> float:
    """Return the CPU time of this process and its living children."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def sgemm_rate(n_threads: int) -> float:
    """Return float32 operations per CPU second of a matrix product on ``n_threads``."""
    a = np.random.default_rng(0).standard_normal((_SGEMM_SIZE, _SGEMM_SIZE), dtype=np.float32)
    best = 0.0
    with threadpoolctl.threadpool_limits(n_threads, user_api="blas"):
        for _ in range(8):
            start = time.process_time()
            for _ in range(4):
                a @ a
            best = max(best, 8 * _SGEMM_SIZE**3 / (time.process_time() - start))
    return best


def operations(model: Model, n_types: int) -> dict[str, float]:
    """Return the least operations of each stage of a conversion with GPTQ rounding, by name."""
    n_matrix = sum(tensor.n_weights for tensor in model.tensors if tensor.is_matrix)
    tensors = [model.by_name[name] for name in multiplied(model)]
    rounding = sum(tensor.n_weights * tensor.n_cols for tensor in tensors)
    measuring = sum(len(sample_rows(tensor)) * tensor.n_cols**2 for tensor in tensors)
    inputs = input_widths(model)
    return {
        "generate text": 2 * N_TOKENS * n_matrix,
        "find sensitivities": pass_operations(model, N_TOKENS, N_SEQUENCES_GENERATED * LENGTH)
        + N_TOKENS * sum(n**2 for n in inputs),
        "factor Hessians": sum(n**3 for n in inputs) / 3,
        "measure tensors": n_types * measuring,
        "quantize and write": rounding,
    }


def row(stage: Stage, expected: float | None, operations: float | None, rate: float) -> list[str]:
    """Return the cells of a stage: estimate, wall and CPU time, operations, ratio to sgemm."""
    cells = ["" if expected is None else f"{expected:.1f}", f"{stage.wall:.1f}", f"{stage.cpu:.1f}"]
    return [*cells, f"{operations / 1e9:.0f}", f"{stage.cpu / (operations / rate):.1f}"] if operations else cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--target-bpw", type=float, default=4.5)
    parser.add_argument("--rounding", default="auto")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--no-verify", action="store_true")
    arguments = parser.parse_args()
    rate = sgemm_rate(arguments.threads)
    stages, options = Stages(), Options(target_bpw=arguments.target_bpw, rounding=arguments.rounding)
    with tempfile.TemporaryDirectory() as folder:
        (made,) = convert(
            arguments.model, options, output=Path(folder) / "out.gguf",
            verifying=VerifyOptions(enabled=not arguments.no_verify), run=Run(arguments.threads, stages),
        )  # fmt: skip
    model = open_model(arguments.model, Run())
    least = operations(model, len(made.plan.recipe.types))
    table = Table(title=f"{model.name}: {model.n_weights / 1e6:.1f}M parameters, {arguments.threads} threads, sgemm "
                        f"{rate / 1e9:.0f} GFLOP per CPU second")  # fmt: skip
    for column in ("stage", "estimate s", "wall s", "CPU s", "GFLOP", "CPU s / sgemm"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, stage in stages.found.items():
        table.add_row(name, *row(stage, stages.expected.get(name), least.get(name), rate))
    parts = stages.found.values()
    whole = Stage(sum(stage.wall for stage in parts), sum(stage.cpu for stage in parts))
    table.add_row("all", *row(whole, sum(stages.expected.values()), sum(least.values()), rate), style="bold")
    Console(width=110).print(table)
    if made.perplexity is not None:
        print(made.perplexity)


if __name__ == "__main__":
    main()
