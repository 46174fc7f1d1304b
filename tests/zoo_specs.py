"""The models of the zoo: settings of transformers' config classes, chosen so that every feature counts.

Rope's theta is never the default, and sequences are longer than its original context and than sliding windows.
Longrope: transformers takes the long factors when the text is longer than the original context, llama.cpp when its
context, rounded up to 256, is; both agree on a text of 160 tokens for an original context of 64 (long) or 256 (short).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_models import N_VOCAB
from zoo import ZooSpec, write_zoo, zoo_config, zoo_shapes

Settings = Mapping[str, Any]

_IDS: Settings = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), N_VOCAB - 1)

# --- rope -----------------------------------------------------------------------------------------------------

_PLAIN: Settings = {"rope_type": "default", "rope_theta": 500.0}
_LINEAR: Settings = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
_LLAMA3: Settings = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN: Settings = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
# An original context over 2 pi 32: only then are there channels that yarn leaves alone.
_YARN_LONG: Settings = {**_YARN, "original_max_position_embeddings": 400}
_YARN_FACTOR: Settings = {**_YARN, "attention_factor": 1.4}
_YARN_MSCALE: Settings = {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5}


def _rope(rope: Settings, **settings: Any) -> Settings:
    """Return settings with a rope, and a context that its factor reaches."""
    return {"rope_parameters": rope, **({"max_position_embeddings": 512} if rope is _LLAMA3 else {}), **settings}


def _partial(share: float) -> Settings:
    return {"rope_parameters": {**_PLAIN, "partial_rotary_factor": share}}


def _longrope(original: int, n_ctx: int, n_pairs: int = 8) -> Settings:
    """Return settings with factors that grow along the head, the long ones faster."""
    return {
        "max_position_embeddings": n_ctx,
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 500.0,
            "short_factor": [1.0 + 0.125 * j for j in range(n_pairs)],
            "long_factor": [1.5 + 0.5 * j for j in range(n_pairs)],
            "original_max_position_embeddings": original,
        },
    }


def _by_layer(full: Settings, sliding: Settings) -> Settings:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


# --- settings of families -------------------------------------------------------------------------------------

_MHA: Settings = {
    **_IDS,
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rope_parameters": _PLAIN,
}
_GQA: Settings = {**_MHA, "num_key_value_heads": 2}
_RMS: Settings = {**_GQA, "rms_norm_eps": 1e-5}
_MQA: Settings = {**_RMS, "num_key_value_heads": 1, "head_dim": 32}
_FULL_HEADS: Settings = {**_RMS, "num_key_value_heads": 4}
_TIED: Settings = {"tie_word_embeddings": True}
_UNTIED: Settings = {"tie_word_embeddings": False}
_BIASES: Settings = {"attention_bias": True, "mlp_bias": True}
_EPS6: Settings = {"rms_norm_eps": 1e-6}

# Gemma multiplies the embedding by sqrt(hidden_size): the epsilon is chosen to be felt all the same.
_GEMMA: Settings = {**_GQA, "head_dim": 32, "rms_norm_eps": 0.05}
_GEMMA_TRAITS: dict[str, Any] = {"embedding_gain": 0.3, "norm_shift": 1.0, "qk_gain": 1.5}
_GEMMA2: Settings = {
    **_GEMMA,
    "num_hidden_layers": 3,
    "query_pre_attn_scalar": 32,
    "sliding_window": 48,
    "attn_logit_softcapping": 8.0,
    "final_logit_softcapping": 1.0,
}
_LOCAL: Settings = {"rope_type": "default", "rope_theta": 300.0}
_GEMMA3: Settings = {
    **_GEMMA,
    **_by_layer(_PLAIN, _LOCAL),
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 32,
    "sliding_window": 48,
}
_GEMMA3_LINEAR: Settings = {**_GEMMA3, **_by_layer(_LINEAR, _LOCAL)}
# So many layers add up rounding, unless each of them adds little to what the embedding gives.
_27B: Settings = {"query_pre_attn_scalar": 16, "intermediate_size": 32}
_27B_TRAITS: dict[str, Any] = {**_GEMMA_TRAITS, "embedding_gain": 10.0, "n_tokens": 64}
_GEMMA3_SILENT: Settings = {
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "sliding_window": 48,
    "vocab_size": N_VOCAB,
}
_GEMMA3_DEFAULTS: Settings = {
    **_GEMMA3_SILENT,
    **_by_layer({**_LINEAR, "rope_theta": 1e6}, {**_PLAIN, "rope_theta": 1e4}),
    "rope_scaling": None,
    "pad_token_id": 0,
}
_PHI4: Settings = {
    **_RMS,
    **_longrope(64, 512, n_pairs=12),
    **_TIED,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "partial_rotary_factor": 0.75,
}
_GPT2: Settings = {**_IDS, "vocab_size": N_VOCAB, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}
_NEOX: Settings = {**_MHA, **_partial(0.25), "intermediate_size": 256}
_STABLELM: Settings = {**_GQA, **_partial(0.25)}
_OLMO3: Settings = {**_RMS, "num_hidden_layers": 5, "sliding_window": 48}
_GRANITE: Settings = {
    **_GQA,
    "rms_norm_eps": 1e-3,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.5,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
_COHERE: Settings = {**_GQA, "logit_scale": 0.25}
_COHERE2: Settings = {**_COHERE, "num_hidden_layers": 5, "sliding_window": 48}
_SMOLLM3: Settings = {**_RMS, "num_hidden_layers": 5}
_MIXTRAL: Settings = {**_RMS, "num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN_MOE: Settings = {**_RMS, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_QWEN2_MOE: Settings = {**_QWEN_MOE, "shared_expert_intermediate_size": 80}
_QWEN3_MOE: Settings = {**_QWEN_MOE, "norm_topk_prob": True, "head_dim": 32}
_OLMOE: Settings = {**_MHA, "num_experts": 8, "num_experts_per_tok": 3}
_GRANITE_MOE: Settings = {**_GRANITE, "num_local_experts": 8, "num_experts_per_tok": 2}

# 24 channels a head, of which 8 rotate. The norms within have an epsilon of 1e-6 in transformers, whatever the others'.
_MLA: Settings = {
    **_MHA,
    **_partial(1.0),
    "rms_norm_eps": 1e-6,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
_DEEPSEEK2: Settings = {**_MLA, "q_lora_rank": None, "routed_scaling_factor": 1.5}
_DEEPSEEK3: Settings = {
    **_MLA,
    "q_lora_rank": 24,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "num_mtp_layers": 0,
    "num_key_value_heads": 4,
}
_MAMBA: Settings = {
    **_IDS,
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
}
_GRANITE4: Settings = {
    **_GRANITE_MOE,
    "shared_intermediate_size": 80,
    "position_embedding_type": "rope",
    "num_hidden_layers": 3,
    "layer_types": ["full_attention"] * 3,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
}
_GRANITE4_H: Settings = {
    **_GRANITE4,
    "position_embedding_type": "nope",
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}

_FALCON_H1: Settings = {
    **_RMS,
    "head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "embedding_multiplier": 5.6,
    "lm_head_multiplier": 0.4,
    "mlp_multipliers": [0.9, 0.6],
    "key_multiplier": 0.7,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8,
    "ssm_multipliers": [0.7, 0.6, 0.8, 0.5, 0.9],
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.6,
}
_NEMOTRON_H: Settings = {
    **{key: value for key, value in _GQA.items() if key != "num_hidden_layers"},
    "head_dim": 16,
    "intermediate_size": 128,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
}
_NEMOTRON_H_MOE: Settings = {
    **_NEMOTRON_H,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
}

_FULL3: Settings = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
_SEED_OSS: Settings = {**_RMS, "head_dim": 32}
_GLM4: Settings = {**_RMS, **_partial(0.5), "head_dim": 32}
_EXAONE4: Settings = {**_RMS, "sliding_window": None, "layer_types": ["full_attention"] * 2}
_EXAONE4_32B: Settings = {**_RMS, "num_hidden_layers": 64, "intermediate_size": 32, "sliding_window": 24}
_ERNIE_MOE: Settings = {
    **_RMS,
    "num_hidden_layers": 3,
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_num_shared_experts": 2,
    "moe_intermediate_size": 24,
    "moe_layer_start_index": 1,
}
_HUNYUAN: Settings = {**_RMS, "head_dim": 32, "eod_token_id": N_VOCAB - 1}
_ALPHA: Settings = {
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0},
}
_HUNYUAN_MOE: Settings = {**_HUNYUAN, "num_experts": 8, "moe_topk": 2}
_GLM4_MOE: Settings = {
    **_GLM4,
    **_FULL3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "routed_scaling_factor": 1.5,
    "num_mtp_layers": 0,
    "use_qk_norm": True,
    "attention_bias": True,
}
_DOTS1: Settings = {
    **_FULL_HEADS,
    **_FULL3,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "sliding_window": None,
}
_MINIMAX_M2: Settings = {**_RMS, **_partial(0.5), "head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
_MINISTRAL3: Settings = {
    **_RMS,
    "head_dim": 32,
    "rope_parameters": {
        **_YARN, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    },
}  # fmt: skip
_GPT_OSS: Settings = {
    **_RMS,
    **_rope(_YARN),
    "head_dim": 32,
    "sliding_window": 48,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_APERTUS: Settings = {**_RMS, **_rope(_LLAMA3)}

_LFM2: Settings = {
    **_GQA,
    "norm_eps": 1e-5,
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.2,
}
_LFM2_MOE: Settings = {
    **_GQA,
    "norm_eps": 1e-5,
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "num_dense_layers": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
_DELTA: Settings = {
    **_RMS,
    **_partial(0.5),
    "head_dim": 32,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_QWEN3_NEXT: Settings = {
    **_DELTA,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
}
_QWEN35_MOE: Settings = {key: value for key, value in _QWEN3_NEXT.items() if key != "intermediate_size"}
_SHIFTED: dict[str, Any] = {"norm_shift": 1.0}

# --- language models of larger models -------------------------------------------------------------------------

_VISION: Settings = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}


# Qwen-VL: positions by time, height and width, which of text are the same; heads of 16 or 32 channels. llama.cpp takes
# 0 for the epsilon of Qwen2-VL's norms: those of the zoo must not be felt.
_QWEN_VISION: Settings = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 1,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [0],
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_QWEN2_VISION: Settings = {"depth": 1, "embed_dim": 16, "hidden_size": 64, "mlp_ratio": 1, "num_heads": 1}
_QWEN2_VL: Settings = {**_RMS, **_EPS6, **_rope({**_PLAIN, "mrope_section": [2, 3, 3]})}
_QWEN3_VL: Settings = {
    **_RMS, **_rope({**_PLAIN, "mrope_section": [6, 5, 5], "mrope_interleaved": True}), "head_dim": 32,
}  # fmt: skip
_QWEN3_VL_MOE: Settings = {**_QWEN3_VL, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def _multimodal(
    text_type: str, text: Settings, vision_type: str, vision_settings: Settings = _VISION, **settings: Any
) -> Settings:
    vision = {"model_type": vision_type, **vision_settings}
    return {**_IDS, "text_config": {"model_type": text_type, **text}, "vision_config": vision, **settings}


SPECS = {
    "llama": ZooSpec("LlamaForCausalLM", _RMS, seed=1),
    "llama-tied-mha-bf16-4": ZooSpec("LlamaForCausalLM", {**_FULL_HEADS, **_TIED}, 4, dtype="BF16", seed=2),
    "llama-mqa-f16-shards": ZooSpec("LlamaForCausalLM", _MQA, dtype="F16", n_shards=3, seed=3),
    "llama-biases": ZooSpec("LlamaForCausalLM", {**_RMS, **_BIASES}, seed=4),
    "llama-biases-tied-shards-4": ZooSpec(
        "LlamaForCausalLM", {**_RMS, **_BIASES, **_TIED}, 4, dtype="BF16", n_shards=2, seed=5
    ),
    "llama-linear": ZooSpec("LlamaForCausalLM", {**_RMS, **_rope(_LINEAR)}, seed=6),
    "llama-linear-4": ZooSpec("LlamaForCausalLM", {**_RMS, **_rope(_LINEAR)}, 4, seed=7),
    "llama-llama3": ZooSpec("LlamaForCausalLM", {**_RMS, **_rope(_LLAMA3)}, seed=8),
    "llama-llama3-head32-4": ZooSpec("LlamaForCausalLM", {**_RMS, **_rope(_LLAMA3), "head_dim": 32}, 4, seed=9),
    "llama-yarn": ZooSpec("LlamaForCausalLM", {**_RMS, **_rope(_YARN)}, seed=10),
    "llama-yarn-4": ZooSpec("LlamaForCausalLM", {**_RMS, **_rope(_YARN)}, 4, seed=11),
    "llama-yarn-long": ZooSpec(
        "LlamaForCausalLM",
        {**_RMS, **_rope(_YARN_LONG, head_dim=32, max_position_embeddings=1600)},
        n_tokens=480,
        seed=12,
    ),
    "llama-yarn-attention-factor": ZooSpec("LlamaForCausalLM", {**_RMS, **_rope(_YARN_FACTOR)}, seed=13),
    "llama-yarn-mscale-4": ZooSpec("LlamaForCausalLM", {**_RMS, **_rope(_YARN_MSCALE)}, 4, seed=14),
    "llama-old-name-4": ZooSpec("LLaMAForCausalLM", _RMS, 4, stand_in="LlamaForCausalLM", seed=15),
    "iquest-coder-4": ZooSpec("IQuestCoderForCausalLM", _RMS, 4, stand_in="LlamaForCausalLM", seed=16),
    "mistral": ZooSpec("MistralForCausalLM", {**_RMS, "sliding_window": 192}, seed=20),
    "mistral-mqa-bf16-4": ZooSpec("MistralForCausalLM", {**_MQA, "sliding_window": None}, 4, dtype="BF16", seed=21),
    "mistral-tied-mha": ZooSpec(
        "MistralForCausalLM", {**_FULL_HEADS, **_TIED, "sliding_window": None}, dtype="F16", seed=22
    ),
    "mistral-linear-4": ZooSpec("MistralForCausalLM", {**_RMS, **_rope(_LINEAR), "sliding_window": None}, 4, seed=23),
    "mistral-llama3": ZooSpec("MistralForCausalLM", {**_RMS, **_rope(_LLAMA3), "sliding_window": None}, seed=24),
    "mistral-yarn-attention-factor-4": ZooSpec(
        "MistralForCausalLM", {**_RMS, **_rope(_YARN_FACTOR), "sliding_window": None}, 4, seed=25
    ),
    "mistral-yarn-mscale": ZooSpec(
        "MistralForCausalLM", {**_RMS, **_rope(_YARN_MSCALE), "sliding_window": None}, seed=26
    ),
    "qwen2": ZooSpec("Qwen2ForCausalLM", _RMS, seed=30),
    "qwen2-tied-mqa-bf16-4": ZooSpec(
        "Qwen2ForCausalLM", {**_RMS, **_TIED, **_EPS6, "num_key_value_heads": 1}, 4, dtype="BF16", seed=31
    ),
    "qwen2-mha-shards": ZooSpec("Qwen2ForCausalLM", _FULL_HEADS, dtype="F16", n_shards=2, seed=32),
    "qwen2-linear": ZooSpec("Qwen2ForCausalLM", {**_RMS, **_rope(_LINEAR)}, seed=33),
    "qwen2-yarn-4": ZooSpec("Qwen2ForCausalLM", {**_RMS, **_rope(_YARN)}, 4, seed=34),
    "qwen2-yarn-attention-factor": ZooSpec("Qwen2ForCausalLM", {**_RMS, **_rope(_YARN_FACTOR)}, seed=35),
    "qwen2-yarn-mscale": ZooSpec("Qwen2ForCausalLM", {**_RMS, **_rope(_YARN_MSCALE)}, seed=36),
    "qwen3": ZooSpec("Qwen3ForCausalLM", {**_RMS, "head_dim": 32}, seed=40),
    "qwen3-tied-mha-bf16-4": ZooSpec(
        "Qwen3ForCausalLM", {**_FULL_HEADS, **_TIED, **_EPS6, "head_dim": 16}, 4, dtype="BF16", seed=41
    ),
    "qwen3-mqa-shards": ZooSpec("Qwen3ForCausalLM", _MQA, dtype="F16", n_shards=2, seed=42),
    # llama.cpp has no place for a bias of o_proj here; where transformers finds none, it takes zeros.
    "qwen3-biases": ZooSpec(
        "Qwen3ForCausalLM", {**_RMS, "head_dim": 32, "attention_bias": True}, omitted=r".*o_proj\.bias", seed=43
    ),
    "qwen3-linear-4": ZooSpec("Qwen3ForCausalLM", {**_RMS, **_rope(_LINEAR), "head_dim": 16}, 4, seed=44),
    "qwen3-yarn": ZooSpec("Qwen3ForCausalLM", {**_RMS, **_rope(_YARN), "head_dim": 32}, seed=45),
    "qwen3-yarn-long-4": ZooSpec(
        "Qwen3ForCausalLM",
        {**_RMS, **_rope(_YARN_LONG, head_dim=32, max_position_embeddings=1600)},
        4,
        n_tokens=480,
        seed=46,
    ),
    "qwen3-yarn-attention-factor-4": ZooSpec(
        "Qwen3ForCausalLM", {**_RMS, **_rope(_YARN_FACTOR), "head_dim": 16}, 4, seed=47
    ),
    "qwen3-yarn-mscale": ZooSpec("Qwen3ForCausalLM", {**_RMS, **_rope(_YARN_MSCALE), "head_dim": 16}, seed=48),
    "gemma": ZooSpec("GemmaForCausalLM", _GEMMA, **_GEMMA_TRAITS, seed=101),
    "gemma-mqa-bf16-4": ZooSpec(
        "GemmaForCausalLM",
        {**_GEMMA, "num_key_value_heads": 1},
        4,
        {"hidden_act": "gelu"},
        dtype="BF16",
        **_GEMMA_TRAITS,
        seed=102,
    ),
    "gemma2": ZooSpec("Gemma2ForCausalLM", _GEMMA2, **_GEMMA_TRAITS, seed=103),
    "gemma2-bf16-4": ZooSpec(
        "Gemma2ForCausalLM", _GEMMA2, 4, {"layer_types": None}, dtype="BF16", **_GEMMA_TRAITS, seed=104
    ),
    "gemma3": ZooSpec("Gemma3ForCausalLM", _GEMMA3, **_GEMMA_TRAITS, seed=105),
    "gemma3-linear-4": ZooSpec(
        "Gemma3ForCausalLM",
        _GEMMA3_LINEAR,
        4,
        {"layer_types": None, "_sliding_window_pattern": None, "sliding_window_pattern": 6},
        **_GEMMA_TRAITS,
        seed=106,
    ),
    "gemma3-pattern-3": ZooSpec(
        "Gemma3ForCausalLM",
        {
            **_GEMMA3,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        },
        **_GEMMA_TRAITS,
        seed=107,
    ),
    # From this number of layers llama.cpp knows the 27 B models, which scale queries by the width of the model.
    "gemma2-27b": ZooSpec(
        "Gemma2ForCausalLM",
        {**_GEMMA2, **_27B, "num_hidden_layers": 46, "final_logit_softcapping": 50.0},
        **_27B_TRAITS,
        seed=100,
    ),
    "gemma3-27b": ZooSpec("Gemma3ForCausalLM", {**_GEMMA3, **_27B, "num_hidden_layers": 62}, **_27B_TRAITS, seed=109),
    "gemma3-multimodal": ZooSpec(
        "Gemma3ForConditionalGeneration",
        _multimodal("gemma3_text", _GEMMA3_LINEAR, "siglip_vision_model", mm_tokens_per_image=1),
        **_GEMMA_TRAITS,
        seed=108,
    ),
    # Gemma 3 4B's repository says little of the language model: the rest is its class's defaults.
    "gemma3-multimodal-4": ZooSpec(
        "Gemma3ForConditionalGeneration",
        _multimodal("gemma3_text", _GEMMA3_DEFAULTS, "siglip_vision_model", mm_tokens_per_image=1),
        4,
        {"text_config": _GEMMA3_SILENT, "tie_word_embeddings": None},
        **{**_GEMMA_TRAITS, "embedding_gain": 0.0025},
        seed=98,
    ),
    "phi-3": ZooSpec("Phi3ForCausalLM", {**_FULL_HEADS, "sliding_window": 192}, seed=110),
    "phi-3-gqa-bf16-4": ZooSpec("Phi3ForCausalLM", _RMS, 4, dtype="BF16", seed=111),
    "phi-3-longrope-long": ZooSpec("Phi3ForCausalLM", {**_RMS, **_longrope(64, 512)}, seed=112),
    "phi-3-longrope-short-4": ZooSpec("Phi3ForCausalLM", {**_RMS, **_longrope(256, 1024)}, 4, seed=113),
    "phi-4": ZooSpec("Phi3ForCausalLM", _PHI4, seed=114),
    "phi-4-bf16-4": ZooSpec("Phi3ForCausalLM", _PHI4, 4, dtype="BF16", seed=115),
    "phi-2": ZooSpec("PhiForCausalLM", {**_MHA, **_partial(0.5), "intermediate_size": 256}, seed=118),
    "phi-2-f16-4": ZooSpec(
        "PhiForCausalLM", {**_MHA, **_partial(0.5), "intermediate_size": 256}, 4, dtype="F16", seed=119
    ),
    "gpt2": ZooSpec("GPT2LMHeadModel", _GPT2, seed=120),
    "gpt2-untied-f16": ZooSpec("GPT2LMHeadModel", {**_GPT2, **_UNTIED, "n_inner": 96}, dtype="F16", seed=121),
    # GPT-2's own repository: saved without a head, with the masks of its attention.
    "gpt2-bare-4": ZooSpec(
        "GPT2LMHeadModel",
        _GPT2,
        4,
        {"n_ctx": 256, "tie_word_embeddings": None},
        names={r"transformer\.": ""},
        extras={f"h.{i}.attn.bias": (1, 1, 256, 256) for i in range(2)},
        seed=122,
    ),
    "gpt-neox": ZooSpec("GPTNeoXForCausalLM", _NEOX, seed=125),
    "gpt-neox-serial-f16-4": ZooSpec(
        "GPTNeoXForCausalLM",
        {**_NEOX, **_partial(1.0), "use_parallel_residual": False},
        4,
        dtype="F16",
        extras={
            f"gpt_neox.layers.{i}.attention.{name}": shape
            for i in range(2)
            for name, shape in (("bias", (1, 1, 256, 256)), ("masked_bias", ()), ("rotary_emb.inv_freq", (8,)))
        },
        seed=126,
    ),
    "stablelm": ZooSpec("StableLmForCausalLM", _STABLELM, seed=130),
    "stablelm-qkv-bias-bf16-4": ZooSpec(
        "StableLmForCausalLM", {**_STABLELM, "use_qkv_bias": True}, 4, dtype="BF16", seed=131
    ),
    "stablelm-parallel-qk-norm": ZooSpec(
        "StableLmForCausalLM", {**_STABLELM, "use_parallel_residual": True, "qk_layernorm": True}, seed=132
    ),
    "stablelm-epoch-4": ZooSpec(
        "StableLMEpochForCausalLM",
        {**_STABLELM, "layer_norm_eps": 1e-5},
        4,
        {
            "model_type": "stablelm_epoch",
            "partial_rotary_factor": None,
            "rope_pct": 0.25,
            "layer_norm_eps": None,
            "norm_eps": 1e-5,
        },
        stand_in="StableLmForCausalLM",
        dtype="F16",
        seed=133,
    ),
    "olmo": ZooSpec("OlmoForCausalLM", _GQA, seed=135),
    "olmo-clip-tied-bf16-4": ZooSpec("OlmoForCausalLM", {**_MHA, **_TIED, "clip_qkv": 3.0}, 4, dtype="BF16", seed=136),
    "olmo2": ZooSpec("Olmo2ForCausalLM", _RMS, seed=140),
    "olmo2-mha-bf16-4": ZooSpec("Olmo2ForCausalLM", _FULL_HEADS, 4, dtype="BF16", seed=141),
    "olmo2-linear": ZooSpec("Olmo2ForCausalLM", {**_RMS, **_rope(_LINEAR)}, seed=142),
    "olmo2-yarn-4": ZooSpec("Olmo2ForCausalLM", {**_RMS, **_rope(_YARN)}, 4, seed=143),
    "olmo3": ZooSpec("Olmo3ForCausalLM", {**_OLMO3, **_by_layer(_PLAIN, _PLAIN)}, seed=145),
    "olmo3-linear": ZooSpec("Olmo3ForCausalLM", {**_OLMO3, **_by_layer(_LINEAR, _PLAIN)}, seed=146),
    "olmo3-yarn-bf16": ZooSpec(
        "Olmo3ForCausalLM", {**_OLMO3, **_by_layer(_YARN_FACTOR, _PLAIN)}, dtype="BF16", seed=147
    ),
    # In the form of transformers 4, today's transformers takes 500 000 for theta in the layers with a window.
    "olmo3-yarn-4": ZooSpec(
        "Olmo3ForCausalLM",
        {**_OLMO3, **_by_layer({**_YARN, "rope_theta": 5e5}, {**_PLAIN, "rope_theta": 5e5})},
        4,
        seed=148,
    ),
    "granite": ZooSpec("GraniteForCausalLM", _GRANITE, seed=150),
    "granite-biases-tied-bf16-4": ZooSpec(
        "GraniteForCausalLM", {**_GRANITE, **_BIASES, **_TIED}, 4, dtype="BF16", seed=151
    ),
    "granite-linear": ZooSpec("GraniteForCausalLM", {**_GRANITE, **_rope(_LINEAR)}, seed=152),
    "granite-llama3": ZooSpec("GraniteForCausalLM", {**_GRANITE, **_rope(_LLAMA3)}, seed=153),
    "granite-yarn-4": ZooSpec("GraniteForCausalLM", {**_GRANITE, **_rope(_YARN)}, 4, seed=154),
    "cohere": ZooSpec("CohereForCausalLM", _COHERE, seed=155),
    "cohere-mha-f16-4": ZooSpec("CohereForCausalLM", {**_COHERE, "num_key_value_heads": 4}, 4, dtype="F16", seed=156),
    # llama.cpp takes norms of queries and keys from 64 layers on, as in Command R+.
    "cohere-qk-norm": ZooSpec(
        "CohereForCausalLM",
        {**_COHERE, "use_qk_norm": True, "num_hidden_layers": 64, "intermediate_size": 32},
        n_tokens=64,
        seed=157,
    ),
    "cohere2": ZooSpec("Cohere2ForCausalLM", _COHERE2, seed=160),
    "cohere2-f16-4": ZooSpec(
        "Cohere2ForCausalLM", _COHERE2, 4, {"layer_types": None, "sliding_window_pattern": 4}, dtype="F16", seed=161
    ),
    "smollm3": ZooSpec("SmolLM3ForCausalLM", _SMOLLM3, seed=165),
    "smollm3-untied-bf16-4": ZooSpec("SmolLM3ForCausalLM", {**_SMOLLM3, **_UNTIED}, 4, dtype="BF16", seed=166),
    "smollm3-linear": ZooSpec("SmolLM3ForCausalLM", {**_SMOLLM3, **_rope(_LINEAR)}, seed=167),
    "smollm3-yarn-4": ZooSpec("SmolLM3ForCausalLM", {**_SMOLLM3, **_rope(_YARN)}, 4, seed=168),
    "mixtral": ZooSpec("MixtralForCausalLM", _MIXTRAL, seed=3170),
    "mixtral-head32-bf16-4": ZooSpec(
        "MixtralForCausalLM", {**_MIXTRAL, "num_local_experts": 4, "head_dim": 32}, 4, dtype="BF16", seed=3171
    ),
    "mixtral-yarn": ZooSpec("MixtralForCausalLM", {**_MIXTRAL, **_rope(_YARN), "head_dim": 16}, seed=172),
    "qwen2moe": ZooSpec("Qwen2MoeForCausalLM", _QWEN2_MOE, seed=175),
    "qwen2moe-top3-bf16-4": ZooSpec(
        "Qwen2MoeForCausalLM",
        {**_QWEN2_MOE, "num_experts_per_tok": 3},
        4,
        {"layer_types": None, "qkv_bias": None},
        dtype="BF16",
        seed=176,
    ),
    "qwen2moe-linear": ZooSpec("Qwen2MoeForCausalLM", {**_QWEN2_MOE, **_rope(_LINEAR)}, seed=177),
    "qwen2moe-yarn-4": ZooSpec("Qwen2MoeForCausalLM", {**_QWEN2_MOE, **_rope(_YARN)}, 4, seed=1178),
    "qwen3moe": ZooSpec("Qwen3MoeForCausalLM", _QWEN3_MOE, seed=180),
    "qwen3moe-top3-bf16-4": ZooSpec(
        "Qwen3MoeForCausalLM", {**_QWEN3_MOE, "num_experts_per_tok": 3, "head_dim": 16}, 4, dtype="BF16", seed=181
    ),
    "qwen3moe-linear": ZooSpec("Qwen3MoeForCausalLM", {**_QWEN3_MOE, **_rope(_LINEAR)}, seed=2182),
    "qwen3moe-yarn-4": ZooSpec("Qwen3MoeForCausalLM", {**_QWEN3_MOE, **_rope(_YARN)}, 4, seed=183),
    "olmoe": ZooSpec("OlmoeForCausalLM", _OLMOE, seed=185),
    "olmoe-linear-bf16-4": ZooSpec("OlmoeForCausalLM", {**_OLMOE, **_rope(_LINEAR)}, 4, dtype="BF16", seed=186),
    "olmoe-yarn": ZooSpec("OlmoeForCausalLM", {**_OLMOE, **_rope(_YARN)}, seed=1187),
    "granitemoe": ZooSpec("GraniteMoeForCausalLM", _GRANITE_MOE, seed=190),
    "granitemoe-tied-bf16-4": ZooSpec(
        "GraniteMoeForCausalLM", {**_GRANITE_MOE, **_TIED, "num_local_experts": 4}, 4, dtype="BF16", seed=191
    ),
    "granitemoe-linear": ZooSpec("GraniteMoeForCausalLM", {**_GRANITE_MOE, **_rope(_LINEAR)}, seed=1192),
    "granitemoe-llama3": ZooSpec("GraniteMoeForCausalLM", {**_GRANITE_MOE, **_rope(_LLAMA3)}, seed=193),
    "granitemoe-yarn-4": ZooSpec("GraniteMoeForCausalLM", {**_GRANITE_MOE, **_rope(_YARN)}, 4, seed=3194),
    "granitemoe-shared": ZooSpec(
        "GraniteMoeSharedForCausalLM", {**_GRANITE_MOE, "shared_intermediate_size": 80}, seed=1195
    ),
    "internlm2-4": ZooSpec("InternLM2ForCausalLM", _RMS, 4, stand_in="LlamaForCausalLM", seed=200),
    "internlm2-mha-bf16-4": ZooSpec(
        "InternLM2ForCausalLM", _FULL_HEADS, 4, stand_in="LlamaForCausalLM", dtype="BF16", seed=201
    ),
    "internlm2-linear-4": ZooSpec(
        "InternLM2ForCausalLM", {**_RMS, **_rope(_LINEAR)}, 4, stand_in="LlamaForCausalLM", seed=202
    ),
    "starcoder2": ZooSpec("Starcoder2ForCausalLM", _GQA, seed=205),
    "starcoder2-untied-bf16-4": ZooSpec("Starcoder2ForCausalLM", {**_GQA, **_UNTIED}, 4, dtype="BF16", seed=206),
    "starcoder2-linear": ZooSpec("Starcoder2ForCausalLM", {**_GQA, **_rope(_LINEAR)}, seed=207),
    "starcoder2-yarn-4": ZooSpec("Starcoder2ForCausalLM", {**_GQA, **_rope(_YARN)}, 4, seed=208),
    "deepseek2": ZooSpec("DeepseekV2ForCausalLM", _DEEPSEEK2, seed=220),
    "deepseek2-yarn-bf16": ZooSpec(
        "DeepseekV2ForCausalLM",
        {**_DEEPSEEK2, **_rope({**_YARN, "mscale": 0.7, "mscale_all_dim": 0.7})},
        dtype="BF16",
        seed=221,
    ),
    "deepseek2-q-lora-4": ZooSpec("DeepseekV2ForCausalLM", {**_DEEPSEEK2, "q_lora_rank": 24}, 4, seed=222),
    "deepseek3": ZooSpec("DeepseekV3ForCausalLM", _DEEPSEEK3, seed=223),
    "deepseek3-yarn-4": ZooSpec(
        "DeepseekV3ForCausalLM",
        {**_DEEPSEEK3, **_rope({**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0})},
        4,
        dtype="BF16",
        seed=224,
    ),
    "mamba": ZooSpec("MambaForCausalLM", _MAMBA, seed=225),
    "mamba-untied-bf16": ZooSpec("MambaForCausalLM", {**_MAMBA, **_UNTIED}, dtype="BF16", seed=226),
    "granite4-micro": ZooSpec("GraniteMoeHybridForCausalLM", {**_GRANITE4, "num_local_experts": 0}, seed=230),
    "granite4-tiny-bf16": ZooSpec("GraniteMoeHybridForCausalLM", _GRANITE4, dtype="BF16", seed=6231),
    "granite4-h-micro": ZooSpec("GraniteMoeHybridForCausalLM", {**_GRANITE4_H, "num_local_experts": 0}, seed=232),
    "granite4-h-tiny": ZooSpec("GraniteMoeHybridForCausalLM", {**_GRANITE4_H, **_TIED}, seed=233),
    "granite4-h-tiny-4": ZooSpec(
        "GraniteMoeHybridForCausalLM",
        _GRANITE4_H,
        4,
        {"layer_types": ["mamba", "attention", "mamba"]},
        dtype="BF16",
        seed=234,
    ),
    "falcon-h1": ZooSpec("FalconH1ForCausalLM", _FALCON_H1, seed=390),
    "falcon-h1-norm-bf16": ZooSpec(
        "FalconH1ForCausalLM",
        {**_FALCON_H1, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
        dtype="BF16",
        seed=391,
    ),
    "nemotron-h": ZooSpec("NemotronHForCausalLM", _NEMOTRON_H, edits={"num_experts_per_tok": None}, seed=392),
    "nemotron-h-pattern-bf16": ZooSpec(
        "NemotronHForCausalLM",
        _NEMOTRON_H,
        edits={
            "layers_block_type": None,
            "hybrid_override_pattern": "M-*-",
            "num_hidden_layers": 4,
            "num_experts_per_tok": None,
        },
        dtype="BF16",
        seed=393,
    ),
    "nemotron-h-moe": ZooSpec("NemotronHForCausalLM", _NEMOTRON_H_MOE, seed=394),
    "nemotron-h-moe-latent": ZooSpec("NemotronHForCausalLM", {**_NEMOTRON_H_MOE, "moe_latent_size": 32}, seed=395),
    "seed-oss": ZooSpec("SeedOssForCausalLM", _SEED_OSS, seed=300),
    "seed-oss-tied-bf16-4": ZooSpec(
        "SeedOssForCausalLM", {**_SEED_OSS, **_TIED, "attention_bias": False}, 4, dtype="BF16", seed=301
    ),
    "glm4": ZooSpec("Glm4ForCausalLM", {**_GLM4, "attention_bias": False}, seed=305),
    "glm4-biases-bf16-4": ZooSpec("Glm4ForCausalLM", _GLM4, 4, dtype="BF16", seed=306),
    "exaone4": ZooSpec("Exaone4ForCausalLM", _EXAONE4, seed=310),
    "exaone4-llama3": ZooSpec("Exaone4ForCausalLM", {**_EXAONE4, **_rope(_LLAMA3)}, dtype="BF16", seed=311),
    # With this number of layers llama.cpp knows the 32 B model, which rotates in the layers with a window only.
    "exaone4-32b": ZooSpec("Exaone4ForCausalLM", _EXAONE4_32B, n_tokens=64, seed=312),
    "ernie4.5": ZooSpec("Ernie4_5ForCausalLM", {**_RMS, "head_dim": 32}, seed=315),
    "ernie4.5-old-name-bf16-4": ZooSpec(
        "Ernie4_5_ForCausalLM", _RMS, 4, stand_in="Ernie4_5ForCausalLM", dtype="BF16", seed=316
    ),
    "ernie4.5-moe": ZooSpec("Ernie4_5_MoeForCausalLM", _ERNIE_MOE, seed=320),
    "hunyuan-dense": ZooSpec("HunYuanDenseV1ForCausalLM", _HUNYUAN, seed=325),
    "hunyuan-dense-alpha-bf16": ZooSpec(
        "HunYuanDenseV1ForCausalLM", {**_HUNYUAN, **_TIED, **_ALPHA}, dtype="BF16", seed=326
    ),
    "hunyuan-moe": ZooSpec("HunYuanMoEV1ForCausalLM", {**_HUNYUAN_MOE, "head_dim": 16}, seed=330),
    "glm4moe": ZooSpec("Glm4MoeForCausalLM", _GLM4_MOE, seed=335),
    "glm4moe-air-bf16-4": ZooSpec("Glm4MoeForCausalLM", {**_GLM4_MOE, "use_qk_norm": False}, 4, dtype="BF16", seed=336),
    "dots1": ZooSpec("Dots1ForCausalLM", _DOTS1, edits={"scoring_func": "sigmoid"}, seed=340),
    "minimax-m2": ZooSpec(
        "MiniMaxM2ForCausalLM", _MINIMAX_M2, edits={"rotary_dim": 16, "scoring_func": "sigmoid"}, seed=345
    ),
    "ministral3": ZooSpec("Ministral3ForCausalLM", _MINISTRAL3, seed=350),
    "gpt-oss": ZooSpec("GptOssForCausalLM", _GPT_OSS, seed=355),
    "gpt-oss-bf16-4": ZooSpec("GptOssForCausalLM", _GPT_OSS, 4, dtype="BF16", seed=356),
    "apertus": ZooSpec("ApertusForCausalLM", _APERTUS, seed=360),
    "apertus-plain": ZooSpec("ApertusForCausalLM", _RMS, seed=361),
    "lfm2": ZooSpec("Lfm2ForCausalLM", _LFM2, seed=365),
    "lfm2-old-names-bf16-4": ZooSpec(
        "LFM2ForCausalLM",
        {**_LFM2, "block_auto_adjust_ff_dim": False},
        4,
        {"intermediate_size": None, "block_ff_dim": 96, "tie_word_embeddings": None, "tie_embedding": True},
        stand_in="Lfm2ForCausalLM",
        dtype="BF16",
        seed=366,
    ),
    "lfm2moe": ZooSpec("Lfm2MoeForCausalLM", _LFM2_MOE, seed=371),
    "qwen3next": ZooSpec("Qwen3NextForCausalLM", _QWEN3_NEXT, **_SHIFTED, n_tokens=64, seed=377),
    "qwen3.5": ZooSpec("Qwen3_5ForCausalLM", _DELTA, **_SHIFTED, seed=380),
    "qwen3.5-moe": ZooSpec("Qwen3_5MoeForCausalLM", _QWEN35_MOE, **_SHIFTED, n_tokens=64, seed=385),
    "qwen3.5-multimodal": ZooSpec(
        "Qwen3_5ForConditionalGeneration",
        _multimodal("qwen3_5_text", _DELTA, "qwen3_5_vision"),
        **_SHIFTED,
        seed=381,
    ),
    "qwen3.5-moe-multimodal": ZooSpec(
        "Qwen3_5MoeForConditionalGeneration",
        _multimodal("qwen3_5_moe_text", _QWEN35_MOE, "qwen3_5_moe_vision"),
        dtype="BF16",
        **_SHIFTED,
        n_tokens=64,
        seed=386,
    ),
    "qwen2-vl": ZooSpec(
        "Qwen2VLForConditionalGeneration",
        _multimodal("qwen2_vl_text", _QWEN2_VL, "qwen2_vl", _QWEN2_VISION),
        embedding_gain=3.0,
        seed=390,
    ),
    "qwen2.5-vl": ZooSpec(
        "Qwen2_5_VLForConditionalGeneration",
        _multimodal("qwen2_5_vl_text", _QWEN2_VL, "qwen2_5_vl", _QWEN_VISION),
        dtype="BF16",
        embedding_gain=3.0,
        seed=391,
    ),
    "qwen3-vl": ZooSpec(
        "Qwen3VLForConditionalGeneration",
        _multimodal("qwen3_vl_text", _QWEN3_VL, "qwen3_vl", _QWEN_VISION, **_TIED),
        seed=392,
    ),
    "qwen3-vl-moe": ZooSpec(
        "Qwen3VLMoeForConditionalGeneration",
        _multimodal("qwen3_vl_moe_text", _QWEN3_VL_MOE, "qwen3_vl_moe", _QWEN_VISION),
        turned=r".*\.mlp\.experts\..*",
        dtype="BF16",
        seed=393,
    ),
    "idefics3": ZooSpec(
        "Idefics3ForConditionalGeneration", _multimodal("llama", _RMS, "idefics3_vision", scale_factor=1), seed=210
    ),
    "llava": ZooSpec("LlavaForConditionalGeneration", _multimodal("llama", _RMS, "clip_vision_model"), seed=211),
    "llava-next": ZooSpec(
        "LlavaNextForConditionalGeneration",
        _multimodal("mistral", {**_RMS, "sliding_window": None}, "clip_vision_model"),
        dtype="BF16",
        seed=212,
    ),
    "mistral3": ZooSpec(
        "Mistral3ForConditionalGeneration",
        _multimodal("mistral", {**_MQA, "sliding_window": None}, "pixtral", spatial_merge_size=1),
        seed=213,
    ),
    "smolvlm": ZooSpec(
        "SmolVLMForConditionalGeneration",
        _multimodal("llama", {**_RMS, **_TIED}, "smolvlm_vision", scale_factor=1),
        dtype="BF16",
        seed=214,
    ),
}


def write_spec(folder: Path, name: str) -> Path:
    """Write the recorded folder of a spec and return it."""
    return write_zoo(folder, SPECS[name], zoo_config(name), zoo_shapes(name))
