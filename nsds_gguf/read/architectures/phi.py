"""Phi 1.5 to 4."""

from __future__ import annotations

from dataclasses import replace

from gguf.gguf_writer import GGUFValue

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
)
from .parts import (
    ATTENTION,
    ATTENTION_NORM,
    FFN,
    FFN_NORM,
    FUSED_QKV,
    LAYER_NORM,
    OUTSIDE,
    QKV,
    TANH_GELU,
    UNTIED,
)
from .rope import stated_rope


def phi3_keys(config: Config, _sizes: Sizes) -> dict[str, GGUFValue]:
    """Return Phi 3's window, 0 where it has none (llama.cpp knows Phi 4 by that), and its first context."""
    original = stated_rope(config).get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    return counts({
        "attention.sliding_window": config.get("sliding_window") or 0,
        "rope.scaling.original_context_length": original or PHI3_CONTEXT,
    })  # fmt: skip


PHI3_CONTEXT = 4096  # transformers' default

_PHI2_LAYER: Parts = {
    "attn_norm": Part("input_layernorm", ("embd",), bias=always),
    **biased(ATTENTION, QKV, always),
    "attn_output": Part("self_attn.dense", ("embd", "q"), bias=always),
    "ffn_up": Part("mlp.fc1", ("ff", "embd"), bias=always),
    "ffn_down": Part("mlp.fc2", ("embd", "ff"), bias=always),
}

_PHI3_LAYER: Parts = {
    **ATTENTION_NORM,
    "attn_qkv": Part("self_attn.qkv_proj", FUSED_QKV),
    "attn_output": ATTENTION["attn_output"],
    **FFN_NORM,
    "ffn_up": Part("mlp.gate_up_proj", ("2ff", "embd")),
    "ffn_down": FFN["ffn_down"],
}

PHI = (
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
)  # fmt: skip
