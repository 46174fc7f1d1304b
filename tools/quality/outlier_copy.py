"""Copy a model so that it computes the same with outlier channels, as large models have them: SmoothQuant backwards.

    python tools/quality/outlier_copy.py MODEL OUT --seed N [--strength S] [--dtype F32|BF16]

Behind every norm some residual channels get a larger gain, and the columns that read them in the matrices behind that
norm are divided by the same factor; some hidden units of the feed-forward block get larger rows of ``up`` and smaller
columns of ``down``. What quantizers see then has columns of very different energy and importance.

| where | how many | factor |
|---|---|---|
| every norm, the same channels at all | 6 | 10 to 30 |
| every norm, drawn anew at each | 10 | 3 to 6 |
| every feed-forward block, hidden units | 12 | 5 to 20 |

Factors are uniform in their range, to the power ``--strength`` (1 unless told). A norm whose readers are not all known
here is left alone: the final one where the output is tied to the embedding.

Weights are saved as F32, in which the copy computes what the original does up to rounding; in BF16 every changed
weight would be rounded once more (docs/log.md).
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsds_gguf.read.checkpoint import open_checkpoint
from nsds_gguf.records import Float32

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

N_FIXED, FIXED_FACTORS = 6, (10.0, 30.0)
N_OTHER, OTHER_FACTORS = 10, (3.0, 6.0)
N_UNITS, UNIT_FACTORS = 12, (5.0, 20.0)

DTYPES = {"F32": "float32", "BF16": "bfloat16"}

# Norm of a layer, and the matrices that read it alone.
READERS = {
    "input_layernorm.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "post_attention_layernorm.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
UP, DOWN = "mlp.up_proj", "mlp.down_proj.weight"


def outlier_copy(source: Path, target: Path, seed: int, strength: float = 1.0, dtype: str = "F32") -> None:
    """Write the copy of a model folder.

    Args:
        source: folder of one of ``CLASSES``.
        target: folder to make; must not exist.
        seed: of the channels, units and factors (PCG64).
        strength: exponent of all factors: 0 changes nothing.
        dtype: a key of ``DTYPES``.

    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config["architectures"][0] not in CLASSES:
        raise SystemExit(f"{source}: {config['architectures'][0]} is not one of {', '.join(CLASSES)}")
    stored_ones = open_checkpoint(source, config)
    weights = {name: tensor.rows(slice(None)).reshape(tensor.shape) for name, tensor in stored_ones.items()}
    add_outliers(weights, config, np.random.default_rng(seed), strength)
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".model") and "safetensors" not in file.name:
            shutil.copy(file, target / file.name)
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": DTYPES[dtype]}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (target / "model.safetensors").write_bytes(safetensors(weights, dtype))


def add_outliers(
    weights: dict[str, Float32], config: dict[str, Any], generator: np.random.Generator, strength: float
) -> None:
    """Rescale weights, by checkpoint name, in place."""
    d, n_ff = config["hidden_size"], config["intermediate_size"]
    fixed = generator.permutation(d)[:N_FIXED]
    for norm, readers in norms(weights, config):
        others = generator.permutation(np.setdiff1d(np.arange(d), fixed))[:N_OTHER]
        factors = np.ones(d)
        factors[fixed] = generator.uniform(*FIXED_FACTORS, N_FIXED) ** strength
        factors[others] = generator.uniform(*OTHER_FACTORS, N_OTHER) ** strength
        weights[norm] = (weights[norm] * factors).astype(np.float32)
        for name in readers:
            weights[name] = (weights[name] / factors).astype(np.float32)
    for i in range(config["num_hidden_layers"]):
        factors = np.ones(n_ff)
        factors[generator.permutation(n_ff)[:N_UNITS]] = generator.uniform(*UNIT_FACTORS, N_UNITS) ** strength
        down = f"model.layers.{i}.{DOWN}"
        weights[down] = (weights[down] / factors).astype(np.float32)
        for part in ("weight", "bias"):
            name = f"model.layers.{i}.{UP}.{part}"
            if name in weights:
                weights[name] = (weights[name].T * factors).T.astype(np.float32)


def norms(weights: dict[str, Float32], config: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the norms, first to last, and the matrices that read each, by checkpoint name."""
    for i in range(config["num_hidden_layers"]):
        for norm, readers in READERS.items():
            yield f"model.layers.{i}.{norm}", tuple(f"model.layers.{i}.{name}" for name in readers)
    if "lm_head.weight" in weights and not config.get("tie_word_embeddings", False):
        yield "model.norm.weight", ("lm_head.weight",)


def safetensors(weights: dict[str, Float32], dtype: str) -> bytes:
    """Return a safetensors file: u64 length of the header, JSON header, data one after another, little-endian."""
    data = {name: stored(array, dtype) for name, array in weights.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, array in data.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (begin, begin + array.nbytes)}
        begin += array.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + b"".join(array.tobytes() for array in data.values())


def stored(array: Float32, dtype: str) -> NDArray[Any]:
    """Return values as they are stored; BF16 is the upper half of a float32, rounded to nearest even."""
    if dtype == "F32":
        return np.ascontiguousarray(array, "<f4")
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--strength", type=float, default=1.0, help="exponent of all factors")
    parser.add_argument("--dtype", choices=DTYPES, default="F32")
    arguments = parser.parse_args()
    outlier_copy(arguments.model, arguments.out, arguments.seed, arguments.strength, arguments.dtype)


if __name__ == "__main__":
    main()
