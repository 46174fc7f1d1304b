"""Model families as tables: the architecture of each class, and the source of each tensor and key.

A family states its differences from the defaults. Checkpoint names appear only in this package: everything else uses
GGUF names.

Sources: transformers' configuration and modeling files for the checkpoint side (defaults of config.json, names), and
llama.cpp ``src/models/*.cpp`` for what each architecture loads and computes: a bias, rope kind or setting that it does
not support is an error. llama.cpp's ``conversion/*.py`` determines the names of keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from importlib import resources

from gguf import GGUFValueType
from gguf.constants import ExpertGatingFuncType
from gguf.gguf_writer import GGUFValue

from ...errors import UnsupportedError
from ...records import kv
from .family import (
    Config,
    Family,
    Key,
    Part,
    Parts,
    Sizes,
    Window,
    always,
    biased,
    flag,
    no_sizes,
    shifted,
    unless,
    where,
    without,
)
from .hybrid import HYBRID
from .parts import (
    ALL_ATTENTION,
    ALL_FFN,
    ATTENTION,
    ATTENTION_NORM,
    EXPERT_FF_KEY,
    EXPERTS,
    FFN,
    FFN_NORM,
    LAYER,
    LAYER_NORM,
    LLAMA_LAYER,
    LLAMA_ROPE_KINDS,
    OUTSIDE,
    POST_NORMS,
    QK_NORMS,
    QKV,
    RMS,
    ROTATED_ATTENTION,
    SANDWICH_NORMS,
    SHARED_EXPERT,
    SHARED_FF_KEY,
    TANH_GELU,
    UNTIED,
    WIDE_QK_NORMS,
    stacked_forms,
)
from .recent import RECENT, is_dense_layer, is_sparse_layer

# --- settings -------------------------------------------------------------------------------------------------

_GEMMA_KEYS = (
    Key("attn_logit_softcapping", "attn_logit_softcapping"),
    Key("final_logit_softcapping", "final_logit_softcapping"),
)
_GRANITE_KEYS = (
    Key("attention.scale", "attention_multiplier"),
    Key("embedding_scale", "embedding_multiplier"),
    Key("residual_scale", "residual_multiplier"),
    Key("logit_scale", "logits_scaling"),
)
_GRANITE_DEFAULTS = {
    **RMS,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
_PARALLEL_KEY = Key("use_parallel_residual", "use_parallel_residual", GGUFValueType.BOOL)
_LOGIT_SCALE_KEY = Key("logit_scale", "logit_scale")
_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_CAUSAL = {"use_bidirectional_attention": False}


def phi3_keys(config: Config, _sizes: Sizes) -> dict[str, GGUFValue]:
    """Return Phi 3's window, 0 where it has none (llama.cpp knows Phi 4 by that), and its first context."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return {
        "attention.sliding_window": kv(config.get("sliding_window") or 0, GGUFValueType.UINT32),
        "rope.scaling.original_context_length": kv(original or PHI3_CONTEXT, GGUFValueType.UINT32),
    }


PHI3_CONTEXT = 4096  # transformers' default


def unscaled_rope(_config: Config, _sizes: Sizes) -> dict[str, GGUFValue]:
    """Return the key that says that rope is not scaled."""
    return {"rope.scaling.type": kv("none", GGUFValueType.STRING)}


def command_r_keys(config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return Command R's keys; the context it was trained for is its ``model_max_length``, where it has one."""
    n_ctx = config.get("model_max_length") or sizes["ctx"]
    return {**unscaled_rope(config, sizes), "context_length": kv(n_ctx, GGUFValueType.UINT32)}


def attention_scale(n_layers_of_27b: int) -> Callable[[Config], float]:
    """Return what gives the ``query_pre_attn_scalar`` that llama.cpp computes with (gemma2.cpp, gemma3.cpp)."""

    def scalar(config: Config) -> float:
        if config["num_hidden_layers"] == n_layers_of_27b:
            return float(config["hidden_size"] // config["num_attention_heads"])
        return float(config["head_dim"])

    return scalar


def every_fourth(config: Config) -> list[int]:
    """Return SmolLM3's layers with (1) and without (0) rope as llama.cpp has them (smollm3.cpp)."""
    return [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]


def has_many_layers(config: Config) -> bool:
    """Return whether llama.cpp expects q and k norms in a Command-R model (command-r.cpp)."""
    return int(config["num_hidden_layers"]) >= 64


# --- families -------------------------------------------------------------------------------------------------

_LLAMA = Family(
    classes=("LlamaForCausalLM", "LLaMAForCausalLM", "IQuestCoderForCausalLM"),
    architecture="llama",
    layer=biased(biased(LLAMA_LAYER, ALL_ATTENTION, flag("attention_bias")), ALL_FFN, flag("mlp_bias")),
    outside=OUTSIDE,
    defaults={**RMS, "attention_bias": False, "mlp_bias": False},
    rope_kinds=LLAMA_ROPE_KINDS,
    writes_rope_dim=True,
    writes_vocab_size=True,
    example="Llama 2 and 3, Yi, DeepSeek-LLM, TinyLlama, SmolLM 1 and 2",
)
_QWEN2_MOE_LAYER: Parts = {
    **ATTENTION_NORM,
    **biased(ATTENTION, QKV, flag("qkv_bias")),
    **FFN_NORM,
    **EXPERTS,
    **SHARED_EXPERT,
}
_GRANITE_BLOCK = "block_sparse_moe"
_GRANITE_EXPERTS: Parts = {
    "ffn_gate_inp": Part(
        f"{_GRANITE_BLOCK}.router.layer", ("experts", "embd"),
        also=(Part(f"{_GRANITE_BLOCK}.router", ("experts", "embd")),),
    ),
    "ffn_gate_exps": Part(
        f"{_GRANITE_BLOCK}.input_linear", ("experts", "ff_exp", "embd"), "first_half_exps",
        ("experts", "2ff_exp", "embd"), also=stacked_forms("gate", _GRANITE_BLOCK, _GRANITE_BLOCK),
    ),
    "ffn_up_exps": Part(
        f"{_GRANITE_BLOCK}.input_linear", ("experts", "ff_exp", "embd"), "second_half_exps",
        ("experts", "2ff_exp", "embd"), also=stacked_forms("up", _GRANITE_BLOCK, _GRANITE_BLOCK),
    ),
    "ffn_down_exps": Part(
        f"{_GRANITE_BLOCK}.output_linear", ("experts", "embd", "ff_exp"),
        also=stacked_forms("down", _GRANITE_BLOCK, _GRANITE_BLOCK),
    ),
}  # fmt: skip
_GRANITE_SHARED: Parts = {
    "ffn_gate_shexp": Part(
        "shared_mlp.input_linear", ("ff_shexp", "embd"), "first_half_shexp", ("2ff_shexp", "embd"),
        when=flag("shared_intermediate_size"),
    ),
    "ffn_up_shexp": Part(
        "shared_mlp.input_linear", ("ff_shexp", "embd"), "second_half_shexp", ("2ff_shexp", "embd"),
        when=flag("shared_intermediate_size"),
    ),
    "ffn_down_shexp": Part(
        "shared_mlp.output_linear", ("embd", "ff_shexp"), when=flag("shared_intermediate_size")
    ),
}  # fmt: skip
_FUSED_QKV = ("qkv", "embd")
_INTERNLM2_LAYER: Parts = {
    "attn_norm": Part("attention_norm", ("embd",)),
    "attn_q": Part("attention.wqkv", ("q", "embd"), "grouped_q", _FUSED_QKV),
    "attn_k": Part("attention.wqkv", ("kv", "embd"), "grouped_k", _FUSED_QKV),
    "attn_v": Part("attention.wqkv", ("kv", "embd"), "grouped_v", _FUSED_QKV),
    "attn_output": Part("attention.wo", ("embd", "q")),
    "ffn_norm": Part("ffn_norm", ("embd",)),
    "ffn_gate": Part("feed_forward.w1", ("ff", "embd")),
    "ffn_up": Part("feed_forward.w3", ("ff", "embd")),
    "ffn_down": Part("feed_forward.w2", ("embd", "ff")),
}
_GPT2_LAYER: Parts = {
    "attn_norm": Part("ln_1", ("embd",), bias=always),
    "attn_qkv": Part("attn.c_attn", _FUSED_QKV, transposed=True, bias=always),
    "attn_output": Part("attn.c_proj", ("embd", "q"), transposed=True, bias=always),
    "ffn_norm": Part("ln_2", ("embd",), bias=always),
    "ffn_up": Part("mlp.c_fc", ("ff", "embd"), transposed=True, bias=always),
    "ffn_down": Part("mlp.c_proj", ("embd", "ff"), transposed=True, bias=always),
}
_NEOX_LAYER: Parts = {
    "attn_norm": Part("input_layernorm", ("embd",), bias=always),
    "attn_qkv": Part("attention.query_key_value", _FUSED_QKV, "by_head_qkv", bias=flag("attention_bias")),
    "attn_output": Part("attention.dense", ("embd", "q"), bias=flag("attention_bias")),
    "ffn_norm": Part("post_attention_layernorm", ("embd",), bias=always),
    "ffn_up": Part("mlp.dense_h_to_4h", ("ff", "embd"), bias=always),
    "ffn_down": Part("mlp.dense_4h_to_h", ("embd", "ff"), bias=always),
}
_PHI2_LAYER: Parts = {
    "attn_norm": Part("input_layernorm", ("embd",), bias=always),
    **biased(ATTENTION, QKV, always),
    "attn_output": Part("self_attn.dense", ("embd", "q"), bias=always),
    "ffn_up": Part("mlp.fc1", ("ff", "embd"), bias=always),
    "ffn_down": Part("mlp.fc2", ("embd", "ff"), bias=always),
}
_PHI3_LAYER: Parts = {
    **ATTENTION_NORM,
    "attn_qkv": Part("self_attn.qkv_proj", _FUSED_QKV),
    "attn_output": ATTENTION["attn_output"],
    **FFN_NORM,
    "ffn_up": Part("mlp.gate_up_proj", ("2ff", "embd")),
    "ffn_down": FFN["ffn_down"],
}
_STABLELM_LAYER: Parts = {
    **biased(ATTENTION_NORM, "attn_norm", always),
    **biased(ATTENTION, QKV, flag("use_qkv_bias")),
    "attn_q_norm": Part("self_attn.q_layernorm.norms.{e}", ("heads", "head"), when=flag("qk_layernorm")),
    "attn_k_norm": Part("self_attn.k_layernorm.norms.{e}", ("kv_heads", "head"), when=flag("qk_layernorm")),
    "ffn_norm": replace(FFN_NORM["ffn_norm"], bias=always, when=unless("use_parallel_residual")),
    **FFN,
}
_STARCODER2_LAYER: Parts = {
    **biased(ATTENTION_NORM, "attn_norm", always),
    **biased(ATTENTION, ALL_ATTENTION, flag("use_bias")),
    **biased(FFN_NORM, "ffn_norm", always),
    "ffn_up": Part("mlp.c_fc", ("ff", "embd"), bias=flag("use_bias")),
    "ffn_down": Part("mlp.c_proj", ("embd", "ff"), bias=flag("use_bias")),
}
_BIASED_OUTSIDE = biased(OUTSIDE, "output_norm", always)

# --- multi-head latent attention: DeepSeek 2 and 3 --------------------------------------------------------------

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
        "ff_shexp": (config.get("n_shared_experts") or 0) * config["moe_intermediate_size"],
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
        "leading_dense_block_count": sum(is_dense_layer(config, i) for i in range(sizes["layers"])),
        "expert_shared_count": config.get("n_shared_experts") or 0,
        "expert_group_count": config.get("n_group"),
        "expert_group_used_count": config.get("topk_group"),
    }
    keys = {name: kv(value, GGUFValueType.UINT32) for name, value in numbers.items() if value is not None}
    gating = "SIGMOID" if config["scoring_func"] == "sigmoid" else "SOFTMAX"
    keys["expert_gating_func"] = kv(int(ExpertGatingFuncType[gating]), GGUFValueType.UINT32)
    return keys


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
                "ffn_gate_shexp": Part("mlp.shared_experts.gate_proj", ("ff_shexp", "embd")),
                "ffn_up_shexp": Part("mlp.shared_experts.up_proj", ("ff_shexp", "embd")),
                "ffn_down_shexp": Part("mlp.shared_experts.down_proj", ("embd", "ff_shexp")),
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

# --- state spaces: Mamba, and Granite 4 with attention between ---------------------------------------------------

_MAMBA_LAYER: Parts = {
    "attn_norm": Part("norm", ("embd",)),
    "ssm_in": Part("mixer.in_proj", ("2ff", "embd"), bias=flag("use_bias")),
    "ssm_conv1d": Part("mixer.conv1d", ("ff", "conv"), stored=("ff", "one", "conv"), bias=flag("use_conv_bias")),
    "ssm_x": Part("mixer.x_proj", ("x", "ff")),
    "ssm_dt": Part("mixer.dt_proj", ("ff", "dt"), bias=always),
    "ssm_a": Part("mixer.A_log", ("ff", "state"), change="minus_exp", suffix="", bare=True),
    "ssm_d": Part("mixer.D", ("ff",), suffix="", bare=True),
    "ssm_out": Part("mixer.out_proj", ("embd", "ff"), bias=flag("use_bias")),
}
_UNLIMITED_CONTEXT = 1 << 20  # what llama.cpp's converter writes for models without positions


def mamba_sizes(config: Config) -> dict[str, int]:
    """Return Mamba's dimensions (arXiv 2312.00752, section 3)."""
    rank, n_embd = config["time_step_rank"], config["hidden_size"]
    dt = rank if type(rank) is int else -(-n_embd // 16)  # "auto"
    state = config["state_size"]
    return {"conv": config["conv_kernel"], "state": state, "dt": dt, "x": dt + 2 * state}


def mamba_keys(_config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return Mamba's keys; it has neither attention nor a feed-forward block."""
    numbers = {
        "attention.head_count": 0,
        "feed_forward_length": 0,
        "ssm.conv_kernel": sizes["conv"],
        "ssm.inner_size": sizes["ff"],
        "ssm.state_size": sizes["state"],
        "ssm.time_step_rank": sizes["dt"],
    }
    keys = {name: kv(value, GGUFValueType.UINT32) for name, value in numbers.items()}
    return {**keys, "ssm.dt_b_c_rms": kv(False, GGUFValueType.BOOL)}


def twice_the_width(config: Config) -> int:
    """Return the inner width that llama.cpp demands of Mamba (mamba.cpp)."""
    return 2 * int(config["hidden_size"])


def inner_width(config: Config) -> int | None:
    """Return Mamba's inner width as its config class computes it."""
    width = config.get("hidden_size")
    return int(config.get("expand") or 2) * width if isinstance(width, int) else None


def is_mamba_layer(config: Config, layer: int) -> bool:
    """Return whether a layer of a Granite 4 model is a state space; the others attend."""
    kinds = config.get("layer_types") or config.get("layers_block_type")
    return isinstance(kinds, list) and layer < len(kinds) and kinds[layer] in ("mamba", "linear_attention")


def is_attention_layer(config: Config, layer: int) -> bool:
    """Return whether a layer of a Granite 4 model attends."""
    return not is_mamba_layer(config, layer)


def has_mamba_layers(config: Config) -> bool:
    """Return whether a Granite 4 model has state spaces at all."""
    kinds = config.get("layer_types") or config.get("layers_block_type")
    return isinstance(kinds, list) and any(is_mamba_layer(config, i) for i in range(len(kinds)))


def granite4_sizes(config: Config) -> dict[str, int]:
    """Return the dimensions of Mamba 2 as Granite 4 names them (arXiv 2405.21060)."""
    inner = config["mamba_expand"] * config["hidden_size"]
    heads, groups, state = config["mamba_n_heads"], config["mamba_n_groups"], config["mamba_d_state"]
    return {
        "inner": inner,
        "groups": groups,
        "inner/groups": inner // groups,
        "ssm_heads": heads,
        "state": state,
        "conv": config["mamba_d_conv"],
        "conv_width": inner + 2 * groups * state,
        "ssm_in": 2 * inner + 2 * groups * state + heads,
    }


def granite4_keys(config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return the keys of a Granite 4 model; llama.cpp knows a state space by having no key/value heads."""
    keys = {"rope.scaling.finetuned": kv(config.get("position_embedding_type") == "rope", GGUFValueType.BOOL)}
    if not sizes["experts"]:
        keys["feed_forward_length"] = kv(sizes["ff_shexp"], GGUFValueType.UINT32)
    if not has_mamba_layers(config):
        return keys
    numbers = {
        "ssm.conv_kernel": sizes["conv"],
        "ssm.state_size": sizes["state"],
        "ssm.group_count": sizes["groups"],
        "ssm.inner_size": sizes["inner"],
        "ssm.time_step_rank": sizes["ssm_heads"],
    }
    kv_heads = [0 if is_mamba_layer(config, i) else sizes["kv_heads"] for i in range(sizes["layers"])]
    keys |= {name: kv(value, GGUFValueType.UINT32) for name, value in numbers.items()}
    keys["attention.head_count_kv"] = kv(kv_heads, GGUFValueType.ARRAY, GGUFValueType.INT32)
    return keys


_MAMBA2_PARTS: Parts = {
    "ssm_in": Part("mamba.in_proj", ("ssm_in", "embd")),
    "ssm_conv1d": Part(
        "mamba.conv1d", ("conv_width", "conv"), stored=("conv_width", "one", "conv"), bias=flag("mamba_conv_bias")
    ),
    "ssm_dt.bias": Part("mamba.dt_bias", ("ssm_heads",), suffix=""),
    "ssm_a": Part(
        "mamba.A_log", ("ssm_heads", "one"), stored=("ssm_heads",), change="minus_exp", suffix="", bare=True
    ),
    "ssm_d": Part("mamba.D", ("ssm_heads", "one"), stored=("ssm_heads",), suffix="", bare=True),
    "ssm_norm": Part("mamba.norm", ("groups", "inner/groups"), stored=("inner",)),
    "ssm_out": Part("mamba.out_proj", ("embd", "inner")),
}  # fmt: skip
_HAS_EXPERTS, _HAS_NONE = flag("num_experts"), unless("num_experts")
_GRANITE4_LAYER: Parts = {
    **ATTENTION_NORM,
    **where(biased(ROTATED_ATTENTION, ALL_ATTENTION, flag("attention_bias")), is_attention_layer),
    **where(_MAMBA2_PARTS, is_mamba_layer),
    **FFN_NORM,
    **{role: replace(part, when=_HAS_EXPERTS) for role, part in {**_GRANITE_EXPERTS, **_GRANITE_SHARED}.items()},
    # Without experts, the shared expert is the dense feed-forward block.
    "ffn_gate": replace(_GRANITE_SHARED["ffn_gate_shexp"], when=_HAS_NONE),
    "ffn_up": replace(_GRANITE_SHARED["ffn_up_shexp"], when=_HAS_NONE),
    "ffn_down": replace(_GRANITE_SHARED["ffn_down_shexp"], when=_HAS_NONE),
}
_GRANITE4 = Family(
    classes=("GraniteMoeHybridForCausalLM",),
    architecture="granitehybrid",
    variant=has_mamba_layers,
    layer=_GRANITE4_LAYER,
    outside=OUTSIDE,
    defaults={
        **_GRANITE_DEFAULTS, "num_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1024,
        "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_head": 64, "mamba_d_conv": 4,
        "mamba_expand": 2, "mamba_conv_bias": True,
    },
    keys=(
        *_GRANITE_KEYS,
        Key("expert_shared_feed_forward_length", "shared_intermediate_size", GGUFValueType.UINT32),
    ),
    fixed={"mamba_proj_bias": False, "mamba_expand": 2},
    fixed_head_dim=True,
    rope_kinds=("default",),
    writes_rope_dim=True,
    writes_vocab_size=True,
    sizes=granite4_sizes,
    more_keys=granite4_keys,
    example="Granite 4 H",
)  # fmt: skip

# --- the table -----------------------------------------------------------------------------------------------

FAMILIES = (
    _LLAMA,
    replace(
        _LLAMA,
        classes=("MistralForCausalLM",),
        layer=LLAMA_LAYER,
        defaults={**RMS, "sliding_window": 4096},
        window=Window(),
        example="Mistral 7B",
    ),
    replace(
        _LLAMA,
        classes=("MixtralForCausalLM",),
        layer={
            **ATTENTION_NORM,
            **ROTATED_ATTENTION,
            **FFN_NORM,
            "ffn_gate_inp": Part(
                "block_sparse_moe.gate", ("experts", "embd"), also=(Part("mlp.gate", ("experts", "embd")),)
            ),
            "ffn_gate_exps": Part(
                "block_sparse_moe.experts.{e}.w1", ("experts", "ff", "embd"),
                also=stacked_forms("gate", mlx="block_sparse_moe"),
            ),
            "ffn_up_exps": Part(
                "block_sparse_moe.experts.{e}.w3", ("experts", "ff", "embd"),
                also=stacked_forms("up", mlx="block_sparse_moe"),
            ),
            "ffn_down_exps": Part(
                "block_sparse_moe.experts.{e}.w2", ("experts", "embd", "ff"),
                also=stacked_forms("down", mlx="block_sparse_moe"),
            ),
        },
        defaults={**UNTIED, "norm_eps": 1e-5, "rope_theta": 1e6, "num_experts": 8, "num_experts_per_tok": 2},
        window=Window(),
        example="Mixtral 8x7B",
    ),
    Family(
        classes=("Qwen2ForCausalLM",),
        architecture="qwen2",
        layer=biased(LAYER, QKV, always),
        outside=OUTSIDE,
        defaults={**RMS, "sliding_window": 4096, "max_window_layers": 28},
        fixed_head_dim=True,
        window=Window("use_sliding_window"),
        example="Qwen 2 and 2.5",
    ),
    Family(
        classes=("Qwen3ForCausalLM",),
        architecture="qwen3",
        layer={**ATTENTION_NORM, **biased(ATTENTION, QKV, flag("attention_bias")), **QK_NORMS, **FFN_NORM, **FFN},
        outside=OUTSIDE,
        defaults={**RMS, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
        window=Window("use_sliding_window"),
        example="Qwen 3",
    ),
    Family(
        classes=("Qwen2MoeForCausalLM",),
        architecture="qwen2moe",
        layer=_QWEN2_MOE_LAYER,
        outside=OUTSIDE,
        defaults={
            **RMS, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "qkv_bias": True,
            "shared_expert_intermediate_size": 5632, "sliding_window": 4096, "max_window_layers": 28,
        },
        keys=(EXPERT_FF_KEY, SHARED_FF_KEY),
        fixed={"norm_topk_prob": False, **_ALL_SPARSE},
        fixed_head_dim=True,
        window=Window("use_sliding_window"),
        output="required",
        example="Qwen 1.5 MoE, Qwen 2 57B-A14B",
    ),
    Family(
        classes=("Qwen3MoeForCausalLM",),
        architecture="qwen3moe",
        layer={**ATTENTION_NORM, **biased(ATTENTION, QKV, flag("attention_bias")), **QK_NORMS, **FFN_NORM, **EXPERTS},
        outside=OUTSIDE,
        defaults={
            **RMS, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False,
            "sliding_window": 4096, "max_window_layers": 28,
        },
        keys=(EXPERT_FF_KEY,),
        fixed={"norm_topk_prob": True, **_ALL_SPARSE},
        window=Window("use_sliding_window"),
        example="Qwen 3 30B-A3B",
    ),
    Family(
        classes=("GemmaForCausalLM",),
        architecture="gemma",
        layer=shifted(LAYER),
        outside=shifted(OUTSIDE),
        defaults={"norm_eps": 1e-6, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"},
        activations=TANH_GELU,
        fixed={"attention_bias": False, **_CAUSAL},
        rope_kinds=("default",),
        output="tied",
        example="Gemma 2B and 7B",
    ),
    Family(
        classes=("Gemma2ForCausalLM",),
        architecture="gemma2",
        layer=shifted({**ATTENTION_NORM, **ATTENTION, **SANDWICH_NORMS, **FFN}),
        outside=shifted(OUTSIDE),
        defaults={
            "norm_eps": 1e-6, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
            "sliding_window": 4096, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
        },
        activations=TANH_GELU,
        keys=_GEMMA_KEYS,
        fixed={"attention_bias": False, "query_pre_attn_scalar": attention_scale(46), **_CAUSAL},
        rope_kinds=("default",),
        window=Window(period=2),
        output="tied",
        example="Gemma 2",
    ),
    Family(
        classes=("Gemma3ForCausalLM",),
        architecture="gemma3",
        layer=shifted({**ATTENTION_NORM, **ATTENTION, **QK_NORMS, **SANDWICH_NORMS, **FFN}),
        outside=shifted(OUTSIDE),
        defaults={
            "norm_eps": 1e-6, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
            "sliding_window": 4096, "num_attention_heads": 8, "num_key_value_heads": 4, "rope_theta": 1e6,
            "rope_local_base_freq": 1e4, "max_position_embeddings": 131072, "vocab_size": 262208,
        },
        activations=TANH_GELU,
        keys=_GEMMA_KEYS,
        fixed={
            "attention_bias": False, "attn_logit_softcapping": None, "query_pre_attn_scalar": attention_scale(62),
            **_CAUSAL,
        },
        rope_kinds=("default", "linear"),
        has_local_theta=True,
        window=Window(period=6),
        example="Gemma 3",
    ),
    Family(
        classes=("PhiForCausalLM",),
        architecture="phi2",
        layer=_PHI2_LAYER,
        outside={
            **OUTSIDE,
            "output_norm": Part("model.final_layernorm", ("embd",), bias=always),
            "output": replace(OUTSIDE["output"], bias=always),
        },
        defaults={**UNTIED, **LAYER_NORM, "partial_rotary_factor": 0.5, "hidden_act": "gelu_new"},
        activations=TANH_GELU,
        norm="layer",
        fixed={"qk_layernorm": False},
        fixed_head_dim=True,
        rope_kinds=("default",),
        writes_rope_dim=True,
        output="required",
        example="Phi 1.5 and 2",
    ),
    Family(
        classes=("Phi3ForCausalLM",),
        architecture="phi3",
        layer=_PHI3_LAYER,
        outside=OUTSIDE,
        defaults={**UNTIED, "norm_eps": 1e-5, "original_max_position_embeddings": PHI3_CONTEXT},
        fixed_head_dim=True,
        rope_kinds=("default", "longrope"),
        window=Window(),
        writes_rope_dim=True,
        more_keys=phi3_keys,
        example="Phi 3, 3.5 and 4",
    ),
    Family(
        classes=("GPT2LMHeadModel",),
        architecture="gpt2",
        layer=_GPT2_LAYER,
        outside={
            "token_embd": Part("transformer.wte", ("vocab", "embd")),
            "position_embd": Part("transformer.wpe", ("ctx", "embd")),
            "output_norm": Part("transformer.ln_f", ("embd",), bias=always),
            "output": OUTSIDE["output"],
        },
        prefix="transformer.",
        layer_prefix="transformer.h.{i}.",
        defaults={**LAYER_NORM, "hidden_act": "gelu_new", "max_position_embeddings": 1024},
        activations=TANH_GELU,
        norm="layer",
        fixed={
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
        },
        fixed_head_dim=True,
        rope_kinds=(),
        writes_kv_heads=False,
        ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
        example="GPT-2, DistilGPT-2",
    ),
    Family(
        classes=("GPTNeoXForCausalLM",),
        architecture="gptneox",
        layer=_NEOX_LAYER,
        outside={
            "token_embd": Part("gpt_neox.embed_in", ("vocab", "embd")),
            "output_norm": Part("gpt_neox.final_layer_norm", ("embd",), bias=always),
            "output": Part("embed_out", ("vocab", "embd"), also=(OUTSIDE["output"],)),
        },
        prefix="gpt_neox.",
        layer_prefix="gpt_neox.layers.{i}.",
        defaults={
            **UNTIED, **LAYER_NORM, "hidden_act": "gelu", "partial_rotary_factor": 0.25, "attention_bias": True,
            "use_parallel_residual": True,
        },
        activations=TANH_GELU,
        keys=(_PARALLEL_KEY,),
        norm="layer",
        fixed={"attention_bias": True},
        fixed_head_dim=True,
        rope_kinds=("default",),
        writes_rope_dim=True,
        writes_kv_heads=False,
        output="required",
        ignored=(r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
        example="GPT-NeoX, Pythia",
    ),
    Family(
        classes=("StableLmForCausalLM", "StableLMEpochForCausalLM"),
        architecture="stablelm",
        layer=_STABLELM_LAYER,
        outside=_BIASED_OUTSIDE,
        defaults={**UNTIED, **LAYER_NORM, "partial_rotary_factor": 0.25, "use_parallel_residual": False},
        keys=(_PARALLEL_KEY,),
        norm="layer",
        fixed_head_dim=True,
        rope_kinds=("default",),
        writes_rope_dim=True,
        output="required",
        example="StableLM 2",
    ),
    Family(
        classes=("OlmoForCausalLM",),
        architecture="olmo",
        layer={**ROTATED_ATTENTION, **FFN},
        outside=without(OUTSIDE, "output_norm"),
        defaults={**UNTIED, "norm_eps": 1e-5},
        keys=(Key("attention.clamp_kqv", "clip_qkv"),),
        norm="layer",
        fixed={"attention_bias": False},
        fixed_head_dim=True,
        rope_kinds=("default",),
        example="OLMo 1",
    ),
    Family(
        classes=("Olmo2ForCausalLM",),
        architecture="olmo2",
        layer={**ATTENTION, **WIDE_QK_NORMS, **POST_NORMS, **FFN},
        outside=OUTSIDE,
        defaults={**UNTIED, "norm_eps": 1e-5},
        fixed={"attention_bias": False},
        fixed_head_dim=True,
        output="required",
        example="OLMo 2",
    ),
    Family(
        classes=("Olmo3ForCausalLM",),
        architecture="olmo2",
        layer={**ATTENTION, **WIDE_QK_NORMS, **POST_NORMS, **FFN},
        outside=OUTSIDE,
        defaults={**UNTIED, "norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 5e5},
        fixed={"attention_bias": False},
        fixed_head_dim=True,
        window=Window(period=4, lists_layers=True),
        output="required",
        example="OLMo 3",
    ),
    Family(
        classes=("OlmoeForCausalLM",),
        architecture="olmoe",
        layer={**ATTENTION_NORM, **ATTENTION, **WIDE_QK_NORMS, **FFN_NORM, **{
            role: replace(part, shape=tuple("ff" if dim == "ff_exp" else dim for dim in part.shape))
            for role, part in EXPERTS.items()
        }},
        outside=OUTSIDE,
        defaults={**UNTIED, "norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
        fixed={"attention_bias": False, "norm_topk_prob": False, "clip_qkv": None},
        fixed_head_dim=True,
        output="required",
        example="OLMoE 1B-7B",
    ),
    Family(
        classes=("GraniteForCausalLM",),
        architecture="granite",
        layer=biased(biased(LLAMA_LAYER, ALL_ATTENTION, flag("attention_bias")), ALL_FFN, flag("mlp_bias")),
        outside=OUTSIDE,
        defaults=_GRANITE_DEFAULTS,
        keys=_GRANITE_KEYS,
        fixed_head_dim=True,
        rope_kinds=LLAMA_ROPE_KINDS,
        writes_rope_dim=True,
        writes_vocab_size=True,
        example="Granite 3",
    ),
    Family(
        classes=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        architecture="granitemoe",
        layer={
            **ATTENTION_NORM, **biased(ROTATED_ATTENTION, ALL_ATTENTION, flag("attention_bias")), **FFN_NORM,
            **_GRANITE_EXPERTS, **_GRANITE_SHARED,
        },
        outside=OUTSIDE,
        defaults={**_GRANITE_DEFAULTS, "num_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 0},
        keys=(
            *_GRANITE_KEYS,
            Key("expert_shared_feed_forward_length", "shared_intermediate_size", GGUFValueType.UINT32),
        ),
        fixed_head_dim=True,
        rope_kinds=LLAMA_ROPE_KINDS,
        writes_rope_dim=True,
        writes_vocab_size=True,
        example="Granite 3 MoE",
    ),
    Family(
        classes=("CohereForCausalLM",),
        architecture="command-r",
        layer={
            **ATTENTION_NORM,
            **ATTENTION,
            "attn_q_norm": Part("self_attn.q_norm", ("heads", "head"), when=flag("use_qk_norm")),
            "attn_k_norm": Part("self_attn.k_norm", ("kv_heads", "head"), when=flag("use_qk_norm")),
            **FFN,
        },
        outside=OUTSIDE,
        defaults={**LAYER_NORM, "logit_scale": 0.0625, "use_qk_norm": False, "rope_theta": 5e5},
        keys=(_LOGIT_SCALE_KEY,),
        norm="layer",
        fixed={"attention_bias": False, "use_qk_norm": has_many_layers},
        fixed_head_dim=True,
        rope_kinds=("default",),
        output="tied",
        more_keys=command_r_keys,
        example="Command R, Aya",
    ),
    Family(
        classes=("Cohere2ForCausalLM",),
        architecture="cohere2",
        layer={**ATTENTION_NORM, **ATTENTION, **FFN},
        outside=OUTSIDE,
        defaults={**LAYER_NORM, "logit_scale": 0.0625, "sliding_window": 4096},
        keys=(_LOGIT_SCALE_KEY,),
        norm="layer",
        fixed={"attention_bias": False, "use_qk_norm": False},
        fixed_head_dim=True,
        rope_kinds=("default",),
        window=Window(period=4),
        writes_rope_dim=True,
        writes_vocab_size=True,
        output="tied",
        more_keys=unscaled_rope,
        example="Command R7B",
    ),
    Family(
        classes=("InternLM2ForCausalLM",),
        architecture="internlm2",
        layer=_INTERNLM2_LAYER,
        outside={
            "token_embd": Part("model.tok_embeddings", ("vocab", "embd")),
            "output_norm": Part("model.norm", ("embd",)),
            "output": Part("output", ("vocab", "embd")),
        },
        defaults={**UNTIED, "norm_eps": 1e-6, "bias": False},
        fixed={"bias": False},
        fixed_head_dim=True,
        rope_kinds=("default", "linear"),
        output="required",
        example="InternLM 2 and 2.5",
    ),
    Family(
        classes=("SmolLM3ForCausalLM",),
        architecture="smollm3",
        layer=LLAMA_LAYER,
        outside=OUTSIDE,
        defaults={"norm_eps": 1e-6, "rope_theta": 2e6, "sliding_window": None},
        fixed={"attention_bias": False, "mlp_bias": False, "no_rope_layers": every_fourth},
        rope_kinds=("default", "linear", "yarn"),
        window=Window("use_sliding_window"),
        writes_rope_dim=True,
        writes_vocab_size=True,
        example="SmolLM3",
    ),
    Family(
        classes=("Starcoder2ForCausalLM",),
        architecture="starcoder2",
        layer=_STARCODER2_LAYER,
        outside=_BIASED_OUTSIDE,
        defaults={**LAYER_NORM, "hidden_act": "gelu_pytorch_tanh", "use_bias": True, "sliding_window": None},
        activations=TANH_GELU,
        norm="layer",
        fixed={"use_bias": True},
        fixed_head_dim=True,
        rope_kinds=("default", "linear", "yarn"),
        window=Window(),
        example="StarCoder 2",
    ),
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
    Family(
        classes=("MambaForCausalLM",),
        architecture="mamba",
        layer=_MAMBA_LAYER,
        outside={
            "token_embd": Part("backbone.embeddings", ("vocab", "embd")),
            "output_norm": Part("backbone.norm_f", ("embd",)),
            "output": OUTSIDE["output"],
        },
        prefix="backbone.",
        layer_prefix="backbone.layers.{i}.",
        defaults={
            "norm_eps": 1e-5, "num_attention_heads": 1, "max_position_embeddings": _UNLIMITED_CONTEXT,
            "intermediate_size": inner_width, "state_size": 16, "conv_kernel": 4,
            "time_step_rank": "auto", "use_bias": False, "use_conv_bias": True,
        },
        fixed={"use_bias": False, "use_conv_bias": True, "intermediate_size": twice_the_width},
        rope_kinds=(),
        writes_kv_heads=False,
        sizes=mamba_sizes,
        more_keys=mamba_keys,
        example="Mamba",
    ),
    _GRANITE4,
    replace(_GRANITE4, architecture="granitemoe", variant=_HAS_EXPERTS, sizes=no_sizes, example="Granite 4 Tiny"),
    replace(_GRANITE4, architecture="granite", variant=always, sizes=no_sizes, example="Granite 4 Micro"),
    *RECENT,
    *HYBRID,
)  # fmt: skip

# Multimodal classes whose language model is converted, with the default ``model_type`` of their text_config.
WRAPPERS = {
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "Idefics3ForConditionalGeneration": "llama",
    "LlavaForConditionalGeneration": "llama",
    "LlavaNextForConditionalGeneration": "llama",
    "Mistral3ForConditionalGeneration": "mistral",
    "Qwen3_5ForConditionalGeneration": "qwen3_5_text",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe_text",
    "SmolVLMForConditionalGeneration": "llama",
}
TEXT_MODELS = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
}

# Prefixes of names within the model and beside it (the output projection): of the class itself, of the language model
# in a multimodal one, of a model without head.
LAYOUTS = (
    ("{prefix}", ""),
    ("language_model.{prefix}", "language_model."),
    ("model.language_model.", ""),
    ("model.text_model.", ""),
    ("", ""),
)

# Checkpoint tensors that the GGUF does not need: rope tables, saved by old transformers.
IGNORED = (r"(.*\.)?rotary_emb\.inv_freq",)


# Conversion of an unsupported model through a GGUF.
ROUTE_THROUGH_GGUF = (
    "llama.cpp converts it: python convert_hf_to_gguf.py MODEL --outtype bf16 --outfile model.gguf, "
    "then nsds-gguf convert model.gguf"
)


def supported_classes() -> tuple[str, ...]:
    """Return every checkpoint class that converts, multimodal ones included."""
    return (*dict.fromkeys(name for family in FAMILIES for name in family.classes), *WRAPPERS)


_COMPARED_LETTERS = 200  # of a class name; comparison time is quadratic


def find_family(class_name: str, config: Config | None = None) -> Family:
    """Return the family of a checkpoint class; ``config`` decides where the class has several.

    Raises ``UnsupportedError`` naming the nearest supported class, and the way through a GGUF where llama.cpp has one.
    """
    for family in FAMILIES:
        if class_name in family.classes and (config is None or family.variant(config)):
            return family
    nearest = difflib.get_close_matches(class_name[:_COMPARED_LETTERS], supported_classes(), n=1, cutoff=0.0)
    known = (
        (resources.files("nsds_gguf.read.architectures") / "llama_cpp_classes.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    route = f"; {ROUTE_THROUGH_GGUF}" if class_name in known else ", and llama.cpp does not know it either"
    raise UnsupportedError(f"config.json: class {class_name} is not supported; nearest is {nearest[0]}{route}")
