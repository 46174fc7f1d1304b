"""Qwen 2 and 3, dense and with experts."""

from __future__ import annotations

from .experts import (
    EXPERT_FF_KEY,
    EXPERTS,
    SHARED_EXPERT,
    SHARED_FF_KEY,
)
from .family import (
    Family,
    Parts,
    Window,
    always,
    biased,
    flag,
)
from .parts import (
    ATTENTION,
    ATTENTION_NORM,
    FFN,
    FFN_NORM,
    LAYER,
    OUTSIDE,
    QK_NORMS,
    QKV,
    RMS,
)

_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}

_QWEN2_MOE_LAYER: Parts = {
    **ATTENTION_NORM,
    **biased(ATTENTION, QKV, flag("qkv_bias")),
    **FFN_NORM,
    **EXPERTS,
    **SHARED_EXPERT,
}

QWEN = (
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
)  # fmt: skip
