"""Measure quantizing and writing against llama.cpp's own quantizer, with the same threads, types and importance.

One pair = ``write_gguf`` from safetensors, and ``llama_model_quantize`` from a BF16 GGUF of the same weights; both
files go to the same folder and are compared byte for byte. Pairs alternate, ratios are taken within a pair.

    python tools/bench/bench_write.py            about 2 minutes on 2 cores, 1 GB in the temporary folder
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the oracle that the tests use

from llama_quantize import assert_same_bytes, llama_quantize, name_patterns, per_expert
from plans import cycled_types, llama_keys, plan_of, uniform_plan

from nsds_gguf.llamacpp import ggml
from nsds_gguf.llamacpp.llama import default_threads, llama_build
from nsds_gguf.quantize import TensorQuantizers
from nsds_gguf.quantize.write import write_gguf
from nsds_gguf.read.mapping import rope_row_order
from nsds_gguf.read.safetensors import SafetensorsTensor
from nsds_gguf.records import Float32, Hparams, Model, Plan, Tensor
from nsds_gguf.records.transforms import TakeRows
from nsds_gguf.system.workers import Threads

N_PAIRS = 3
HPARAMS = Hparams(
    n_layers=8,
    n_embd=1024,
    n_ff=2816,
    n_heads=16,
    n_kv_heads=4,
    head_dim=64,
    n_vocab=32000,
    n_ctx_train=2048,
    norm_eps=1e-5,
)


@dataclass(frozen=True)
class Pair:
    """Seconds of one paired run."""

    ours: float
    theirs: float

    @property
    def speed(self) -> float:
        """Our speed over llama.cpp's: above 1 we are faster."""
        return self.theirs / self.ours


def bench(n_pairs: int = N_PAIRS, n_threads: int | None = None) -> dict[str, float]:
    """Return median seconds and the median ratio of speeds, without and with column importance."""
    n_threads = n_threads or default_threads()
    llama_build()  # loads llama.cpp and silences its log
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = synthetic_model(folder, HPARAMS)
        source = folder / "source-BF16.gguf"
        write_gguf(model, uniform_plan(model, "BF16"), TensorQuantizers(), source, workers=Threads(n_threads))
        plan = plan_of(model, cycled_types(model, ggml.K_TYPES))
        importance = random_importance(model)
        found = {"n_weights": float(model.n_weights), "n_threads": float(n_threads)}
        for label, weights in (("plain", {}), ("importance", importance)):
            pairs = compare(model, plan, weights, source, folder, n_threads, n_pairs)
            found |= {
                f"{label}_ours_s": statistics.median(pair.ours for pair in pairs),
                f"{label}_llama_s": statistics.median(pair.theirs for pair in pairs),
                f"{label}_speed": statistics.median(pair.speed for pair in pairs),
                f"{label}_speed_min": min(pair.speed for pair in pairs),
            }
    return found


def compare(
    model: Model,
    plan: Plan,
    importance: Mapping[str, Float32],
    source: Path,
    folder: Path,
    n_threads: int,
    n_pairs: int = N_PAIRS,
) -> list[Pair]:
    """Time both writers of a plan, alternating which comes first; the files must be the same, byte for byte.

    ``source`` is an F32 or BF16 GGUF of the model, for llama.cpp.
    """
    ours, theirs = folder / "ours.gguf", folder / "llama.gguf"
    patterns = name_patterns({tensor.name: tensor.type for tensor in plan.tensors})
    columns = per_expert(model, importance)

    def write_ours() -> None:
        write_gguf(model, plan, TensorQuantizers("rtn", importance), ours, workers=Threads(n_threads))

    def write_theirs() -> None:
        llama_quantize(source, theirs, patterns, columns, n_threads)

    pairs = []
    for index in range(n_pairs):
        if index % 2:
            seconds_theirs = seconds(write_theirs)
            seconds_ours = seconds(write_ours)
        else:
            seconds_ours = seconds(write_ours)
            seconds_theirs = seconds(write_theirs)
        pairs.append(Pair(seconds_ours, seconds_theirs))
    assert_same_bytes(ours, theirs)
    return pairs


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def synthetic_model(folder: Path, hparams: Hparams) -> Model:
    """Write random BF16 weights to ``folder`` and return the model, read from there as a checkpoint is."""
    h, rng = hparams, np.random.default_rng(0)
    file = folder / "model.safetensors"  # without a header: offsets are known here
    tensors, offset = [], 0
    with file.open("wb") as stream:
        for name, role, layer, shape in tensor_table(h):
            weights = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            data = (weights.view(np.uint32) >> 16).astype(np.uint16)
            stream.write(data.tobytes())
            stored = SafetensorsTensor(name, "BF16", shape, file, offset)
            offset += data.nbytes
            n_heads = {"attn_q": h.n_heads, "attn_k": h.n_kv_heads}.get(role)
            permuted = (TakeRows(rope_row_order(n_heads, h.head_dim)),) if n_heads else ()
            tensors.append(Tensor(name, role, layer, shape, "BF16", name, stored, permuted))
    return Model(folder, "llama", "LlamaForCausalLM", h, tuple(tensors), llama_keys(h), (), "0" * 64)


def tensor_table(h: Hparams) -> list[tuple[str, str, int | None, tuple[int, ...]]]:
    """Return ``(name, role, layer, shape)`` of a llama model's tensors."""
    q, kv = h.n_heads * h.head_dim, h.n_kv_heads * h.head_dim
    roles: dict[str, tuple[int, ...]] = {
        "attn_norm": (h.n_embd,),
        "attn_q": (q, h.n_embd),
        "attn_k": (kv, h.n_embd),
        "attn_v": (kv, h.n_embd),
        "attn_output": (h.n_embd, q),
        "ffn_norm": (h.n_embd,),
        "ffn_gate": (h.n_ff, h.n_embd),
        "ffn_up": (h.n_ff, h.n_embd),
        "ffn_down": (h.n_embd, h.n_ff),
    }
    table: list[tuple[str, str, int | None, tuple[int, ...]]] = [
        ("token_embd.weight", "token_embd", None, (h.n_vocab, h.n_embd))
    ]
    table += [(f"blk.{i}.{role}.weight", role, i, shape) for i in range(h.n_layers) for role, shape in roles.items()]
    table += [
        ("output_norm.weight", "output_norm", None, (h.n_embd,)),
        ("output.weight", "output", None, (h.n_vocab, h.n_embd)),
    ]
    return table


def random_importance(model: Model) -> dict[str, Float32]:
    """Return column weights of mean about 1 for every matrix."""
    rng = np.random.default_rng(1)
    return {t.name: rng.gamma(1.0, 1.0, t.n_cols).astype(np.float32) + 1e-4 for t in model.tensors if t.is_matrix}


def report(found: Mapping[str, float]) -> str:
    """Return what ``bench`` found as lines for people."""
    lines = [f"quantizing and writing {found['n_weights'] / 1e6:.0f} M weights, {found['n_threads']:.0f} threads, "
             f"{llama_build()}"]  # fmt: skip
    for label in ("plain", "importance"):
        ours, theirs, speed, least = (found[f"{label}_{key}"] for key in ("ours_s", "llama_s", "speed", "speed_min"))
        lines.append(f"  {label:10} write_gguf {ours:6.2f} s, llama_model_quantize {theirs:6.2f} s: "
                     f"{speed:.2f}x its speed (least {least:.2f}x)")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=N_PAIRS)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    print(report(bench(arguments.pairs, arguments.threads)))


if __name__ == "__main__":
    main()
