"""Compare the formulas of memory with what llama.cpp allocates, by its own log lines, for GGUF files.

    python tools/check/check_memory.py FILE.gguf [FILE.gguf ...] [--ctx-size 4096,16384] [--cache-type f16,q8_0]

Each file is loaded whole, its context created, and the lines ``model buffer size``, ``KV buffer size``, ``RS buffer
size``, ``compute buffer size`` and ``output buffer size`` are added up. It fails when a total differs by more than 3 %.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import llama_cpp
from gguf import GGMLQuantizationType

from nsds_gguf import Source, open_model
from nsds_gguf.llamacpp import ggml
from nsds_gguf.llamacpp.memory import Context, memory

LARGEST_ERROR = 0.03
LINES = {
    "weights": r"model buffer size = +([\d.]+) MiB",
    "cache": r"(?:KV|RS) buffer size = +([\d.]+) MiB",
    "buffers": r"(?:compute|output) buffer size = +([\d.]+) MiB",
}


def allocated(path: Path, context: Context) -> dict[str, float]:
    """Return the MiB that llama.cpp says it allocates, by kind."""
    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda _level, text, _data: lines.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(callback, None)
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, params.use_extra_bufts = 0, False  # one copy of the weights, in the CPU's memory
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.swa_full = context.n_ctx, False
    options.type_k = options.type_v = GGMLQuantizationType[context.cache_type.upper()]
    created = llama_cpp.llama_init_from_model(model, options)
    if not created:
        raise SystemExit(f"{path}: llama.cpp cannot create a context: {''.join(lines[-5:])}")
    llama_cpp.llama_free(created)
    llama_cpp.llama_model_free(model)
    return {kind: sum(map(float, re.findall(pattern, "".join(lines)))) for kind, pattern in LINES.items()}


def calculated(model: Any, context: Context) -> dict[str, float]:
    """Return the MiB of the formulas; of the weights, the data in the file after its header."""
    keys = {key: entry.value for key, entry in model.metadata.items()}
    found = memory(model.architecture, keys, {tensor.name: tensor.shape for tensor in model.tensors}, context)
    return {
        "weights": sum(t.n_rows * ggml.row_bytes(t.dtype, t.n_cols) for t in model.tensors) / 2**20,
        "cache": (found.attention_cache + found.states) / 2**20,
        "buffers": (found.compute + found.output) / 2**20,
    }


def main() -> int:
    """Print a row per file, context and type of the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--ctx-size", default="4096,16384")
    parser.add_argument("--cache-type", default="f16,q8_0")
    args = parser.parse_args()
    worst = 0.0
    print(f"{'file':<24} {'tokens':>6} {'cache':>5}   weights, cache, buffers (MiB): llama.cpp's / ours; total")
    for path in args.files:
        model = open_model(Source(path, allow_requantize=True))
        for n_ctx, cache_type in itertools.product(args.ctx_size.split(","), args.cache_type.split(",")):
            context = Context(int(n_ctx), cache_type)
            theirs, ours = allocated(path, context), calculated(model, context)
            error = sum(ours.values()) / sum(theirs.values()) - 1
            worst = max(worst, abs(error))
            parts = ", ".join(f"{theirs[kind]:.2f}/{ours[kind]:.2f}" for kind in theirs)
            print(f"{path.name:<24} {n_ctx:>6} {cache_type:>5}   {parts}; {100 * error:+.2f} %")
    print(f"largest difference of a total: {100 * worst:.2f} %")
    return int(worst > LARGEST_ERROR)


if __name__ == "__main__":
    sys.exit(main())
