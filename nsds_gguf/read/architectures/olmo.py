"""OLMo 1 to 3 and OLMoE."""

from __future__ import annotations

from dataclasses import replace

from .experts import (
    EXPERTS,
)
from .family import (
    Family,
    Key,
    Window,
    without,
)
from .parts import (
    ATTENTION,
    ATTENTION_NORM,
    FFN,
    FFN_NORM,
    OUTSIDE,
    POST_NORMS,
    ROTATED_ATTENTION,
    UNTIED,
    WIDE_QK_NORMS,
)

OLMO = (
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
)  # fmt: skip
