"""Llama and its kin: Mistral, Mixtral, Ministral 3, InternLM 2, SmolLM3."""

from __future__ import annotations

from dataclasses import replace

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ...records import kv
from .experts import (
    numbered_experts,
)
from .family import (
    Config,
    Family,
    Part,
    Parts,
    Sizes,
    Window,
    biased,
    flag,
)
from .parts import (
    ALL_ATTENTION,
    ALL_FFN,
    ATTENTION_NORM,
    FFN_NORM,
    FUSED_QKV,
    LLAMA_LAYER,
    LLAMA_ROPE_KINDS,
    OUTSIDE,
    RMS,
    ROTATED_ATTENTION,
    UNTIED,
)
from .rope import stated_rope


def every_fourth(config: Config) -> list[int]:
    """Return SmolLM3's layers with (1) and without (0) rope as llama.cpp has them (smollm3.cpp)."""
    return [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]


def ministral3_keys(config: Config, _sizes: Sizes) -> dict[str, GGUFValue]:
    """Return Ministral 3's key: how much queries grow with their position."""
    scale = stated_rope(config).get("llama_4_scaling_beta")
    return {} if scale is None else {"attention.temperature_scale": kv(float(scale), GGUFValueType.FLOAT32)}


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

_INTERNLM2_LAYER: Parts = {
    "attn_norm": Part("attention_norm", ("embd",)),
    "attn_q": Part("attention.wqkv", ("q", "embd"), "grouped_q", FUSED_QKV),
    "attn_k": Part("attention.wqkv", ("kv", "embd"), "grouped_k", FUSED_QKV),
    "attn_v": Part("attention.wqkv", ("kv", "embd"), "grouped_v", FUSED_QKV),
    "attn_output": Part("attention.wo", ("embd", "q")),
    "ffn_norm": Part("ffn_norm", ("embd",)),
    "ffn_gate": Part("feed_forward.w1", ("ff", "embd")),
    "ffn_up": Part("feed_forward.w3", ("ff", "embd")),
    "ffn_down": Part("feed_forward.w2", ("embd", "ff")),
}

LLAMA = (
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
            **numbered_experts("block_sparse_moe", "ff"),
        },
        defaults={**UNTIED, "norm_eps": 1e-5, "rope_theta": 1e6, "num_experts": 8, "num_experts_per_tok": 2},
        window=Window(),
        example="Mixtral 8x7B",
    ),
    Family(
        classes=("Ministral3ForCausalLM",),
        architecture="mistral3",
        layer=LLAMA_LAYER,
        outside=OUTSIDE,
        defaults={**UNTIED, "norm_eps": 1e-5, "head_dim": 128, "rope_theta": 1e6},
        rope_kinds=("yarn",),
        yarn_log_unit=1.0,
        window=Window(),
        writes_rope_dim=True,
        writes_vocab_size=True,
        more_keys=ministral3_keys,
        example="Ministral 3",
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
)  # fmt: skip
