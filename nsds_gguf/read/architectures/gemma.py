"""Gemma."""

from __future__ import annotations

from collections.abc import Callable

from .family import (
    Config,
    Family,
    Key,
    Window,
    shifted,
)
from .parts import (
    ATTENTION,
    ATTENTION_NORM,
    FFN,
    LAYER,
    OUTSIDE,
    QK_NORMS,
    SANDWICH_NORMS,
    TANH_GELU,
)

_GEMMA_KEYS = (
    Key("attn_logit_softcapping", "attn_logit_softcapping"),
    Key("final_logit_softcapping", "final_logit_softcapping"),
)

_CAUSAL = {"use_bidirectional_attention": False}


def attention_scale(n_layers_of_27b: int) -> Callable[[Config], float]:
    """Return what gives the ``query_pre_attn_scalar`` that llama.cpp computes with (gemma2.cpp, gemma3.cpp)."""

    def scalar(config: Config) -> float:
        if config["num_hidden_layers"] == n_layers_of_27b:
            return float(config["hidden_size"] // config["num_attention_heads"])
        return float(config["head_dim"])

    return scalar


GEMMA = (
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
)  # fmt: skip
