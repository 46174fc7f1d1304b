"""A tiny llama checkpoint as a Hugging Face folder, for tests of the command line: random weights, real tokenizer."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

N_LAYERS, N_EMBD, N_FF, N_HEADS, N_KV_HEADS, N_VOCAB = 2, 256, 256, 4, 2, 384

Weights = dict[str, NDArray[Any]]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": N_EMBD // N_HEADS,
    "hidden_act": "silu",
    "hidden_size": N_EMBD,
    "intermediate_size": N_FF,
    "max_position_embeddings": 512,
    "model_type": "llama",
    "num_attention_heads": N_HEADS,
    "num_hidden_layers": N_LAYERS,
    "num_key_value_heads": N_KV_HEADS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": N_VOCAB,
}

DTYPES = {"float32": "F32", "float16": "F16", "int8": "I8"}


def random_weights(seed: int = 0, config: Mapping[str, Any] = CONFIG) -> Weights:
    """Return the tensors by checkpoint name, float16."""
    rng = np.random.default_rng(seed)
    d, n_ff, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]

    def matrix(n_rows: int, n_cols: int) -> NDArray[np.float16]:
        return (rng.standard_normal((n_rows, n_cols)) / np.sqrt(n_cols)).astype(np.float16)

    weights: Weights = {"model.embed_tokens.weight": matrix(config["vocab_size"], d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        weights |= {
            f"{layer}.input_layernorm.weight": np.ones(d, np.float16),
            f"{layer}.self_attn.q_proj.weight": matrix(config["num_attention_heads"] * head_dim, d),
            f"{layer}.self_attn.k_proj.weight": matrix(config["num_key_value_heads"] * head_dim, d),
            f"{layer}.self_attn.v_proj.weight": matrix(config["num_key_value_heads"] * head_dim, d),
            f"{layer}.self_attn.o_proj.weight": matrix(d, config["num_attention_heads"] * head_dim),
            f"{layer}.post_attention_layernorm.weight": np.ones(d, np.float16),
            f"{layer}.mlp.gate_proj.weight": matrix(n_ff, d),
            f"{layer}.mlp.up_proj.weight": matrix(n_ff, d),
            f"{layer}.mlp.down_proj.weight": matrix(d, n_ff),
        }
    weights["model.norm.weight"] = np.ones(d, np.float16)
    weights["lm_head.weight"] = matrix(config["vocab_size"], d)
    return weights


def safetensors_bytes(weights: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the tensors as a safetensors file."""
    header, data = {}, b""
    for name, array in weights.items():
        raw = array.tobytes()
        entry = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape)}
        header[name] = {**entry, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file of any header, right or wrong."""
    return len(header).to_bytes(8, "little") + header + data


@cache
def tokenizer_model() -> bytes:
    """Return a sentencepiece model of ``N_VOCAB`` pieces with byte fallback, trained on the shipped text."""
    text = (resources.files("nsds_gguf") / "data" / "old_curiosity_shop.txt").read_text(encoding="utf-8")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()[:400]), model_writer=model, vocab_size=N_VOCAB, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write_folder(folder: Path, *, config: Mapping[str, Any] | None = None, weights: Weights | None = None) -> Path:
    """Write a whole model folder and return it; ``config`` is merged into the default one."""
    settings = {**CONFIG, **(config or {})}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(safetensors_bytes(weights or random_weights(config=settings)))
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder
