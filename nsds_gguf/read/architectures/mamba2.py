"""Families with Mamba 2 beside or between their attention, a row each; ``hybrid.HYBRID`` includes them."""

from __future__ import annotations

import math
import reprlib
from dataclasses import replace

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ...errors import ModelError
from ...records import kv
from ...records.transforms import Scale, ScaleRows, Transform
from .family import Config, Family, LayerCondition, Part, Parts, Sizes, flag, where
from .parts import ATTENTION, ATTENTION_NORM, OUTSIDE, ROTATED_ATTENTION, UNTIED

_UNLIMITED_CONTEXT = 1 << 20  # what llama.cpp's converter writes for models without positions

# --- Mamba 2 --------------------------------------------------------------------------------------------------


def _mamba2(place: str, conv_bias: str) -> Parts:
    """Return the parts of Mamba 2 (arXiv 2405.21060) under the block ``place``."""
    one_row = ("ssm_heads", "one")
    return {
        "ssm_in": Part(f"{place}.in_proj", ("ssm_in", "embd")),
        "ssm_conv1d": Part(
            f"{place}.conv1d", ("conv_width", "conv"), stored=("conv_width", "one", "conv"), bias=flag(conv_bias)
        ),
        "ssm_dt.bias": Part(f"{place}.dt_bias", ("ssm_heads",), suffix=""),
        "ssm_a": Part(f"{place}.A_log", one_row, stored=("ssm_heads",), change="minus_exp", suffix="", bare=True),
        "ssm_d": Part(f"{place}.D", one_row, stored=("ssm_heads",), suffix="", bare=True),
        "ssm_norm": Part(f"{place}.norm", ("groups", "inner/groups"), stored=("inner",)),
        "ssm_out": Part(f"{place}.out_proj", ("embd", "inner")),
    }


def _mamba2_sizes(inner: int, heads: int, groups: int, state: int, conv: int) -> dict[str, int]:
    return {
        "inner": inner,
        "groups": groups,
        "inner/groups": inner // groups,
        "ssm_heads": heads,
        "state": state,
        "conv": conv,
        "conv_width": inner + 2 * groups * state,
        "ssm_in": 2 * inner + 2 * groups * state + heads,
    }


def mamba2_keys(_config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return the keys of Mamba 2."""
    numbers = {
        "ssm.conv_kernel": sizes["conv"],
        "ssm.inner_size": sizes["inner"],
        "ssm.state_size": sizes["state"],
        "ssm.time_step_rank": sizes["ssm_heads"],
        "ssm.group_count": sizes["groups"],
    }
    return {name: kv(value, GGUFValueType.UINT32) for name, value in numbers.items()}


# --- Falcon-H1 ------------------------------------------------------------------------------------------------


def _factor(config: Config, key: str, index: int | None = None) -> float:
    """Return a multiplier of config.json; 1 if it is absent."""
    value = config.get(key)
    if index is not None and value is not None:
        value = value[index] if isinstance(value, list) and len(value) > index else "no number"
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelError(f"config.json: {key}: wanted numbers, got {reprlib.repr(config[key])}")
    return float(value)


def _scaled(part: Part, *keys: tuple[str, int | None]) -> Part:
    """Return a part that is multiplied with settings of config.json, one after another."""
    return replace(part, steps=lambda config: tuple(Scale(_factor(config, key, index)) for key, index in keys))


def falcon_h1_sizes(config: Config) -> dict[str, int]:
    """Return the dimensions of Falcon-H1's state space."""
    inner = config.get("mamba_d_ssm") or config["mamba_expand"] * config["hidden_size"]
    heads, groups = config["mamba_n_heads"], config["mamba_n_groups"]
    return _mamba2_sizes(inner, heads, groups, config["mamba_d_state"], config["mamba_d_conv"])


def _falcon_h1_in_steps(config: Config) -> tuple[Transform, ...]:
    """Return the multipliers of the state space's input: of all rows, then of gate, x, B, C and dt."""
    sizes = falcon_h1_sizes(config)
    parts = [sizes["inner"]] * 2 + [sizes["groups"] * sizes["state"]] * 2 + [sizes["ssm_heads"]]
    factors = [_factor(config, "ssm_multipliers", i) for i in range(len(parts))]
    by_row = np.repeat(np.array(factors, np.float32), parts)
    return Scale(_factor(config, "ssm_in_multiplier")), ScaleRows(by_row)


def norm_before_gate(config: Config) -> bool:
    """Return what llama.cpp computes: a norm after the gate; without a norm the setting says nothing."""
    return bool(config.get("mamba_norm_before_gate")) and not config.get("mamba_rms_norm")


_INTO_ATTENTION = ("attention_in_multiplier", None)
_FALCON_H1_MAMBA = _mamba2("mamba", "mamba_conv_bias")
_FALCON_H1_LAYER: Parts = {
    **ATTENTION_NORM,
    "attn_q": _scaled(ATTENTION["attn_q"], _INTO_ATTENTION),
    "attn_k": _scaled(ATTENTION["attn_k"], ("key_multiplier", None), _INTO_ATTENTION),
    "attn_v": _scaled(ATTENTION["attn_v"], _INTO_ATTENTION),
    "attn_output": _scaled(ATTENTION["attn_output"], ("attention_out_multiplier", None)),
    **_FALCON_H1_MAMBA,
    "ssm_in": replace(_FALCON_H1_MAMBA["ssm_in"], steps=_falcon_h1_in_steps),
    "ssm_norm": replace(_FALCON_H1_MAMBA["ssm_norm"], when=flag("mamba_rms_norm")),
    "ssm_out": _scaled(_FALCON_H1_MAMBA["ssm_out"], ("ssm_out_multiplier", None)),
    "ffn_norm": Part("pre_ff_layernorm", ("embd",), bare=True),  # llama.cpp asks for the name without .weight
    "ffn_gate": _scaled(Part("feed_forward.gate_proj", ("ff", "embd")), ("mlp_multipliers", 0)),
    "ffn_up": Part("feed_forward.up_proj", ("ff", "embd")),
    "ffn_down": _scaled(Part("feed_forward.down_proj", ("embd", "ff")), ("mlp_multipliers", 1)),
}
_FALCON_H1 = Family(
    classes=("FalconH1ForCausalLM",),
    architecture="falcon-h1",
    layer=_FALCON_H1_LAYER,
    outside={
        "token_embd": _scaled(OUTSIDE["token_embd"], ("embedding_multiplier", None)),
        "output_norm": Part("model.final_layernorm", ("embd",)),
        "output": _scaled(OUTSIDE["output"], ("lm_head_multiplier", None)),
    },
    defaults={
        **UNTIED, "norm_eps": 1e-5, "mamba_d_ssm": 1024, "mamba_n_heads": 128, "mamba_n_groups": 1,
        "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True,
        "mamba_norm_before_gate": True,
    },
    # Embedding and output have different multipliers, and llama.cpp has one tensor for a tied one.
    fixed={
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "projectors_bias": False,
        "mamba_proj_bias": False, "mamba_norm_before_gate": norm_before_gate,
    },
    rope_kinds=("default",),
    writes_vocab_size=True,
    sizes=falcon_h1_sizes,
    more_keys=mamba2_keys,
    example="Falcon-H1 0.5B to 34B",
)  # fmt: skip

# --- Nemotron-H -----------------------------------------------------------------------------------------------

_PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_NEMOTRON_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}


def nemotron_kinds(config: Config) -> list[str]:
    """Return the kind of every layer of Nemotron-H: ``mamba``, ``attention``, ``mlp`` or ``moe``."""
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        return [_PATTERN.get(letter, letter) for letter in pattern]
    listed = config.get("layers_block_type") or config.get("layer_types") or []
    return [_NEMOTRON_KINDS.get(str(kind), str(kind)) for kind in listed]


def _nemotron_layers(kind: str) -> LayerCondition:
    def is_of_kind(config: Config, layer: int) -> bool:
        kinds = nemotron_kinds(config)
        return layer < len(kinds) and kinds[layer] == kind

    return is_of_kind


def has_expert_layers(config: Config) -> bool:
    """Return whether a Nemotron-H has experts; then it has no dense feed-forward block."""
    return "moe" in nemotron_kinds(config)


def nemotron_sizes(config: Config) -> dict[str, int]:
    """Return the dimensions of Nemotron-H's state space and experts."""
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    shared = config.get("moe_shared_expert_intermediate_size") or 0
    state, conv = config["ssm_state_size"], config["conv_kernel"]
    has_experts = has_expert_layers(config)
    return {
        **_mamba2_sizes(inner, config["mamba_num_heads"], config["n_groups"], state, conv),
        "layers": len(nemotron_kinds(config)) or config["num_hidden_layers"],
        "experts": config["num_experts"] if has_experts else 0,
        "ff_shexp": shared,
        "latent": config.get("moe_latent_size") or config["hidden_size"],
    }


def nemotron_keys(config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return Nemotron-H's keys; llama.cpp knows the kind of a layer by its key/value heads and its width."""
    kinds = nemotron_kinds(config)
    has_experts = has_expert_layers(config)
    width, wide = (sizes["ff_exp"], "moe") if has_experts else (sizes["ff"], "mlp")
    kv_heads = [sizes["kv_heads"] if kind == "attention" else 0 for kind in kinds]
    widths = [width if kind == wide else 0 for kind in kinds]
    keys = {
        **mamba2_keys(config, sizes),
        "rope.dimension_count": kv(sizes["head"], GGUFValueType.UINT32),
        "rope.scaling.finetuned": kv(False, GGUFValueType.BOOL),
        "context_length": kv(_UNLIMITED_CONTEXT, GGUFValueType.UINT32),
        "attention.head_count_kv": kv(kv_heads, GGUFValueType.ARRAY, GGUFValueType.INT32),
        "attention.layer_norm_epsilon": kv(config["norm_eps"], GGUFValueType.FLOAT32),
        "feed_forward_length": kv(widths, GGUFValueType.ARRAY, GGUFValueType.INT32),
    }
    theta = (config.get("rope_parameters") or config).get("rope_theta")
    if isinstance(theta, int | float):  # nothing rotates, but the converter writes it
        keys["rope.freq_base"] = kv(float(theta), GGUFValueType.FLOAT32)
    if not has_experts:
        return keys
    numbers = {
        "expert_feed_forward_length": sizes["ff_exp"],
        "expert_shared_feed_forward_length": sizes["ff_shexp"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
    }
    keys |= {name: kv(value, GGUFValueType.UINT32) for name, value in numbers.items()}
    if config.get("moe_latent_size"):
        keys["moe_latent_size"] = kv(sizes["latent"], GGUFValueType.UINT32)
    keys["expert_weights_norm"] = kv(bool(config["norm_topk_prob"]), GGUFValueType.BOOL)
    return {**keys, "expert_weights_scale": kv(float(config["routed_scaling_factor"]), GGUFValueType.FLOAT32)}


def _nemotron_experts(name: str, shape: tuple[str, ...]) -> Part:
    return Part(f"mixer.experts.{{e}}.{name}", shape, also=(Part(f"mixer.experts.{name}", shape, suffix=""),))


_HAS_LATENT = flag("moe_latent_size")
# In the order of ggml's rope, as the converter has it, though nothing rotates.
_NEMOTRON_ATTENTION: Parts = {
    role: replace(part, source=part.source.replace("self_attn", "mixer")) for role, part in ROTATED_ATTENTION.items()
}
_NEMOTRON_EXPERTS: Parts = {
    "ffn_gate_inp": Part("mixer.gate", ("experts", "embd")),
    "exp_probs_b.bias": Part("mixer.gate.e_score_correction_bias", ("experts",), suffix=""),
    "ffn_latent_down": Part("mixer.fc1_latent_proj", ("latent", "embd"), when=_HAS_LATENT),
    "ffn_latent_up": Part("mixer.fc2_latent_proj", ("embd", "latent"), when=_HAS_LATENT),
    "ffn_up_exps": _nemotron_experts("up_proj", ("experts", "ff_exp", "latent")),
    "ffn_down_exps": _nemotron_experts("down_proj", ("experts", "latent", "ff_exp")),
    "ffn_up_shexp": Part("mixer.shared_experts.up_proj", ("ff_shexp", "embd")),
    "ffn_down_shexp": Part("mixer.shared_experts.down_proj", ("embd", "ff_shexp")),
}
_NEMOTRON_H = Family(
    classes=("NemotronHForCausalLM",),
    architecture="nemotron_h",
    layer={
        "attn_norm": Part("norm", ("embd",)),
        **where(_mamba2("mixer", "use_conv_bias"), _nemotron_layers("mamba")),
        **where(_NEMOTRON_ATTENTION, _nemotron_layers("attention")),
        "ffn_up": Part("mixer.up_proj", ("ff", "embd"), layers=_nemotron_layers("mlp")),
        "ffn_down": Part("mixer.down_proj", ("embd", "ff"), layers=_nemotron_layers("mlp")),
    },
    outside={
        "token_embd": Part("backbone.embeddings", ("vocab", "embd")),
        "output_norm": Part("backbone.norm_f", ("embd",)),
        "output": OUTSIDE["output"],
    },
    prefix="backbone.",
    layer_prefix="backbone.layers.{i}.",
    defaults={
        **UNTIED, "norm_eps": 1e-5, "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8,
        "ssm_state_size": 128, "conv_kernel": 4, "use_conv_bias": True, "mlp_hidden_act": "relu2",
        "moe_intermediate_size": 7688, "moe_shared_expert_intermediate_size": 7688, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    fixed={
        "attention_bias": False, "mlp_bias": False, "use_bias": False, "mamba_proj_bias": False, "n_group": 1,
        "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "sliding_window": None,
    },
    rope_kinds=(),
    writes_vocab_size=True,
    sizes=nemotron_sizes,
    more_keys=nemotron_keys,
    extra_layers=True,
    variant=lambda config: not has_expert_layers(config),
    example="Nemotron-H 4B to 56B, Nemotron Nano 2",
)  # fmt: skip
_NEMOTRON_H_MOE = replace(
    _NEMOTRON_H,
    architecture="nemotron_h_moe",
    layer={
        **{role: part for role, part in _NEMOTRON_H.layer.items() if role not in ("ffn_up", "ffn_down")},
        **where(_NEMOTRON_EXPERTS, _nemotron_layers("moe")),
    },
    variant=has_expert_layers,
    example="Nemotron 3 Nano 30B-A3B",
)

# --- the table ------------------------------------------------------------------------------------------------

MAMBA2 = (_FALCON_H1, _NEMOTRON_H, _NEMOTRON_H_MOE)
