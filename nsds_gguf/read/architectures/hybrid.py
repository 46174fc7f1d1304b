"""Families with convolutions, delta nets or Mamba 2 between their attention; ``families.FAMILIES`` includes them."""

from __future__ import annotations

from dataclasses import replace

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ...records import kv
from .experts import (
    EXPERT_FF_KEY,
    EXPERTS,
    SHARED_EXPERT,
    SHARED_FF_KEY,
    gating_key,
    is_dense_layer,
    is_sparse_layer,
    numbered_experts,
)
from .family import (
    Config,
    Family,
    LayerCondition,
    Part,
    Parts,
    Sizes,
    counts,
    shifted,
    where,
)
from .mamba2 import MAMBA2
from .parts import (
    ATTENTION,
    ATTENTION_NORM,
    FFN,
    OUTSIDE,
    QK_NORMS,
    RMS,
    UNTIED,
)
from .rope import section_keys

# --- kinds of layers ------------------------------------------------------------------------------------------

_RECURRENT = ("conv", "linear_attention")


def layer_kinds(config: Config) -> list[str]:
    """Return the kind of every layer: from the list, LFM2's numbers or Qwen's interval in config.json."""
    n_layers, listed = config["num_hidden_layers"], config.get("layer_types")
    if isinstance(listed, list):
        return [str(kind) for kind in listed]
    attending, interval = config.get("full_attn_idxs"), config.get("full_attention_interval") or 1
    if isinstance(attending, list):
        return ["full_attention" if i in attending else "conv" for i in range(n_layers)]
    return ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(n_layers)]


def is_recurrent_layer(config: Config, layer: int) -> bool:
    """Return whether a layer has a convolution or a delta net in place of attention."""
    kinds = layer_kinds(config)
    return layer < len(kinds) and kinds[layer] in _RECURRENT


def is_attention_layer(config: Config, layer: int) -> bool:
    """Return whether a layer attends."""
    return not is_recurrent_layer(config, layer)


# --- LFM2 -----------------------------------------------------------------------------------------------------

_LFM2_ATTENTION: Parts = {
    **ATTENTION,
    "attn_output": Part("self_attn.out_proj", ("embd", "q")),
    "attn_q_norm": Part("self_attn.q_layernorm", ("head",)),
    "attn_k_norm": Part("self_attn.k_layernorm", ("head",)),
}
_SHORT_CONVOLUTION: Parts = {
    "shortconv.conv.weight": Part("conv.conv", ("embd", "conv"), stored=("embd", "one", "conv")),
    "shortconv.in_proj.weight": Part("conv.in_proj", ("3embd", "embd")),
    "shortconv.out_proj.weight": Part("conv.out_proj", ("embd", "embd")),
}
_LFM2_FFN: Parts = {
    "ffn_gate": Part("feed_forward.w1", ("ff", "embd")),
    "ffn_up": Part("feed_forward.w3", ("ff", "embd")),
    "ffn_down": Part("feed_forward.w2", ("embd", "ff")),
}


_LFM2_EXPERTS: Parts = {
    "ffn_gate_inp": Part("feed_forward.gate", ("experts", "embd")),
    **numbered_experts("feed_forward"),
    "exp_probs_b.bias": Part("feed_forward.expert_bias", ("experts",), suffix=""),
}
_LFM2_MIXERS: Parts = {
    "attn_norm": Part("operator_norm", ("embd",)),
    **where(_LFM2_ATTENTION, is_attention_layer),
    **where(_SHORT_CONVOLUTION, is_recurrent_layer),
    "ffn_norm": Part("ffn_norm", ("embd",)),
}
_LFM2_OUTSIDE: Parts = {
    "token_embd": OUTSIDE["token_embd"],
    "token_embd_norm": Part("model.embedding_norm", ("embd",)),  # llama.cpp's name of LFM2's output norm
    "output": OUTSIDE["output"],
}


def lfm2_sizes(config: Config) -> dict[str, int]:
    """Return LFM2's dimensions; the width of its feed-forward block follows from ``intermediate_size``."""
    width = config["intermediate_size"]
    if config.get("block_auto_adjust_ff_dim"):
        step = config["block_multiple_of"]
        width = int(config["block_ffn_dim_multiplier"] * int(2 * width / 3))
        width = -(-width // step) * step
    return {"ff": width, "conv": config["conv_L_cache"], "3embd": 3 * config["hidden_size"]}


def lfm2_keys(config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return LFM2's keys; llama.cpp knows a convolution by having no key/value heads."""
    kv_heads = [0 if is_recurrent_layer(config, i) else sizes["kv_heads"] for i in range(sizes["layers"])]
    return {
        "attention.head_count_kv": kv(kv_heads, GGUFValueType.ARRAY, GGUFValueType.INT32),
        "shortconv.l_cache": kv(sizes["conv"], GGUFValueType.UINT32),
    }


def lfm2_moe_keys(config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return LFM2-MoE's keys: sigmoid scores, and leading dense layers."""
    n_dense = sum(is_dense_layer(config, i) for i in range(sizes["layers"]))
    return {**lfm2_keys(config, sizes), **counts({"leading_dense_block_count": n_dense}), **gating_key("SIGMOID")}


_LFM2 = Family(
    classes=("Lfm2ForCausalLM", "LFM2ForCausalLM"),
    architecture="lfm2",
    layer={**_LFM2_MIXERS, **_LFM2_FFN},
    outside=_LFM2_OUTSIDE,
    defaults={
        "norm_eps": 1e-5, "rope_theta": 1e6, "conv_L_cache": 3, "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True,
    },
    fixed={"conv_bias": False},
    fixed_head_dim=True,
    rope_kinds=("default",),
    writes_vocab_size=True,
    sizes=lfm2_sizes,
    more_keys=lfm2_keys,
    example="LFM2 350M to 2.6B",
)  # fmt: skip

# --- delta nets: Qwen3-Next and Qwen 3.5 ------------------------------------------------------------------------

_GATED_ATTENTION: Parts = {  # for each head, the rows of its query, then those of its gate
    **ATTENTION,
    "attn_q": Part("self_attn.q_proj", ("2q", "embd")),
    **shifted(QK_NORMS),
}
_DELTA_NORMS: Parts = {
    **shifted(ATTENTION_NORM),
    "post_attention_norm": Part("post_attention_layernorm", ("embd",), change="plus_one"),
}
_QWEN3NEXT_DELTA: Parts = {
    "attn_qkv": Part("linear_attn.in_proj_qkvz", ("delta_qkv", "embd"), "delta_qkv", ("delta_qkvz", "embd")),
    "attn_gate": Part("linear_attn.in_proj_qkvz", ("delta_v", "embd"), "delta_z", ("delta_qkvz", "embd")),
    "ssm_conv1d": Part("linear_attn.conv1d", ("delta_qkv", "conv"), stored=("delta_qkv", "one", "conv")),
    "ssm_dt.bias": Part("linear_attn.dt_bias", ("v_heads",), suffix=""),
    "ssm_a": Part("linear_attn.A_log", ("v_heads",), change="minus_exp", suffix="", bare=True),
    "ssm_ba": Part("linear_attn.in_proj_ba", ("2v_heads", "embd")),
    "ssm_norm": Part("linear_attn.norm", ("delta_head",)),
    "ssm_out": Part("linear_attn.out_proj", ("embd", "delta_v")),
}
# Heads of values go by heads of keys in the checkpoint, and in turns of them in llama.cpp.
_QWEN35_DELTA: Parts = {
    "attn_qkv": Part("linear_attn.in_proj_qkv", ("delta_qkv", "embd"), "turns_qkv"),
    "attn_gate": Part("linear_attn.in_proj_z", ("delta_v", "embd"), "turns_v"),
    "ssm_conv1d": Part("linear_attn.conv1d", ("delta_qkv", "conv"), "turns_qkv", ("delta_qkv", "one", "conv")),
    "ssm_dt.bias": replace(_QWEN3NEXT_DELTA["ssm_dt.bias"], order="turns_heads"),
    "ssm_a": replace(_QWEN3NEXT_DELTA["ssm_a"], order="turns_heads"),
    "ssm_beta": Part("linear_attn.in_proj_b", ("v_heads", "embd"), "turns_heads"),
    "ssm_alpha": Part("linear_attn.in_proj_a", ("v_heads", "embd"), "turns_heads"),
    "ssm_norm": _QWEN3NEXT_DELTA["ssm_norm"],
    "ssm_out": replace(_QWEN3NEXT_DELTA["ssm_out"], columns="turns_v"),
}


def _delta_layer(delta: Parts, feed_forward: Parts) -> Parts:
    attends: LayerCondition = is_attention_layer
    return {**_DELTA_NORMS, **where(_GATED_ATTENTION, attends), **where(delta, is_recurrent_layer), **feed_forward}


def delta_sizes(config: Config) -> dict[str, int]:
    """Return the dimensions of a gated delta net (arXiv 2412.06464) and of gated attention."""
    k_heads, v_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    keys, values = k_heads * config["linear_key_head_dim"], v_heads * config["linear_value_head_dim"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "k_heads": k_heads,
        "v_heads": v_heads,
        "2v_heads": 2 * v_heads,
        "v_heads/k_heads": v_heads // k_heads,
        "delta_head": config["linear_value_head_dim"],
        "delta_k": keys,
        "delta_v": values,
        "delta_qkv": 2 * keys + values,
        "delta_qkvz": 2 * keys + 2 * values,
        "conv": config["linear_conv_kernel_dim"],
        "2q": 2 * head * config["num_attention_heads"],
    }


def sparse_delta_sizes(config: Config) -> dict[str, int]:
    """Return the dimensions of a model without dense feed-forward blocks."""
    return {**delta_sizes(config), "ff": 0}


def delta_keys(config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return the keys of a delta net."""
    numbers = {
        "ssm.conv_kernel": sizes["conv"],
        "ssm.state_size": sizes["delta_head"],
        "ssm.group_count": sizes["k_heads"],
        "ssm.time_step_rank": sizes["v_heads"],
        "ssm.inner_size": sizes["delta_v"],
        "full_attention_interval": config["full_attention_interval"],
    }
    recurrent = [is_recurrent_layer(config, i) for i in range(sizes["layers"])]
    return {**counts(numbers), "attention.recurrent_layers": kv(recurrent, GGUFValueType.ARRAY, GGUFValueType.BOOL)}


_SECTIONS = [11, 11, 10]  # of the rotated channels by axis of an image: the class's default


def qwen35_keys(config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return Qwen 3.5's keys."""
    return {**delta_keys(config, sizes), **section_keys(config, _SECTIONS)}


def key_head_dim(config: Config) -> int:
    """Return the width of keys in a delta net, which llama.cpp demands of values too."""
    return int(config["linear_key_head_dim"])


_DELTA_DEFAULTS = {
    **RMS, "head_dim": 256, "partial_rotary_factor": 0.25, "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
_DELTA_FIXED = {"attention_bias": False, "linear_value_head_dim": key_head_dim}
_SPARSE: Parts = {**EXPERTS, **SHARED_EXPERT}
_QWEN3NEXT = Family(
    classes=("Qwen3NextForCausalLM",),
    architecture="qwen3next",
    layer=_delta_layer(_QWEN3NEXT_DELTA, _SPARSE),
    outside=shifted(OUTSIDE),
    defaults={
        **_DELTA_DEFAULTS, "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "norm_topk_prob": True,
    },
    keys=(EXPERT_FF_KEY, SHARED_FF_KEY),
    fixed={**_DELTA_FIXED, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    rope_kinds=("default",),
    writes_rope_dim=True,
    sizes=delta_sizes,
    more_keys=delta_keys,
    extra_layers=True,
    example="Qwen3-Next 80B-A3B",
)  # fmt: skip
_QWEN35_MOE = replace(
    _QWEN3NEXT,
    classes=("Qwen3_5MoeForCausalLM",),
    architecture="qwen35moe",
    layer=_delta_layer(_QWEN35_DELTA, _SPARSE),
    defaults={**_QWEN3NEXT.defaults, "num_experts": 256, "num_experts_per_tok": 8},
    sizes=sparse_delta_sizes,
    more_keys=qwen35_keys,
    example="Qwen 3.5 35B-A3B",
)

# --- the table ------------------------------------------------------------------------------------------------

HYBRID = (
    _LFM2,
    replace(
        _LFM2,
        classes=("Lfm2MoeForCausalLM",),
        architecture="lfm2moe",
        layer={
            **_LFM2_MIXERS, **where(_LFM2_FFN, is_dense_layer), **where(_LFM2_EXPERTS, is_sparse_layer),
        },
        defaults={
            "norm_eps": 1e-5, "rope_theta": 1e6, "conv_L_cache": 3, "num_experts": 32, "num_experts_per_tok": 4,
            "moe_intermediate_size": 1792, "first_k_dense_replace": 2, "use_expert_bias": True,
            "routed_scaling_factor": 1.0, "norm_topk_prob": True,
        },
        keys=(EXPERT_FF_KEY,),
        fixed={
            "conv_bias": False, "use_expert_bias": True, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
        },
        more_keys=lfm2_moe_keys,
        example="LFM2 8B-A1B",
    ),
    _QWEN3NEXT,
    Family(
        classes=("Qwen3_5ForCausalLM",),
        architecture="qwen35",
        layer=_delta_layer(_QWEN35_DELTA, FFN),
        outside=shifted(OUTSIDE),
        defaults={**UNTIED, **_DELTA_DEFAULTS},
        fixed=_DELTA_FIXED,
        rope_kinds=("default",),
        writes_rope_dim=True,
        sizes=delta_sizes,
        more_keys=qwen35_keys,
        extra_layers=True,
        example="Qwen 3.5 0.8B to 27B",
    ),
    _QWEN35_MOE,
    *MAMBA2,
)  # fmt: skip
