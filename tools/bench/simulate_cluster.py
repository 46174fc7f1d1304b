"""Simulate conversions on a cluster from task times recorded on this machine: 70 B and 671 B on 1, 4 and 16 machines.

    python tools/bench/simulate_cluster.py [--record FILE | --times FILE]      20 s; needs the extra cluster

Tasks are recorded on one thread at widths of TinyLlama (2048) and of Llama 3.1 8B (4096), and scaled to other
dimensions by their weights and multiplications. The simulation submits tasks as ``system.cluster`` does: in order, a
bounded number in flight per slot, results taken one after the other by the client. docs/cluster.md has the assumptions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from models import make_model

from nsds_gguf.compute.layers import view_layer
from nsds_gguf.llamacpp import ggml
from nsds_gguf.quantize.gptq import ROW_TILE, GptqQuantizer
from nsds_gguf.quantize.hessian_factors import factor_hessian
from nsds_gguf.quantize.measure import FIRST_SAMPLE
from nsds_gguf.quantize.rtn import RtnQuantizer
from nsds_gguf.records import Float32, Hparams
from nsds_gguf.sensitivity.blocks import block_update
from nsds_gguf.sensitivity.fisher import fisher
from nsds_gguf.sensitivity.moments import Signal
from nsds_gguf.system.cluster import SLAB_BYTES
from nsds_gguf.system.resources import blas_threads
from nsds_gguf.system.workers import AHEAD, FAR_AHEAD

CORES, PROCESSES = 16, 4  # of a machine; processes of four threads
STORAGE_BYTES_S = 2e9  # that all machines read from shared storage together
WRITE_BYTES_S = 1e9  # of the client's disk
N_TYPES = 5  # that a tensor is measured in
BITS = 3.5  # of written weights
TOKENS_BACK, TOKENS_HESSIANS = 1024, 8192  # of the Fisher pass, and of the pass that collects Hessians
GPTQ_TYPES, RTN_TYPES = ("Q3_K", "Q4_K"), ("Q3_K", "Q4_K")


@dataclass(frozen=True)
class Times:
    """Recorded times on one thread, in seconds.

    Attributes:
        decode: BF16 to float32, and the check for NaN and infinity, per weight.
        round_rtn: to nearest, per weight.
        round_gptq: by GPTQ, per weight, and per weight and column of the matrix.
        factor: of a Hessian, per cube of its columns.
        sgemm: per multiplication and addition of a float32 product.
        passing: ratio of the Fisher pass to its products by sgemm.
        propagate: moment propagation through a feed-forward block, per weight.
        result: to take a result over, per result and per byte.

    """

    decode: float
    round_rtn: float
    round_gptq: tuple[float, float]
    factor: float
    sgemm: float
    passing: float
    propagate: float
    result: tuple[float, float]


@dataclass(frozen=True)
class Matrix:
    """A stored tensor: ``n`` matrices ``(rows, cols)``; ``input`` names what its Hessian is of, if it has one."""

    rows: int
    cols: int
    n: int = 1
    input: str = ""

    @property
    def n_weights(self) -> int:
        return self.rows * self.cols * self.n


@dataclass(frozen=True)
class Task:
    """Seconds of one core, bytes read from storage, bytes of the result."""

    seconds: float
    read: float
    result: float


# --- recording --------------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object], n: int = 2) -> float:
    """Return the CPU seconds of the fastest of ``n`` runs."""
    found = []
    for _ in range(n):
        start = time.thread_time()
        function()
        found.append(time.thread_time() - start)
    return min(found)


def record() -> Times:
    rng = np.random.default_rng(1)
    with blas_threads(1):
        wide = (rng.standard_normal((512, 4096)) / 64).astype(np.float32)
        stored = ggml.quantize(wide, "BF16")
        decode = seconds(lambda: np.isfinite(ggml.dequantize(stored, "BF16", 4096)).all()) / wide.size
        nearest = RtnQuantizer(np.ones(4096, np.float32), len(wide))
        rtn = [seconds(lambda name=name: nearest.quantize(wide, name)) for name in RTN_TYPES]
        square = rng.standard_normal((2048, 2048)).astype(np.float32)
        sgemm = seconds(lambda: square @ square) / (2 * 2048**3)
        factors = {n: factored(rng, n) for n in (2048, 4096)}  # the widths of TinyLlama and of 8 B
        gptq = {n: tile_seconds(rng, n) / (ROW_TILE * n) for n in (2048, 4096)}
        slope = (gptq[4096] - gptq[2048]) / 2048
        passing, propagating = record_layer(rng, sgemm)
    return Times(
        decode, sum(rtn) / len(rtn) / wide.size, (max(0.0, gptq[2048] - 2048 * slope), max(0.0, slope)),
        max(value / n**3 for n, value in factors.items()), sgemm, passing, propagating, record_results(),
    )  # fmt: skip


def hessian(rng: np.random.Generator, n: int) -> Float32:
    x = rng.standard_normal((512, n)).astype(np.float32)
    return x.T @ x / 512


def factored(rng: np.random.Generator, n: int) -> float:
    found = hessian(rng, n)
    return seconds(lambda: factor_hessian(found, shrinkage=0.3), 1)


def tile_seconds(rng: np.random.Generator, n: int) -> float:
    quantizer = GptqQuantizer(factor_hessian(hessian(rng, n), shrinkage=0.3))
    rows = (rng.standard_normal((ROW_TILE, n)) / 64).astype(np.float32)
    return sum(seconds(lambda name=name: quantizer.quantize(rows, name)) for name in GPTQ_TYPES) / len(GPTQ_TYPES)


def record_layer(rng: np.random.Generator, sgemm: float) -> tuple[float, float]:
    """Run one layer of TinyLlama's dimensions through the Fisher pass and through moment propagation.

    Returns the seconds of the pass over those of its products by sgemm, and the seconds of propagation per weight.
    """
    d, ff, n_kv = 2048, 5632, 256
    shapes = {"attn_q": (d, d), "attn_k": (n_kv, d), "attn_v": (n_kv, d), "attn_output": (d, d),
              "ffn_gate": (ff, d), "ffn_up": (ff, d), "ffn_down": (d, ff)}  # fmt: skip
    arrays = {f"blk.0.{role}.weight": (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
              for role, shape in shapes.items()}  # fmt: skip
    n_weights = sum(array.size for array in arrays.values())
    arrays |= {f"blk.0.{role}_norm.weight": np.ones(d, np.float32) for role in ("attn", "ffn")}
    arrays |= {"token_embd.weight": rng.standard_normal((256, d)).astype(np.float32),
               "output_norm.weight": np.ones(d, np.float32)}  # fmt: skip
    hparams = Hparams(n_layers=1, n_embd=d, n_ff=ff, n_heads=32, n_kv_heads=4, head_dim=64, n_vocab=256,
                      n_ctx_train=2048, norm_eps=1e-5)  # fmt: skip
    model, tokens = make_model(arrays, hparams), rng.integers(0, 256, (1, 512))
    start = time.process_time()
    fisher(model, tokens, 1)
    passed = time.process_time() - start
    (block,) = view_layer(model, 0).feed_forward
    propagated = seconds(lambda: block_update(block, {}, Signal(np.ones(d)), hparams), 1)
    return passed / (8 * n_weights * tokens.size * sgemm), propagated / (3 * d * ff)


def record_results() -> tuple[float, float]:
    """Return the client's seconds per result of a local cluster, and per byte of it."""
    from distributed import Client, LocalCluster

    found = {}
    with LocalCluster(1, threads_per_worker=1, dashboard_address=None) as local, Client(local) as client:
        for n_bytes in (8, 4 << 20):
            futures = [client.submit(bytes, n_bytes, pure=False) for _ in range(40)]
            futures[-1].result()
            start = time.process_time()
            for future in futures:
                future.result()
            found[n_bytes] = (time.process_time() - start) / len(futures)
            del futures, future
    return found[8], (found[4 << 20] - found[8]) / (4 << 20)


# --- models -----------------------------------------------------------------------------------------------------------


def llama_70b() -> list[list[Matrix]]:
    """Return the matrices of Llama 3 70B: those outside the layers, then layer by layer."""
    d, ff, kv = 8192, 28672, 1024
    layer = [Matrix(d, d, input="qkv"), Matrix(kv, d, input="qkv"), Matrix(kv, d, input="qkv"),
             Matrix(d, d, input="o"), Matrix(ff, d, input="up"), Matrix(ff, d, input="up"),
             Matrix(d, ff, input="down")]  # fmt: skip
    return [[Matrix(128256, d), Matrix(128256, d, input="output")], *([layer] * 80)]


def deepseek_v3() -> list[list[Matrix]]:
    """Return the matrices of DeepSeek-V3, whose experts are stacked and have no Hessians."""
    d, q, kv = 7168, 1536, 512
    attention = [Matrix(q, d), Matrix(128 * 192, q), Matrix(kv + 64, d), Matrix(128 * 256, kv), Matrix(d, 128 * 128)]
    dense = [*attention, Matrix(18432, d), Matrix(18432, d), Matrix(d, 18432)]
    sparse = [*attention, *([Matrix(2048, d), Matrix(2048, d), Matrix(d, 2048)]),
              Matrix(2048, d, 256), Matrix(2048, d, 256), Matrix(d, 2048, 256)]  # fmt: skip
    return [[Matrix(129280, d), Matrix(129280, d)], *([dense] * 3), *([sparse] * 58)]


# --- tasks of the stages ----------------------------------------------------------------------------------------------


def per_weight(matrix: Matrix, times: Times, gptq: bool) -> float:
    """Return the seconds to round a weight."""
    base, per_column = times.round_gptq
    return base + per_column * matrix.cols if gptq and matrix.input else times.round_rtn


def measuring(matrices: Sequence[Matrix], times: Times, gptq: bool) -> Iterator[Task]:
    for m in matrices:
        n = min(m.rows * m.n, FIRST_SAMPLE) * m.cols
        yield Task(n * (times.decode + N_TYPES * per_weight(m, times, gptq)), 2 * n, 200)


def writing(matrices: Sequence[Matrix], times: Times, gptq: bool) -> Iterator[Task]:
    for m in matrices:
        rows = max(1, SLAB_BYTES // (4 * m.cols))
        for _ in range(m.n):
            for start in range(0, m.rows, rows):
                n = min(rows, m.rows - start) * m.cols
                yield Task(n * (times.decode + per_weight(m, times, gptq)), 2 * n, n * BITS / 8)


def factoring(matrices: Sequence[Matrix], times: Times) -> Iterator[Task]:
    for n in {m.input: m.cols for m in matrices if m.input}.values():
        yield Task(times.factor * n**3, 4 * n**2, 200)


def propagating(layer: Sequence[Matrix], times: Times) -> Iterator[Task]:
    """Yield the blocks of a layer's feed-forward: its experts, and the dense or shared one."""
    *_, gate, _up, _down = layer
    for m in (gate,) if gate.n > 1 or len(layer) == 8 else ():
        block = Task(3 * m.rows * m.cols * times.propagate, 2 * 3 * m.rows * m.cols, 3 * 8 * m.cols)
        yield from [block] * (m.n + (m.n > 1))


# --- the simulation ---------------------------------------------------------------------------------------------------


def simulate(tasks: Sequence[Task], times: Times, n_slots: int, ahead: int = AHEAD) -> float:
    """Return the seconds of a stage: slots, storage that all share, and a client that takes results in order."""
    free, storage, taken = [0.0] * n_slots, 0.0, [0.0]
    per_result, per_byte = times.result
    window = ahead * n_slots
    for number, task in enumerate(tasks):
        submitted = taken[max(0, number + 1 - window)]
        slot = min(range(n_slots), key=free.__getitem__)
        start = max(free[slot], submitted)
        storage = max(storage, start) + task.read / STORAGE_BYTES_S
        free[slot] = max(storage, start) + task.seconds
        cost = per_result + task.result * (per_byte + 1 / WRITE_BYTES_S)
        taken.append(max(taken[-1], free[slot]) + cost)
    return taken[-1]


def stages(layers: Sequence[Sequence[Matrix]], times: Times, gptq: bool, n_machines: int) -> dict[str, float]:
    """Return the seconds of every stage; the pass over tokens runs on the client's machine alone."""
    slots, processes = CORES * n_machines, PROCESSES * n_machines
    every = [m for layer in layers for m in layer]
    found: dict[str, float] = {}
    if any(m.n > 1 for m in every):
        found["sensitivities (layer after layer)"] = (
            sum(simulate(list(propagating(layer, times)), times, slots) for layer in layers[1:])
            + sum(m.n_weights for m in every if m.n == 1) * times.propagate
        )
    else:
        n = sum(m.n_weights for m in every)
        multiplied = 8 * n * TOKENS_BACK
        if gptq:
            squares = sum(c**2 for layer in layers for c in {m.input: m.cols for m in layer if m.input}.values())
            multiplied += 2 * n * (TOKENS_HESSIANS - TOKENS_BACK) + squares * TOKENS_HESSIANS
        found["sensitivities (client)"] = (multiplied * times.sgemm * times.passing + 2 * n * times.decode) / CORES
    if gptq:
        factors = [task for layer in layers for task in factoring(layer, times)]
        found["Hessian factors"] = simulate(factors, times, processes, FAR_AHEAD)
    found["measuring"] = simulate(list(measuring(every, times, gptq)), times, slots, FAR_AHEAD)
    found["writing"] = simulate(list(writing(every, times, gptq)), times, slots)
    return found


CASES = (
    ("70 B, round to nearest", llama_70b, False),
    ("70 B, GPTQ rounding", llama_70b, True),
    ("671 B, round to nearest", deepseek_v3, False),
)


def table(times: Times, machines: Sequence[int] = (1, 4, 16)) -> str:
    """Return the Markdown table of docs/cluster.md, in minutes."""
    lines = ["| model, stage | " + " | ".join(f"{n} machine{'s' * (n > 1)}" for n in machines) + " |",
             "|---|" + "---:|" * len(machines)]  # fmt: skip
    for title, layers, gptq in CASES:
        found = [stages(layers(), times, gptq, n) for n in machines]
        for stage in found[0]:
            lines.append(f"| {title}: {stage} | " + " | ".join(f"{each[stage] / 60:.1f}" for each in found) + " |")
        totals = [sum(each.values()) / 60 for each in found]
        lines.append(f"| **{title}: all** | " + " | ".join(f"**{total:.0f}**" for total in totals) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="write the recorded times as JSON")
    parser.add_argument("--times", type=Path, help="read recorded times instead of recording")
    arguments = parser.parse_args()
    if arguments.times is not None:
        times = Times(**{key: tuple(value) if isinstance(value, list) else value
                         for key, value in json.loads(arguments.times.read_text()).items()})  # fmt: skip
    else:
        times = record()
    if arguments.record is not None:
        arguments.record.write_text(json.dumps(asdict(times), indent=1) + "\n")
    print(json.dumps(asdict(times)))
    print(table(times))


if __name__ == "__main__":
    main()
