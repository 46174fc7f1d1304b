"""DeepSeek 2 and 3, with multi-head latent attention."""

from __future__ import annotations

from dataclasses import replace

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from .experts import (
    EXPERT_FF_KEY,
    EXPERTS,
    SHARED_EXPERTS,
    expert_keys,
    gating_key,
    is_dense_layer,
    is_sparse_layer,
    shared_sizes,
)
from .family import (
    Config,
    Family,
    Key,
    Part,
    Parts,
    Sizes,
    counts,
    flag,
    unless,
    where,
)
from .parts import (
    ATTENTION_NORM,
    FFN,
    FFN_NORM,
    OUTSIDE,
    RMS,
)

_MLA_ATTENTION: Parts = {
    "attn_q": Part("self_attn.q_proj", ("q", "embd"), when=unless("q_lora_rank")),
    "attn_q_a": Part("self_attn.q_a_proj", ("q_lora", "embd"), when=flag("q_lora_rank")),
    "attn_q_a_norm": Part("self_attn.q_a_layernorm", ("q_lora",), when=flag("q_lora_rank")),
    "attn_q_b": Part("self_attn.q_b_proj", ("q", "q_lora"), when=flag("q_lora_rank")),
    "attn_kv_a_mqa": Part("self_attn.kv_a_proj_with_mqa", ("kv_a", "embd")),
    "attn_kv_a_norm": Part("self_attn.kv_a_layernorm", ("kv_lora",)),
    "attn_k_b": Part(
        "self_attn.kv_b_proj", ("heads", "kv_lora", "nope"), "first_part_of_heads", ("kv_b", "kv_lora"), transposed=True
    ),
    "attn_v_b": Part("self_attn.kv_b_proj", ("heads", "v_head", "kv_lora"), "last_part_of_heads", ("kv_b", "kv_lora")),
    "attn_output": Part("self_attn.o_proj", ("embd", "v")),
}


def mla_sizes(config: Config) -> dict[str, int]:
    """Return the dimensions of latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""
    heads, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    v_head, kv_lora = config["v_head_dim"], config["kv_lora_rank"]
    return {
        "nope": nope,
        "rope": rope,
        "v_head": v_head,
        "kv_lora": kv_lora,
        "kv_a": kv_lora + rope,
        "kv_b": heads * (nope + v_head),
        "q_lora": config.get("q_lora_rank") or 0,
        "q": heads * (nope + rope),
        "v": heads * v_head,
        "head": rope,
        **shared_sizes(config),
    }


def mla_keys(config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return DeepSeek's keys: llama.cpp computes latent attention as one wide key/value head (deepseek2.cpp)."""
    numbers = {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": sizes["q_lora"],
        "attention.kv_lora_rank": sizes["kv_lora"],
        "attention.key_length": sizes["kv_a"],
        "attention.value_length": sizes["kv_lora"],
        "attention.key_length_mla": sizes["nope"] + sizes["rope"],
        "attention.value_length_mla": sizes["v_head"],
    }
    gating = "SIGMOID" if config["scoring_func"] == "sigmoid" else "SOFTMAX"
    return {**counts(numbers), **expert_keys(config, sizes), **gating_key(gating)}


_DEEPSEEK2 = Family(
    classes=("DeepseekV2ForCausalLM",),
    architecture="deepseek2",
    layer={
        **ATTENTION_NORM,
        **_MLA_ATTENTION,
        **FFN_NORM,
        **where(FFN, is_dense_layer),
        **where(EXPERTS, is_sparse_layer),
        **where(
            {
                "exp_probs_b.bias": Part(
                    "mlp.gate.e_score_correction_bias", ("experts",), when=flag("has_correction_bias"), suffix=""
                ),
                **SHARED_EXPERTS,
            },
            is_sparse_layer,
        ),
    },
    outside=OUTSIDE,
    defaults={
        **RMS, "attention_bias": False, "mlp_bias": False, "num_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "moe_intermediate_size": 1407, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
        "first_k_dense_replace": 0, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "q_lora_rank": 1536, "scoring_func": "softmax", "topk_method": "greedy",
    },
    keys=(
        EXPERT_FF_KEY,
        Key("expert_weights_scale", "routed_scaling_factor"),
        Key("expert_weights_norm", "norm_topk_prob", GGUFValueType.BOOL),
    ),
    fixed={
        "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1, "norm_topk_prob": False,
        "scoring_func": "softmax", "topk_method": "greedy",
    },
    rope_kinds=("default", "yarn"),
    writes_rope_dim=True,
    writes_vocab_size=True,
    yarn_log_unit=0.1,
    sizes=mla_sizes,
    more_keys=mla_keys,
    example="DeepSeek-V2-Lite",
)  # fmt: skip

_DEEPSEEK3_DEFAULTS = {
    **_DEEPSEEK2.defaults,
    "num_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "n_group": 8,
    "topk_group": 4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "has_correction_bias": True,
}

DEEPSEEK = (
    _DEEPSEEK2,
    replace(
        _DEEPSEEK2,
        classes=("DeepseekV3ForCausalLM",),
        defaults=_DEEPSEEK3_DEFAULTS,
        fixed={
            "attention_bias": False, "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "rope_interleave": True,
        },
        extra_layers=True,
        example="DeepSeek-V3, R1",
    ),
)  # fmt: skip
