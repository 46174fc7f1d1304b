"""Move a quantized GGUF off its grid: F32 weights that compute the same and lie on no quantization grid.

    python tools/quality/off_grid.py IN.gguf OUT.gguf [--seed N]

Dequantized weights take few values per block, so that quantizing them again to a type with the same blocks costs next
to nothing. Here every channel that one tensor writes and others read is multiplied by a random factor, and divided by
it where it is read; only float32 rounding is added:

| written by | read by |
|---|---|
| gain of the norm before a block | columns of q, k, v, or of gate and up |
| rows of v | columns of attn_output, of every query head of the group |
| rows of up | columns of down |

Only the embedding keeps its grid.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf_weights import GgufWeights, read_weights, write_weights

from nsds_gguf.records import Float32

ARCHITECTURES = ("llama", "gemma3")  # wired as the table says

SPREAD = 0.25  # factors are exp of uniform numbers between -SPREAD and SPREAD

READERS = {"attn_norm": ("attn_q", "attn_k", "attn_v"), "ffn_norm": ("ffn_gate", "ffn_up")}


def off_grid(source: Path, target: Path, seed: int = 0) -> None:
    """Write the F32 copy.

    Args:
        source: GGUF of one of ``ARCHITECTURES``.
        target: file to write.
        seed: of the factors (PCG64).

    """
    weights = read_weights(source)
    move(weights, np.random.default_rng(seed))
    write_weights(target, weights)


def move(weights: GgufWeights, generator: np.random.Generator) -> None:
    """Multiply channels by random factors that cancel, in place."""
    if weights.architecture not in ARCHITECTURES:
        raise SystemExit(f"architecture {weights.architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    n_heads = weights.value("{arch}.attention.head_count")
    n_groups = weights.value("{arch}.attention.head_count_kv", n_heads)
    for i in range(weights.value("{arch}.block_count")):
        layer = {role: f"blk.{i}.{role}.weight" for role in roles()}
        for norm, readers in READERS.items():
            factors = draw(generator, len(weights.tensors[layer[norm]]))
            weights.tensors[layer[norm]] *= factors
            for role in readers:
                weights.tensors[layer[role]] /= factors
        factors = draw(generator, len(weights.tensors[layer["attn_v"]]))
        weights.tensors[layer["attn_v"]] *= factors[:, None]
        weights.tensors[layer["attn_output"]] /= per_query_head(factors, n_groups, n_heads // n_groups)
        factors = draw(generator, len(weights.tensors[layer["ffn_up"]]))
        weights.tensors[layer["ffn_up"]] *= factors[:, None]
        weights.tensors[layer["ffn_down"]] /= factors


def roles() -> list[str]:
    """Return the roles of a layer that are rescaled."""
    return [*READERS, *(role for readers in READERS.values() for role in readers), "attn_output", "ffn_down"]


def draw(generator: np.random.Generator, n: int) -> Float32:
    """Return ``n`` factors around 1."""
    return np.exp(generator.uniform(-SPREAD, SPREAD, n)).astype(np.float32)


def per_query_head(factors: Float32, n_groups: int, n_repeats: int) -> Float32:
    """Return the factors of value channels for the columns of attn_output: every group's, once per query head."""
    groups = factors.reshape(n_groups, -1)
    return np.repeat(groups, n_repeats, axis=0).reshape(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    off_grid(arguments.source, arguments.target, arguments.seed)


if __name__ == "__main__":
    main()
