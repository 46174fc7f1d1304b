"""Pad the residual stream of an F32 GGUF with channels that stay zero, so that K-quants fit its rows.

    python tools/quality/pad_width.py IN.gguf OUT.gguf WIDTH

The padded model computes the same in stock llama.cpp. With ``d`` the width and ``D`` the padded one:

* the embedding and what reads the stream get zero columns, what writes it zero rows;
* RMSNorm divides by the root of the mean over ``D`` in place of ``d`` channels: its gain takes ``sqrt(d / D)`` and its
  epsilon ``d / D``;
* heads keep their size, so it must be stated where it was ``d / n_heads``;
* Gemma multiplies the embedding by ``sqrt(width)``, so its stream grows by ``c = sqrt(D / d)``: norms after blocks
  take ``c``, and epsilon ``c**2`` more. Norms of single heads, which share the key of epsilon, get one that is too
  large by that: 6e-5 nats on Gemma 3 270M.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from gguf import GGUFValueType
from gguf_weights import GgufWeights, read_weights, write_weights

SCALED_STREAM = {"llama": False, "gemma3": True}  # whether the embedding is multiplied by sqrt(width)

READERS = ("token_embd", "output", "attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
WRITERS = ("attn_output", "ffn_down")
NORMS, POST_NORMS = ("attn_norm", "ffn_norm", "output_norm"), ("post_attention_norm", "post_ffw_norm")

EPSILON = "{arch}.attention.layer_norm_rms_epsilon"
HEAD_SIZES = ("{arch}.attention.key_length", "{arch}.attention.value_length")


def pad_width(source: Path, target: Path, width: int) -> None:
    """Write the padded copy of an F32 GGUF."""
    weights = read_weights(source)
    pad(weights, width)
    write_weights(target, weights)


def pad(weights: GgufWeights, width: int) -> None:
    """Pad in place."""
    if weights.architecture not in SCALED_STREAM:
        raise SystemExit(f"architecture {weights.architecture!r} is not one of {', '.join(SCALED_STREAM)}")
    d = weights.value("{arch}.embedding_length")
    if width < d:
        raise SystemExit(f"the stream has {d} channels, more than {width}")
    growth = math.sqrt(width / d) if SCALED_STREAM[weights.architecture] else 1.0
    gains = {**dict.fromkeys(NORMS, math.sqrt(d / width)), **dict.fromkeys(POST_NORMS, math.sqrt(d / width) * growth)}
    for name, values in weights.tensors.items():
        role = name.split(".")[-2]
        if role in gains:
            weights.tensors[name] = np.pad(values * np.float32(gains[role]), (0, width - d))
        elif role in READERS:
            weights.tensors[name] = np.pad(values, ((0, 0), (0, width - d)))
        elif role in WRITERS:
            weights.tensors[name] = np.pad(values, ((0, width - d), (0, 0)))
    head_size = d // weights.value("{arch}.attention.head_count")
    for key in HEAD_SIZES:
        weights.set(key, weights.value(key, head_size), GGUFValueType.UINT32)
    weights.set(EPSILON, weights.value(EPSILON) * d / width * growth**2, GGUFValueType.FLOAT32)
    weights.set("{arch}.embedding_length", width, GGUFValueType.UINT32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("width", type=int)
    arguments = parser.parse_args()
    pad_width(arguments.source, arguments.target, arguments.width)


if __name__ == "__main__":
    main()
