"""The Hugging Face folder of a GGUF: config.json, model.safetensors and a tokenizer.json rebuilt from its vocabulary.

    python tools/quality/gguf_folder.py IN.gguf OUT

Weights are stored as F32. Rows of q and k, which a GGUF of the architecture llama has in the order of llama.cpp's rope,
go back to that of transformers; Gemma's norm gains lose the 1 that its GGUF adds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import TokenType
from gguf_weights import GgufWeights, read_weights
from outlier_copy import safetensors

from nsds_gguf.records import Float32

# Names in a checkpoint, by role in a GGUF.
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

# Settings of config.json, by key of a GGUF.
SETTINGS = {
    "hidden_size": "{arch}.embedding_length",
    "intermediate_size": "{arch}.feed_forward_length",
    "num_hidden_layers": "{arch}.block_count",
    "num_attention_heads": "{arch}.attention.head_count",
    "num_key_value_heads": "{arch}.attention.head_count_kv",
    "head_dim": "{arch}.attention.key_length",
    "query_pre_attn_scalar": "{arch}.attention.key_length",
    "rms_norm_eps": "{arch}.attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "{arch}.context_length",
    "rope_theta": "{arch}.rope.freq_base",
    "sliding_window": "{arch}.attention.sliding_window",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}

SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class Form:
    """How a GGUF architecture is stored in a folder."""

    source_class: str
    layer: Mapping[str, str]
    settings: Mapping[str, Any]
    permutes: bool = False
    adds_one: bool = False
    names: Mapping[str, str] = field(default_factory=lambda: OUTSIDE)


FORMS = {
    "llama": Form(
        "LlamaForCausalLM", {**LAYER, **FFN_NORM}, {"model_type": "llama", "hidden_act": "silu"}, permutes=True
    ),
    "gemma3": Form(
        "Gemma3ForCausalLM",
        {**LAYER, **SANDWICH_NORMS},
        {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0,
         "sliding_window_pattern": 6},
        adds_one=True,
    ),
}  # fmt: skip


def write_folder(source: Path, target: Path) -> None:
    """Write the folder of a GGUF of one of ``FORMS``; the folder appears when it is complete."""
    weights = read_weights(source)
    if weights.architecture not in FORMS:
        raise SystemExit(f"{source}: architecture {weights.architecture!r} is not one of {', '.join(FORMS)}")
    form = FORMS[weights.architecture]
    temporary = target.with_name(f"{target.name}.part")
    temporary.mkdir(parents=True, exist_ok=True)
    write_json(temporary / "config.json", config(weights, form))
    write_json(temporary / "tokenizer.json", tokenizer(weights))
    write_json(temporary / "tokenizer_config.json", tokenizer_config(weights))
    (temporary / "model.safetensors").write_bytes(safetensors(checkpoint(weights, form), "F32"))
    temporary.rename(target)


def config(weights: GgufWeights, form: Form) -> dict[str, Any]:
    """Return config.json."""
    found = {name: weights.value(key) for name, key in SETTINGS.items()}
    return {
        "architectures": [form.source_class],
        "dtype": "float32",
        "tie_word_embeddings": "output.weight" not in weights.tensors,
        "vocab_size": len(weights.value("tokenizer.ggml.tokens")),
        **form.settings,
        **{name: value for name, value in found.items() if value is not None},
    }


def checkpoint(weights: GgufWeights, form: Form) -> dict[str, Float32]:
    """Return the weights by checkpoint name."""
    n_heads = weights.value("{arch}.attention.head_count")
    heads = {"attn_q": n_heads, "attn_k": weights.value("{arch}.attention.head_count_kv", n_heads)}
    found = {}
    for name, values in weights.tensors.items():
        role = name.split(".")[-2]
        if form.permutes and role in heads:
            values = halves_of_heads(values, heads[role])
        if form.adds_one and role.endswith("norm"):
            values = values - 1
        found[checkpoint_name(name, role, form)] = values
    return found


def halves_of_heads(rows: Float32, n_heads: int) -> Float32:
    """Return q or k with the pairs of rows that rope turns half a head apart, from rows that stand side by side."""
    return rows.reshape(n_heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def checkpoint_name(name: str, role: str, form: Form) -> str:
    """Return the checkpoint name of a GGUF tensor."""
    if role in form.names:
        return f"{form.names[role]}.weight"
    return f"model.layers.{name.split('.')[1]}.{form.layer[role]}.weight"


# --- tokenizer --------------------------------------------------------------------------------------------------------


def tokenizer(weights: GgufWeights) -> dict[str, Any]:
    """Return tokenizer.json."""
    kind = weights.value("tokenizer.ggml.model")
    parts = byte_level_bpe(weights) if kind == "gpt2" else sentencepiece_bpe(weights)
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens(weights),
            "post_processor": bos_in_front(weights), **parts}  # fmt: skip


def byte_level_bpe(weights: GgufWeights) -> dict[str, Any]:
    """Return normalizer, pre-tokenizer, decoder and model of SmolLM's vocabulary."""
    if weights.value("tokenizer.ggml.pre") != "smollm":
        raise SystemExit(f"pre-tokenizer {weights.value('tokenizer.ggml.pre')!r} is not smollm")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    merges = [merge.split(" ") for merge in weights.value("tokenizer.ggml.merges")]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "decoder": byte_level,
        "model": bpe(vocabulary(weights), merges, unk_token=None, byte_fallback=False),
    }


def sentencepiece_bpe(weights: GgufWeights) -> dict[str, Any]:
    """Return normalizer, pre-tokenizer, decoder and model of a sentencepiece vocabulary without a space in front."""
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    text = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    unknown = weights.value("tokenizer.ggml.tokens")[weights.value("tokenizer.ggml.unknown_token_id")]
    return {
        "normalizer": blank,
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                          "invert": False},
        "decoder": {"type": "Sequence", "decoders": [text, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": bpe(vocabulary(weights), merges_of_scores(weights), unk_token=unknown, byte_fallback=True),
    }  # fmt: skip


def merges_of_scores(weights: GgufWeights) -> list[list[str]]:
    """Return every split of a token into two others, best token first: what sentencepiece's scores say as merges."""
    tokens, scores, types = (weights.value(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    ids = {text: i for i, text in enumerate(tokens) if types[i] == TokenType.NORMAL}
    splits = [
        (-scores[i], i, ids[text[:k]], ids[text[k:]])
        for text, i in ids.items()
        for k in range(1, len(text))
        if text[:k] in ids and text[k:] in ids
    ]
    return [[tokens[left], tokens[right]] for *_, left, right in sorted(splits)]


def bpe(vocab: Mapping[str, int], merges: list[list[str]], *, unk_token: str | None, byte_fallback: bool) -> Any:
    """Return the model of a tokenizer.json."""
    return {"type": "BPE", "dropout": None, "unk_token": unk_token, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": byte_fallback, "byte_fallback": byte_fallback,
            "ignore_merges": False, "vocab": vocab, "merges": merges}  # fmt: skip


def vocabulary(weights: GgufWeights) -> dict[str, int]:
    """Return the ids of tokens."""
    return {text: i for i, text in enumerate(weights.value("tokenizer.ggml.tokens"))}


def added_tokens(weights: GgufWeights) -> list[dict[str, Any]]:
    """Return the tokens that are found in the text before it is tokenized; special ones are control tokens."""
    tokens, types = (weights.value(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": tokens[i], **flags, "special": kind == TokenType.CONTROL}
        for i, kind in enumerate(types)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]


def bos_in_front(weights: GgufWeights) -> dict[str, Any] | None:
    """Return the post-processor that adds BOS, ``None`` where the vocabulary adds none."""
    if not weights.value("tokenizer.ggml.add_bos_token", False):
        return None
    bos_id = weights.value("tokenizer.ggml.bos_token_id")
    bos, text = weights.value("tokenizer.ggml.tokens")[bos_id], {"Sequence": {"id": "A", "type_id": 0}}
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [special, text],
            "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}}  # fmt: skip


def tokenizer_config(weights: GgufWeights) -> dict[str, Any]:
    """Return tokenizer_config.json."""
    tokens = weights.value("tokenizer.ggml.tokens")
    ids = {name: weights.value(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_TOKENS.items()}
    settings: dict[str, Any] = {name: tokens[i] for name, i in ids.items() if i is not None}
    settings["add_bos_token"] = weights.value("tokenizer.ggml.add_bos_token", False)
    template = weights.value("tokenizer.chat_template")
    return {**settings, "chat_template": template} if template else settings


def write_json(path: Path, data: Any) -> None:
    """Write JSON as UTF-8."""
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    write_folder(arguments.source, arguments.target)


if __name__ == "__main__":
    main()
