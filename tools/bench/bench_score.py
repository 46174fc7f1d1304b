"""Measure NSDS scoring against full singular value decompositions, at TinyLlama's dimensions.

One pair = one layer by full SVDs (float32 LAPACK gesdd with vectors, of all 64 d x d attention products and the 3 FFN
matrices; forming the products is not counted) and the same layer by ``nsds_gguf.score`` (everything: reading, both
components of the score; the unembedding, once per model, is timed on its own). Both run in one process with the same
BLAS and threads. The first pair is measured in full, the others time a few of the equal-sized products and scale.

    python tools/bench/bench_score.py            about 4 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import linalg

from nsds_gguf.compute.layers import view_layer
from nsds_gguf.metrics import SE_READINGS, score_layers
from nsds_gguf.metrics.nsds import layer_components, output_projection
from nsds_gguf.read.safetensors import SafetensorsTensor
from nsds_gguf.records import Float32, Hparams, Model, Tensor

TINYLLAMA = Hparams(
    n_layers=1,
    n_embd=2048,
    n_ff=5632,
    n_heads=32,
    n_kv_heads=4,
    head_dim=64,
    n_vocab=32000,
    n_ctx_train=2048,
    norm_eps=1e-5,
)
N_PAIRS = 3
N_SAMPLED_PRODUCTS = 8


def synthetic_matrix(rng: np.random.Generator, n_rows: int, n_cols: int) -> Float32:
    """Return weights with uneven channels and a few strong directions with heavy tails, as trained ones have."""
    channels = 0.02 * np.exp(0.4 * rng.standard_normal(n_cols, dtype=np.float32))
    bulk: Float32 = rng.standard_normal((n_rows, n_cols), dtype=np.float32) * channels
    strong = rng.standard_t(4, (n_rows, 16)) * np.geomspace(0.01, 0.001, 16)
    bulk += strong.astype(np.float32) @ rng.standard_t(4, (16, n_cols)).astype(np.float32)
    return bulk


def synthetic_model(folder: Path, hparams: Hparams) -> Model:
    """Write one layer and the output matrix of a random model to ``folder`` and return the model, read row by row."""
    h, rng = hparams, np.random.default_rng(0)
    n_q, n_kv = h.n_heads * h.head_dim, h.n_kv_heads * h.head_dim
    shapes = {
        "output.weight": (h.n_vocab, h.n_embd),
        "blk.0.attn_q.weight": (n_q, h.n_embd),
        "blk.0.attn_k.weight": (n_kv, h.n_embd),
        "blk.0.attn_v.weight": (n_kv, h.n_embd),
        "blk.0.attn_output.weight": (h.n_embd, n_q),
        "blk.0.ffn_gate.weight": (h.n_ff, h.n_embd),
        "blk.0.ffn_up.weight": (h.n_ff, h.n_embd),
        "blk.0.ffn_down.weight": (h.n_embd, h.n_ff),
    }
    for name, shape in shapes.items():
        if not (folder / name).exists():
            synthetic_matrix(rng, *shape).tofile(folder / name)
    tensors = tuple(file_tensor(folder / name, shape) for name, shape in shapes.items())
    return Model(folder, "llama", "LlamaForCausalLM", hparams, tensors, {}, (), "0" * 64)


def file_tensor(path: Path, shape: tuple[int, int]) -> Tensor:
    """Return the tensor named like its file of raw float32 rows."""
    parts = path.name.split(".")
    layer, role = (int(parts[1]), parts[2]) if parts[0] == "blk" else (None, parts[0])
    stored = SafetensorsTensor(path.name, "F32", shape, path, 0)  # without a header: it begins with the rows
    return Tensor(path.name, role, layer, shape, "F32", path.name, stored)


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of ``work()``."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def products(model: Model) -> list[Float32]:
    """Return the d x d products of the layer's attention: QK and OV of each head in turn."""
    h, layer = model.hparams, {role: tensor.load() for role, tensor in model.layer(0).items()}
    rows = [slice(i * h.head_dim, (i + 1) * h.head_dim) for i in range(h.n_heads)]
    shared = [rows[i // (h.n_heads // h.n_kv_heads)] for i in range(h.n_heads)]
    qk = [layer["attn_q"][q].T @ layer["attn_k"][k] for q, k in zip(rows, shared, strict=True)]
    ov = [layer["attn_output"][:, o] @ layer["attn_v"][v] for o, v in zip(rows, shared, strict=True)]
    return [matrix for pair in zip(qk, ov, strict=True) for matrix in pair]


def full_svd_seconds(matrix: Float32) -> float:
    """Return the time of one full singular value decomposition with vectors, float32 gesdd."""
    return seconds(lambda: linalg.svd(matrix, full_matrices=False, check_finite=False, lapack_driver="gesdd"))


def attention_baseline_seconds(model: Model, n_products: int) -> float:
    """Return the time of the full SVDs of all of a layer's attention products, from the first ``n_products``."""
    matrices = products(model)
    return sum(full_svd_seconds(matrix) for matrix in matrices[:n_products]) * len(matrices) / n_products


def ffn_baseline_seconds(model: Model) -> float:
    """Return the time of the full SVDs of a layer's three FFN matrices."""
    layer = model.layer(0)
    return sum(full_svd_seconds(layer[role].load()) for role in ("ffn_gate", "ffn_up", "ffn_down"))


def pair(model: Model, projection: Float32, n_products: int) -> dict[str, Any]:
    """Measure one layer both ways; ours before, amid and after the full SVDs (median), as other load comes and goes."""

    def score_layer() -> float:
        return seconds(lambda: layer_components(view_layer(model, 0), projection, SE_READINGS["ratio"]))

    ours = [score_layer()]
    baseline_s = attention_baseline_seconds(model, n_products)
    ours.append(score_layer())
    baseline_s += ffn_baseline_seconds(model)
    ours.append(score_layer())
    ours_s = statistics.median(ours)
    return {
        "baseline_s": baseline_s,
        "ours_s": ours_s,
        "ratio": baseline_s / ours_s,
        "products_timed": n_products,
    }


def peak_bytes() -> int:
    """Return the peak resident memory of this process (Linux, VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def peak_in_subprocess(folder: Path) -> int:
    """Return the peak memory of a fresh interpreter that scores the model in ``folder``."""
    command = [sys.executable, __file__, "--peak-of", str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def bench() -> dict[str, Any]:
    """Measure and return ``ratio`` (median of the pairs), ``pairs``, ``unembedding_s``, ``peak_bytes``, ``threads``."""
    with tempfile.TemporaryDirectory() as name:
        model = synthetic_model(Path(name), TINYLLAMA)
        peak = peak_in_subprocess(Path(name))
        unembedding_s = seconds(lambda: output_projection(model))
        projection = output_projection(model)
        n_timed = [2 * TINYLLAMA.n_heads] + [N_SAMPLED_PRODUCTS] * (N_PAIRS - 1)
        pairs = [pair(model, projection, n_products) for n_products in n_timed]
    return {
        "ratio": statistics.median(each["ratio"] for each in pairs),
        "pairs": pairs,
        "unembedding_s": unembedding_s,
        "peak_bytes": peak,
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", f"{os.cpu_count()} (all)"),
    }


def report(result: dict[str, Any]) -> str:
    """Return what ``bench`` measured, in lines."""
    n_all = 2 * TINYLLAMA.n_heads
    lines = [f"NSDS per layer at d 2048, ffn 5632, 32 heads, 4 KV heads; BLAS threads: {result['threads']}"]
    for each in result["pairs"]:
        n_timed = each["products_timed"]
        scaled = "" if n_timed == n_all else f" (scaled from {n_timed} of {n_all} products)"
        lines.append(f"full SVDs {each['baseline_s']:.1f} s{scaled}, ours {each['ours_s']:.2f} s: {each['ratio']:.1f}x")
    lines.append(f"median ratio {result['ratio']:.1f}x; unembedding, once per model: {result['unembedding_s']:.1f} s")
    lines.append(f"peak memory of scoring, interpreter included: {result['peak_bytes'] / 2**20:.0f} MiB")
    return "\n".join(lines)


def main() -> None:
    """Run the whole measurement, or with ``--peak-of`` score once and print the peak memory in bytes."""
    parser = argparse.ArgumentParser(description="Measure NSDS scoring against full SVDs.")
    parser.add_argument("--peak-of", type=Path, metavar="FOLDER", help="print the peak bytes of scoring this model")
    folder = parser.parse_args().peak_of
    if folder is None:
        print(report(bench()))
        return
    score_layers(synthetic_model(folder, TINYLLAMA))
    print(peak_bytes())


if __name__ == "__main__":
    main()
