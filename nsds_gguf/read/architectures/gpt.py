"""GPT-2, and what followed it with layer norms: GPT-NeoX, StableLM 2, StarCoder 2."""

from __future__ import annotations

from dataclasses import replace

from gguf import GGUFValueType

from .family import (
    Family,
    Key,
    Part,
    Parts,
    Window,
    always,
    biased,
    flag,
    unless,
)
from .parts import (
    ALL_ATTENTION,
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

_PARALLEL_KEY = Key("use_parallel_residual", "use_parallel_residual", GGUFValueType.BOOL)

_GPT2_LAYER: Parts = {
    "attn_norm": Part("ln_1", ("embd",), bias=always),
    "attn_qkv": Part("attn.c_attn", FUSED_QKV, transposed=True, bias=always),
    "attn_output": Part("attn.c_proj", ("embd", "q"), transposed=True, bias=always),
    "ffn_norm": Part("ln_2", ("embd",), bias=always),
    "ffn_up": Part("mlp.c_fc", ("ff", "embd"), transposed=True, bias=always),
    "ffn_down": Part("mlp.c_proj", ("embd", "ff"), transposed=True, bias=always),
}

_NEOX_LAYER: Parts = {
    "attn_norm": Part("input_layernorm", ("embd",), bias=always),
    "attn_qkv": Part("attention.query_key_value", FUSED_QKV, "by_head_qkv", bias=flag("attention_bias")),
    "attn_output": Part("attention.dense", ("embd", "q"), bias=flag("attention_bias")),
    "ffn_norm": Part("post_attention_layernorm", ("embd",), bias=always),
    "ffn_up": Part("mlp.dense_h_to_4h", ("ff", "embd"), bias=always),
    "ffn_down": Part("mlp.dense_4h_to_h", ("embd", "ff"), bias=always),
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

GPT = (
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
)  # fmt: skip
