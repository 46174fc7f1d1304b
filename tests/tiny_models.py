"""Random models of a few thousand weights, as Hugging Face folders: Llama, Mistral, Qwen 2 and 3, made by hand.

A spec says everything; folders made from equal specs are equal to the byte, on every machine and with every numpy:
weights are uniform numbers cut from the raw 64-bit stream of PCG64, scaled by float32 products. Models of every class,
with the files that transformers saves, are in ``zoo_specs``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = dict[str, Array]  # by checkpoint name; float32, float16, or uint16 for BF16

N_MERGES = 29
SPECIAL = "<|endoftext|>"
N_VOCAB = 256 + N_MERGES + 1

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TAGS = {"float32": "F32", "float16": "F16", "uint16": "BF16"}  # numpy dtype -> safetensors


@dataclass(frozen=True)
class Spec:
    """A tiny model: class, form of config.json (4 or 5, transformers' major version), shape, rope, storage.

    ``rope`` holds the scaling settings without theta, ``omitted`` checkpoint names (with ``{i}`` for the layer) that
    are left out of the weights.
    """

    source_class: str
    form: int = 5
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default"})
    rope_theta: float = 500.0
    n_ctx: int = 256
    n_layers: int = 2
    n_embd: int = 64
    n_ff: int = 96
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    dtype: str = "F32"
    n_shards: int = 1
    omitted: tuple[str, ...] = ()
    seed: int = 1

    @property
    def channels(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.n_embd // self.n_heads


class Uniform:
    """Uniform float32 numbers between -1 and 1 from PCG64's raw stream, whose values numpy guarantees."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def draw(self, *shape: int) -> NDArray[np.float32]:
        """Return the next numbers, multiples of 2**-23."""
        raw = self._bits.random_raw(math.prod(shape)) >> np.uint64(40)
        return (raw.astype(np.float32) * np.float32(2.0**-23) - np.float32(1)).reshape(shape)

    def matrix(self, n_rows: int, n_cols: int, gain: float = 1.0) -> NDArray[np.float32]:
        """Return weights that scale the root mean square of a random vector by ``gain``."""
        return self.draw(n_rows, n_cols) * np.float32(gain * math.sqrt(3 / n_cols))

    def around(self, centre: float, spread: float, n: int) -> NDArray[np.float32]:
        """Return ``n`` numbers at most ``spread`` from ``centre``."""
        return self.draw(n) * np.float32(spread) + np.float32(centre)


def tiny_config(spec: Spec) -> dict[str, Any]:
    """Return config.json as transformers 4.57 (form 4) or 5 (form 5) writes it."""
    is_qwen = "Qwen" in spec.source_class
    config: dict[str, Any] = {
        "architectures": [spec.source_class],
        "attention_dropout": 0.0,
        "bos_token_id": None if is_qwen else N_VOCAB - 1,
        "dtype": _DTYPES[spec.dtype],
        "eos_token_id": N_VOCAB - 1,
        "hidden_act": "silu",
        "hidden_size": spec.n_embd,
        "initializer_range": 0.02,
        "intermediate_size": spec.n_ff,
        "max_position_embeddings": spec.n_ctx,
        "model_type": _MODEL_TYPES[spec.source_class],
        "num_attention_heads": spec.n_heads,
        "num_hidden_layers": spec.n_layers,
        "num_key_value_heads": spec.n_kv_heads,
        "pad_token_id": None,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        "use_cache": True,
        "vocab_size": N_VOCAB,
    }
    config |= _rope(spec) | _class_settings(spec)
    if spec.form == 4:
        config = {key: value for key, value in config.items() if value is not None or not key.endswith("_token_id")}
    return dict(sorted(config.items()))


def _rope(spec: Spec) -> dict[str, Any]:
    if spec.form == 5:
        return {"rope_parameters": {**spec.rope, "rope_theta": spec.rope_theta}, "transformers_version": "5.23.0"}
    scaling = None if spec.rope.get("rope_type") == "default" else dict(spec.rope)
    return {"rope_scaling": scaling, "rope_theta": spec.rope_theta, "transformers_version": "4.57.6"}


def _class_settings(spec: Spec) -> dict[str, Any]:
    head_dim = {"head_dim": spec.channels}
    qwen = {
        "layer_types": ["full_attention"] * spec.n_layers,
        "max_window_layers": 28,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    return {
        "LlamaForCausalLM": {
            **head_dim,
            "attention_bias": spec.attention_bias,
            "mlp_bias": spec.mlp_bias,
            "pretraining_tp": 1,
        },
        "MistralForCausalLM": {**head_dim, "sliding_window": spec.sliding_window},
        "Qwen2ForCausalLM": qwen,
        "Qwen3ForCausalLM": {**head_dim, **qwen, "attention_bias": spec.attention_bias},
    }[spec.source_class]


def tiny_weights(spec: Spec) -> Weights:
    """Return the tensors by checkpoint name, in the spec's storage type."""
    rng = Uniform(spec.seed)
    weights: Weights = {"model.embed_tokens.weight": rng.matrix(N_VOCAB, spec.n_embd, gain=0.02)}
    for i in range(spec.n_layers):
        weights |= {f"model.layers.{i}.{name}": array for name, array in _layer(spec, rng).items()}
    weights["model.norm.weight"] = rng.around(1.0, 0.5, spec.n_embd)
    if not spec.tied:
        weights["lm_head.weight"] = rng.matrix(N_VOCAB, spec.n_embd)
    omitted = {name.format(i=i) for name in spec.omitted for i in range(spec.n_layers)}
    return {name: stored(array, spec.dtype) for name, array in weights.items() if name not in omitted}


def _layer(spec: Spec, rng: Uniform) -> Weights:
    d, n_ff, channels = spec.n_embd, spec.n_ff, spec.channels
    n_q, n_kv = spec.n_heads * channels, spec.n_kv_heads * channels
    qkv_bias = spec.attention_bias or spec.source_class == "Qwen2ForCausalLM"
    layer = {
        "input_layernorm.weight": rng.around(1.0, 0.5, d),
        "self_attn.q_proj.weight": rng.matrix(n_q, d, gain=2.5),
        "self_attn.k_proj.weight": rng.matrix(n_kv, d, gain=2.5),
        "self_attn.v_proj.weight": rng.matrix(n_kv, d),
        "self_attn.o_proj.weight": rng.matrix(d, n_q),
        "post_attention_layernorm.weight": rng.around(1.0, 0.5, d),
        "mlp.gate_proj.weight": rng.matrix(n_ff, d, gain=1.5),
        "mlp.up_proj.weight": rng.matrix(n_ff, d),
        "mlp.down_proj.weight": rng.matrix(d, n_ff, gain=1.5),
    }
    if qkv_bias:
        layer |= {f"self_attn.{name}_proj.bias": rng.draw(n) for name, n in (("q", n_q), ("k", n_kv), ("v", n_kv))}
    if spec.attention_bias:
        layer["self_attn.o_proj.bias"] = rng.draw(d)
    if spec.mlp_bias:
        layer |= {f"mlp.{name}_proj.bias": rng.draw(n) for name, n in (("gate", n_ff), ("up", n_ff), ("down", d))}
    if spec.source_class == "Qwen3ForCausalLM":
        layer |= {f"self_attn.{name}_norm.weight": rng.around(2.0, 1.0, channels) for name in "qk"}
    return layer


def stored(array: NDArray[np.float32], dtype: str) -> Array:
    """Return values in a storage type; BF16 as uint16, rounded to nearest even."""
    if dtype == "BF16":
        bits = array.astype(np.float32).view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")
    return array.astype({"F32": "<f4", "F16": "<f2"}[dtype])


def write_tiny(folder: Path, spec: Spec) -> Path:
    """Write the folder of a spec and return it."""
    return write_model(folder, tiny_config(spec), tiny_weights(spec), spec.n_shards)


def write_model(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Array], n_shards: int = 1) -> Path:
    """Write a model folder of any config and weights, with the tiny tokenizer, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(folder / "tokenizer.json", _tokenizer())
    _write_json(folder / "tokenizer_config.json", {"eos_token": SPECIAL, "tokenizer_class": "GPT2Tokenizer"})
    names = list(weights)
    shards = [names[i::n_shards] for i in range(n_shards)]
    files = [f"model-{i + 1:05}-of-{n_shards:05}.safetensors" for i in range(n_shards)]
    if n_shards == 1:
        files = ["model.safetensors"]
    else:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total_bytes = sum(array.nbytes for array in weights.values())
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    for file, shard in zip(files, shards, strict=True):
        (folder / file).write_bytes(safetensors_bytes({name: weights[name] for name in shard}))
    return folder


def safetensors_bytes(weights: Mapping[str, Array]) -> bytes:
    """Return a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, array in weights.items():
        end = begin + array.nbytes
        header[name] = {"dtype": _TAGS[array.dtype.name], "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + b"".join(array.tobytes() for array in weights.values())


def _tokenizer() -> dict[str, Any]:
    """Return a byte-level BPE tokenizer with GPT-2's pre-tokenizer, as the tokenizers library writes it."""
    letters = [chr(b) for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    letters += [chr(256 + i) for i in range(256 - len(letters))]  # GPT-2's stand-ins for the other bytes
    merges = [["e", chr(ord("a") + i)] for i in range(26)] + [["t", "h"], ["th", "e"], ["i", "n"]]
    tokens = letters + ["".join(pair) for pair in merges]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(tokens), "content": SPECIAL, **added}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate([*tokens, SPECIAL])},
            "merges": merges,
        },
    }


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


_LINEAR = {"rope_type": "linear", "factor": 4.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# An original context over 2 pi 32: only then are there channels that yarn leaves alone.
_YARN_LONG = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 400}
_ATTENTION_FACTOR = {"attention_factor": 1.4}
_MSCALE = {"mscale": 1.0, "mscale_all_dim": 0.5}


def _old(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope settings with the key of transformers before 4.43; later ones of 4 write both, or the new one."""
    return {"type" if key == "rope_type" else key: value for key, value in rope.items()}


_LLAMA, _MISTRAL, _QWEN2, _QWEN3 = _MODEL_TYPES

SPECS = {
    "llama": Spec(_LLAMA),
    "llama-tied-mha-bf16-4": Spec(_LLAMA, 4, tied=True, n_kv_heads=4, dtype="BF16", seed=2),
    "llama-mqa-head32-f16-shards": Spec(_LLAMA, n_kv_heads=1, head_dim=32, dtype="F16", n_shards=3, seed=3),
    "llama-biases": Spec(_LLAMA, attention_bias=True, mlp_bias=True, seed=4),
    "llama-biases-tied-shards-4": Spec(
        _LLAMA, 4, attention_bias=True, mlp_bias=True, tied=True, n_shards=2, dtype="BF16", seed=5
    ),
    "llama-linear": Spec(_LLAMA, rope=_LINEAR, seed=6),
    "llama-linear-4": Spec(_LLAMA, 4, _old(_LINEAR), seed=7),
    "llama-llama3": Spec(_LLAMA, rope=_LLAMA3, n_ctx=512, seed=8),
    "llama-llama3-head32-4": Spec(_LLAMA, 4, _LLAMA3, rope_theta=5000.0, head_dim=32, n_ctx=512, seed=9),
    "llama-yarn": Spec(_LLAMA, rope=_YARN, seed=10),
    "llama-yarn-4": Spec(_LLAMA, 4, _old(_YARN), seed=11),
    "llama-yarn-long": Spec(_LLAMA, rope=_YARN_LONG, head_dim=32, n_ctx=1600, seed=12),
    "llama-yarn-attention-factor": Spec(_LLAMA, rope={**_YARN, **_ATTENTION_FACTOR}, seed=13),
    "llama-yarn-mscale-4": Spec(_LLAMA, 4, {**_YARN, **_MSCALE}, seed=14),
    "mistral": Spec(_MISTRAL, sliding_window=192, seed=20),
    "mistral-mqa-head32-bf16-4": Spec(_MISTRAL, 4, n_kv_heads=1, head_dim=32, dtype="BF16", seed=21),
    "mistral-tied-mha": Spec(_MISTRAL, n_kv_heads=4, tied=True, dtype="F16", seed=22),
    "mistral-linear-4": Spec(_MISTRAL, 4, _LINEAR, seed=23),
    "mistral-llama3": Spec(_MISTRAL, rope=_LLAMA3, n_ctx=512, seed=24),
    "mistral-yarn-attention-factor-4": Spec(_MISTRAL, 4, {**_YARN, **_ATTENTION_FACTOR}, seed=25),
    "mistral-yarn-mscale": Spec(_MISTRAL, rope={**_YARN, **_MSCALE}, seed=26),
    "qwen2": Spec(_QWEN2, seed=30),
    "qwen2-tied-mqa-bf16-4": Spec(_QWEN2, 4, tied=True, n_kv_heads=1, dtype="BF16", norm_eps=1e-6, seed=31),
    "qwen2-mha-shards": Spec(_QWEN2, n_kv_heads=4, n_shards=2, dtype="F16", seed=32),
    "qwen2-linear": Spec(_QWEN2, rope=_LINEAR, seed=33),
    "qwen2-yarn-4": Spec(_QWEN2, 4, {**_YARN, "type": "yarn"}, seed=34),
    "qwen2-yarn-attention-factor": Spec(_QWEN2, rope={**_YARN, **_ATTENTION_FACTOR}, seed=35),
    "qwen2-yarn-mscale": Spec(_QWEN2, rope={**_YARN, **_MSCALE}, seed=36),
    "qwen3": Spec(_QWEN3, head_dim=32, seed=40),
    "qwen3-tied-mha-bf16-4": Spec(_QWEN3, 4, tied=True, n_kv_heads=4, dtype="BF16", norm_eps=1e-6, seed=41),
    "qwen3-mqa-shards": Spec(_QWEN3, n_kv_heads=1, head_dim=32, n_shards=2, dtype="F16", seed=42),
    # llama.cpp has no place for a bias of o_proj here; where transformers finds none, it takes zeros.
    "qwen3-biases": Spec(
        _QWEN3, attention_bias=True, omitted=("model.layers.{i}.self_attn.o_proj.bias",), head_dim=32, seed=43
    ),
    "qwen3-linear-4": Spec(_QWEN3, 4, _LINEAR, seed=44),
    "qwen3-yarn": Spec(_QWEN3, rope=_YARN, head_dim=32, seed=45),
    "qwen3-yarn-long-4": Spec(_QWEN3, 4, _YARN_LONG, head_dim=32, n_ctx=1600, seed=46),
    "qwen3-yarn-attention-factor-4": Spec(_QWEN3, 4, {**_YARN, **_ATTENTION_FACTOR}, seed=47),
    "qwen3-yarn-mscale": Spec(_QWEN3, rope={**_YARN, **_MSCALE}, seed=48),
}
