"""Qwen 2 and 3, dense and with experts; the language models of Qwen-VL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gguf.gguf_writer import GGUFValue

from .experts import (
    EXPERT_FF_KEY,
    EXPERTS,
    SHARED_EXPERT,
    SHARED_FF_KEY,
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
    UNTIED,
)
from .rope import section_keys

_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}

_QWEN2_MOE_LAYER: Parts = {
    **ATTENTION_NORM,
    **biased(ATTENTION, QKV, flag("qkv_bias")),
    **FFN_NORM,
    **EXPERTS,
    **SHARED_EXPERT,
}

_QWEN2 = Family(
    classes=("Qwen2ForCausalLM",),
    architecture="qwen2",
    layer=biased(LAYER, QKV, always),
    outside=OUTSIDE,
    defaults={**RMS, "sliding_window": 4096, "max_window_layers": 28},
    fixed_head_dim=True,
    window=Window("use_sliding_window"),
    example="Qwen 2 and 2.5",
)  # fmt: skip
_QWEN3 = Family(
    classes=("Qwen3ForCausalLM",),
    architecture="qwen3",
    layer={**ATTENTION_NORM, **biased(ATTENTION, QKV, flag("attention_bias")), **QK_NORMS, **FFN_NORM, **FFN},
    outside=OUTSIDE,
    defaults={**RMS, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    window=Window("use_sliding_window"),
    example="Qwen 3",
)  # fmt: skip
_QWEN3_MOE = Family(
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
)  # fmt: skip

# --- Qwen-VL --------------------------------------------------------------------------------------------------

_QWEN2VL_SECTIONS, _QWEN3VL_SECTIONS = (16, 24, 24), (24, 20, 20)
_QWEN3VL_DEFAULTS = {**RMS, "head_dim": 128, "rope_theta": 5e5}


def _stacked(role: str, columns: str = "") -> Part:
    """Return a part of repositories' stacks of ``(in, out)``, where transformers 5 saves ``(out, in)``."""
    part, source = EXPERTS[role], "down_proj" if role == "ffn_down_exps" else "gate_up_proj"
    stored = ("experts", "ff_exp", "embd") if role == "ffn_down_exps" else ("experts", "embd", "2ff_exp")
    return Part(
        f"mlp.experts.{source}", part.shape, stored=stored, transposed=True, suffix="", columns=columns, also=part.also
    )


_QWEN3VL_EXPERTS: Parts = {
    "ffn_gate_exps": _stacked("ffn_gate_exps", "first"),
    "ffn_up_exps": _stacked("ffn_up_exps", "second"),
    "ffn_down_exps": _stacked("ffn_down_exps"),
}


def qwen2vl_keys(config: Config, _sizes: Sizes) -> dict[str, GGUFValue]:
    """Return Qwen2-VL's key."""
    return section_keys(config, _QWEN2VL_SECTIONS)


def qwen3vl_keys(config: Config, _sizes: Sizes) -> dict[str, GGUFValue]:
    """Return Qwen3-VL's keys; into its first layers go as many outputs of the vision part."""
    vision = config.get("vision_config")
    indexes = vision.get("deepstack_visual_indexes") if isinstance(vision, Mapping) else None
    n_layers = len(indexes) if isinstance(indexes, list) else 0
    return {**section_keys(config, _QWEN3VL_SECTIONS), **counts({"n_deepstack_layers": n_layers})}


# --- the table ------------------------------------------------------------------------------------------------

QWEN = (
    _QWEN2,
    _QWEN3,
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
    _QWEN3_MOE,
    replace(
        _QWEN2,
        classes=("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
        architecture="qwen2vl",
        defaults={**UNTIED, "norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": 4096, "max_window_layers": 80},
        rope_kinds=("default",),
        more_keys=qwen2vl_keys,
        example="Qwen2-VL, Qwen2.5-VL",
    ),
    replace(
        _QWEN3,
        classes=("Qwen3VLForConditionalGeneration",),
        architecture="qwen3vl",
        defaults=_QWEN3VL_DEFAULTS,
        window=None,
        rope_kinds=("default",),
        more_keys=qwen3vl_keys,
        example="Qwen3-VL 2B to 32B",
    ),
    replace(
        _QWEN3_MOE,
        classes=("Qwen3VLMoeForConditionalGeneration",),
        architecture="qwen3vlmoe",
        layer={**_QWEN3_MOE.layer, **_QWEN3VL_EXPERTS},
        defaults={
            **RMS, "rope_theta": 5e5, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        },
        window=None,
        fixed=_ALL_SPARSE,
        rope_kinds=("default",),
        more_keys=qwen3vl_keys,
        example="Qwen3-VL 30B-A3B",
    ),
)  # fmt: skip
