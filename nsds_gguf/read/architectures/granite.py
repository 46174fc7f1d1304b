"""Granite 3 and 4; Mamba, whose state spaces Granite 4 H has between its attention."""

from __future__ import annotations

from dataclasses import replace

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ...records import kv
from .experts import (
    stacked_forms,
)
from .family import (
    Config,
    Family,
    Key,
    Part,
    Parts,
    Sizes,
    always,
    biased,
    counts,
    flag,
    no_sizes,
    unless,
    where,
)
from .parts import (
    ALL_ATTENTION,
    ALL_FFN,
    ATTENTION_NORM,
    FFN_NORM,
    LLAMA_LAYER,
    LLAMA_ROPE_KINDS,
    OUTSIDE,
    RMS,
    ROTATED_ATTENTION,
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
    return {**counts(numbers), "ssm.dt_b_c_rms": kv(False, GGUFValueType.BOOL)}


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
    keys |= counts(numbers)
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

GRANITE = (
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
)  # fmt: skip
