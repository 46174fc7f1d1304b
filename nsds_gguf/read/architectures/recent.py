"""Families of 2025 and later, a row each; ``families.FAMILIES`` includes them."""

from __future__ import annotations

from dataclasses import replace

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ...records import kv
from .experts import (
    EXPERT_FF_KEY,
    EXPERTS,
    ROUTED_DEFAULTS,
    ROUTED_KEYS,
    SCORE_BIAS,
    SHARED_EXPERTS,
    gating_key,
    is_dense_layer,
    is_sparse_layer,
    numbered_experts,
    shared_sizes,
    sigmoid_keys,
)
from .family import (
    Config,
    Family,
    Part,
    Parts,
    Sizes,
    Window,
    always,
    biased,
    counts,
    flag,
    where,
)
from .parts import (
    ATTENTION,
    ATTENTION_NORM,
    FFN,
    FFN_NORM,
    LAYER,
    OUTSIDE,
    POST_NORMS,
    QK_NORMS,
    QKV,
    RMS,
    UNTIED,
    WIDE_QK_NORMS,
)
from .rope import stated_rope

# --- sizes and keys -------------------------------------------------------------------------------------------


def minimax_m2_keys(config: Config, _sizes: Sizes) -> dict[str, GGUFValue]:
    """Return MiniMax-M2's keys: sigmoid scores, experts of the width of ``intermediate_size``."""
    return {**counts({"expert_feed_forward_length": config["intermediate_size"]}), **gating_key("SIGMOID")}


def ernie4_5_moe_keys(config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return Ernie 4.5's keys."""
    return counts({
        "interleave_moe_layer_step": config["moe_layer_interval"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_shared_feed_forward_length": sizes["ff_shexp"] or None,
    })  # fmt: skip


def last_layer(config: Config) -> int:
    """Return the number of the last layer, -1 where config.json says so."""
    return -1 if config.get("moe_layer_end_index") == -1 else config["num_hidden_layers"] - 1


def all_heads(config: Config) -> int:
    """Return the number of heads: llama.cpp has no grouped queries for the architecture."""
    return int(config["num_attention_heads"])


_EXAONE4_LAYERS, _EXAONE4_WINDOW = 64, 4096


def exaone4_window(config: Config) -> int | None:
    """Return the sliding window that llama.cpp supports: with 64 layers one, with any other number none."""
    if config["num_hidden_layers"] != _EXAONE4_LAYERS:
        return None
    return config.get("sliding_window") or _EXAONE4_WINDOW


def hunyuan_moe_sizes(config: Config) -> dict[str, int]:
    """Return the width of Hunyuan's shared experts, which are one feed-forward block."""
    return {"ff_shexp": config["intermediate_size"] * config["n_shared_experts"]}


def dense_width(config: Config) -> int:
    """Return the width of the dense feed-forward block, which llama.cpp demands of the experts too."""
    return int(config["intermediate_size"])


def hunyuan_moe_keys(config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return Hunyuan MoE's keys."""
    numbers = {
        "expert_feed_forward_length": sizes["ff_exp"],
        "expert_shared_feed_forward_length": sizes["ff_shexp"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_used_count": config["num_experts_per_tok"],
    }
    return {**counts(numbers), **hunyuan_rope_keys(config, sizes)}


_HUNYUAN_CONTEXT = 256 * 1024  # that the factor alpha of the rope theta stands for (llama.cpp, hunyuan.py)


def hunyuan_rope_keys(config: Config, _sizes: Sizes) -> dict[str, GGUFValue]:
    """Return the keys of Hunyuan's rope, whose theta is larger by a power of ``alpha``."""
    if not stated_rope(config).get("alpha"):
        return {}
    return {
        "rope.scaling.type": kv("none", GGUFValueType.STRING),
        "rope.scaling.factor": kv(1.0, GGUFValueType.FLOAT32),
        "rope.scaling.original_context_length": kv(_HUNYUAN_CONTEXT, GGUFValueType.UINT32),
        "context_length": kv(_HUNYUAN_CONTEXT, GGUFValueType.UINT32),
    }


def gpt_oss_keys(config: Config, _sizes: Sizes) -> dict[str, GGUFValue]:
    """Return gpt-oss' key: experts of the width of ``intermediate_size``."""
    return counts({"expert_feed_forward_length": config["intermediate_size"]})


# --- parts ----------------------------------------------------------------------------------------------------

_OWN_POST_NORM: Parts = {"post_attention_norm": Part("post_attention_layernorm", ("embd",))}  # of the second block
_SPARSE = {**EXPERTS, **SCORE_BIAS, **SHARED_EXPERTS}
_GLM4_MOE_NORMS = {role: replace(part, when=flag("use_qk_norm")) for role, part in QK_NORMS.items()}
_HUNYUAN_NORMS: Parts = {
    "attn_q_norm": Part("self_attn.query_layernorm", ("head",)),
    "attn_k_norm": Part("self_attn.key_layernorm", ("head",)),
}
_HUNYUAN_EXPERTS: Parts = {
    **EXPERTS,
    "ffn_gate_inp": Part("mlp.gate.wg", ("experts", "embd")),
    "ffn_gate_shexp": Part("mlp.shared_mlp.gate_proj", ("ff_shexp", "embd")),
    "ffn_up_shexp": Part("mlp.shared_mlp.up_proj", ("ff_shexp", "embd")),
    "ffn_down_shexp": Part("mlp.shared_mlp.down_proj", ("embd", "ff_shexp")),
}
_MINIMAX = "block_sparse_moe"
_MINIMAX_EXPERTS: Parts = {
    "ffn_gate_inp": Part(f"{_MINIMAX}.gate", ("experts", "embd"), also=(Part("mlp.gate", ("experts", "embd")),)),
    **numbered_experts(_MINIMAX),
    "exp_probs_b.bias": Part(
        f"{_MINIMAX}.e_score_correction_bias",
        ("experts",),
        suffix="",
        also=(Part("mlp.e_score_correction_bias", ("experts",), suffix=""),),
    ),
}

# gpt-oss stacks its experts, with gate and up in turns: as columns of (in, out), or as rows of MXFP4 blocks.


def _gate_or_up(which: str) -> Part:
    """Return the ``even`` or ``odd`` part of the stacked gates and ups."""
    shape = ("experts", "ff_exp", "embd")
    blocks = Part("mlp.experts.gate_up_proj_blocks", shape, f"{which}_exps", ("experts", "2ff_exp", "embd"), suffix="")
    return Part(
        "mlp.experts.gate_up_proj", shape, stored=("experts", "embd", "2ff_exp"), transposed=True, suffix="",
        columns=which, also=(blocks,),
    )  # fmt: skip


def _gate_or_up_bias(which: str) -> Part:
    name, stored = "mlp.experts.gate_up_proj_bias", ("experts", "2ff_exp")
    return Part(name, ("experts", "ff_exp"), stored=stored, suffix="", columns=which)


_GPT_OSS_EXPERTS: Parts = {
    "ffn_gate_inp": Part("mlp.router", ("experts", "embd"), bias=always),
    "ffn_gate_exps": _gate_or_up("even"),
    "ffn_gate_exps.bias": _gate_or_up_bias("even"),
    "ffn_up_exps": _gate_or_up("odd"),
    "ffn_up_exps.bias": _gate_or_up_bias("odd"),
    "ffn_down_exps": Part(
        "mlp.experts.down_proj",
        ("experts", "embd", "ff_exp"),
        stored=("experts", "ff_exp", "embd"),
        transposed=True,
        suffix="",
        also=(Part("mlp.experts.down_proj_blocks", ("experts", "embd", "ff_exp"), suffix=""),),
    ),
    "ffn_down_exps.bias": Part("mlp.experts.down_proj_bias", ("experts", "embd"), suffix=""),
}

# --- the table ------------------------------------------------------------------------------------------------

_ERNIE_DEFAULTS = {"norm_eps": 1e-5, "rope_theta": 5e5, "use_bias": False}

RECENT = (
    Family(
        classes=("SeedOssForCausalLM",),
        architecture="seed_oss",
        layer={**ATTENTION_NORM, **biased(ATTENTION, QKV, flag("attention_bias")), **_OWN_POST_NORM, **FFN},
        outside=OUTSIDE,
        defaults={**RMS, "head_dim": 128, "attention_bias": True},
        rope_kinds=("default",),
        fixed={"attention_out_bias": False, "mlp_bias": False},
        example="Seed-OSS 36B",
    ),
    Family(
        classes=("Glm4ForCausalLM",),
        architecture="glm4",
        layer={
            **ATTENTION_NORM,
            **biased(ATTENTION, QKV, flag("attention_bias")),
            "post_attention_norm": Part("post_self_attn_layernorm", ("embd",)),
            **FFN_NORM,
            "ffn_up": Part("mlp.gate_up_proj", ("2ff", "embd")),
            "ffn_down": FFN["ffn_down"],
            "post_ffw_norm": Part("post_mlp_layernorm", ("embd",)),
        },
        outside=OUTSIDE,
        defaults={
            **UNTIED, "norm_eps": 1.5625e-7, "head_dim": 128, "attention_bias": True, "partial_rotary_factor": 0.5,
        },
        rope_kinds=("default",),
        writes_rope_dim=True,
        example="GLM-4 9B and 32B (0414)",
    ),
    Family(
        classes=("Exaone4ForCausalLM",),
        architecture="exaone4",
        layer={**ATTENTION, **QK_NORMS, **POST_NORMS, **FFN},
        outside=OUTSIDE,
        defaults={**UNTIED, "norm_eps": 1e-5},
        fixed={"sliding_window": exaone4_window},
        fixed_head_dim=True,
        rope_kinds=("default", "llama3"),
        window=Window(period=4, lists_layers=True),
        writes_vocab_size=True,
        example="EXAONE 4",
    ),
    Family(
        classes=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
        architecture="ernie4_5",
        layer=LAYER,
        outside=OUTSIDE,
        defaults={**_ERNIE_DEFAULTS, "head_dim": 128},
        fixed={"use_bias": False},
        rope_kinds=("default",),
        example="ERNIE 4.5 0.3B",
    ),
    Family(
        classes=("Ernie4_5_MoeForCausalLM",),
        architecture="ernie4_5-moe",
        layer={
            **ATTENTION_NORM, **ATTENTION, **FFN_NORM, **where(FFN, is_dense_layer),
            **where({
                **EXPERTS,
                "exp_probs_b.bias": Part(
                    "mlp.moe_statics.e_score_correction_bias", ("one", "experts"), suffix=""
                ),
                **SHARED_EXPERTS,
            }, is_sparse_layer),
        },
        outside=OUTSIDE,
        defaults={
            **_ERNIE_DEFAULTS, "num_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
            "moe_intermediate_size": 1536, "first_k_dense_replace": 1, "moe_layer_interval": 1,
        },
        keys=(EXPERT_FF_KEY,),
        fixed={"use_bias": False, "moe_layer_interval": 1, "moe_layer_end_index": last_layer},
        rope_kinds=("default",),
        sizes=shared_sizes,
        more_keys=ernie4_5_moe_keys,
        ignored=(r"model\.mtp_(block|emb_norm|hidden_norm|linear_proj)\..*",),
        example="ERNIE 4.5 21B-A3B",
    ),
    Family(
        classes=("HunYuanDenseV1ForCausalLM",),
        architecture="hunyuan-dense",
        layer={**ATTENTION_NORM, **ATTENTION, **_HUNYUAN_NORMS, **FFN_NORM, **FFN},
        outside=OUTSIDE,
        defaults={**UNTIED, "norm_eps": 1e-5, "has_alpha_rope": True},
        fixed={"attention_bias": False},
        rope_kinds=("default",),
        more_keys=hunyuan_rope_keys,
        example="Hunyuan 0.5B to 7B",
    ),
    Family(
        classes=("HunYuanMoEV1ForCausalLM",),
        architecture="hunyuan-moe",
        layer={**ATTENTION_NORM, **ATTENTION, **_HUNYUAN_NORMS, **FFN_NORM, **_HUNYUAN_EXPERTS},
        outside=OUTSIDE,
        defaults={
            **UNTIED, "norm_eps": 1e-5, "has_alpha_rope": True, "num_experts": 1, "num_experts_per_tok": 1,
            "n_shared_experts": 1,
        },
        fixed={"attention_bias": False, "moe_intermediate_size": dense_width},
        rope_kinds=("default",),
        sizes=hunyuan_moe_sizes,
        more_keys=hunyuan_moe_keys,
        example="Hunyuan A13B",
    ),
    Family(
        classes=("Glm4MoeForCausalLM",),
        architecture="glm4moe",
        layer={
            **ATTENTION_NORM, **biased(ATTENTION, QKV, flag("attention_bias")), **_GLM4_MOE_NORMS, **_OWN_POST_NORM,
            **where(FFN, is_dense_layer), **where(_SPARSE, is_sparse_layer),
        },
        outside=OUTSIDE,
        defaults={
            **UNTIED, **ROUTED_DEFAULTS, "norm_eps": 1e-5, "partial_rotary_factor": 0.5, "num_experts": 128,
            "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
        },
        keys=ROUTED_KEYS,
        rope_kinds=("default",),
        writes_rope_dim=True,
        sizes=shared_sizes,
        more_keys=sigmoid_keys,
        extra_layers=True,
        example="GLM-4.5 and 4.6",
    ),
    Family(
        classes=("Dots1ForCausalLM",),
        architecture="dots1",
        layer={
            **ATTENTION_NORM, **ATTENTION, **QK_NORMS, **FFN_NORM,
            **where(FFN, is_dense_layer), **where(_SPARSE, is_sparse_layer),
        },
        outside=OUTSIDE,
        defaults={
            **RMS, **ROUTED_DEFAULTS, "norm_topk_prob": False, "first_k_dense_replace": 0, "sliding_window": 4096,
            "max_window_layers": 62, "moe_intermediate_size": 1408,
        },
        keys=ROUTED_KEYS,
        rope_kinds=("default",),
        fixed={"attention_bias": False, "num_key_value_heads": all_heads},
        window=Window("use_sliding_window"),
        output="required",
        sizes=shared_sizes,
        more_keys=sigmoid_keys,
        example="dots.llm1",
    ),
    Family(
        classes=("MiniMaxM2ForCausalLM",),
        architecture="minimax-m2",
        layer={**ATTENTION_NORM, **ATTENTION, **WIDE_QK_NORMS, **FFN_NORM, **_MINIMAX_EXPERTS},
        outside=OUTSIDE,
        defaults={
            **RMS, "head_dim": 128, "rope_theta": 5e6, "num_experts": 256, "num_experts_per_tok": 8,
            "scoring_func": "sigmoid",
        },
        fixed={"scoring_func": "sigmoid", "shared_intermediate_size": 0},
        rope_kinds=("default",),
        writes_rope_dim=True,
        output="required",
        more_keys=minimax_m2_keys,
        ignored=(r"model\.mtp_.*",),
        example="MiniMax-M2",
    ),
    Family(
        classes=("GptOssForCausalLM",),
        architecture="gpt-oss",
        layer={
            **ATTENTION_NORM,
            **biased(ATTENTION, f"{QKV} attn_output", always),
            "attn_sinks": Part("self_attn.sinks", ("heads",), suffix=""),
            **_OWN_POST_NORM,
            **_GPT_OSS_EXPERTS,
        },
        outside=OUTSIDE,
        defaults={
            **UNTIED, "norm_eps": 1e-5, "head_dim": 64, "rope_theta": 150000.0, "num_experts": 128,
            "num_experts_per_tok": 4, "sliding_window": 128, "attention_bias": True,
        },
        fixed={"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        rope_kinds=("yarn",),
        window=Window(period=2),
        output="required",
        more_keys=gpt_oss_keys,
        example="gpt-oss 20B and 120B",
    ),
    Family(
        classes=("ApertusForCausalLM",),
        architecture="apertus",
        layer={
            "attn_norm": Part("attention_layernorm", ("embd",)),
            **ATTENTION,
            **QK_NORMS,
            "ffn_norm": Part("feedforward_layernorm", ("embd",)),
            "ffn_up": FFN["ffn_up"],
            "ffn_down": FFN["ffn_down"],
        },
        outside=OUTSIDE,
        defaults={**UNTIED, "norm_eps": 1e-5, "hidden_act": "xielu", "rope_theta": 12e6},
        activations=("xielu",),
        fixed={"attention_bias": False, "post_norm": False, "mlp_bias": False},
        rope_kinds=("default", "llama3"),
        writes_rope_dim=True,
        writes_vocab_size=True,
        output="required",
        layer_numbers={f"xielu.{name}": f"mlp.act_fn.{name}" for name in ("alpha_n", "alpha_p", "beta", "eps")},
        example="Apertus 8B and 70B",
    ),
)  # fmt: skip
