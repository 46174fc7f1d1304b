"""Experts, where several families have them alike: parts, settings, keys, and which layers have them."""

from __future__ import annotations

from gguf import GGUFValueType
from gguf.constants import ExpertGatingFuncType
from gguf.gguf_writer import GGUFValue

from ...records import kv
from .family import Config, Key, Part, Parts, Sizes, counts, flag

# --- parts ----------------------------------------------------------------------------------------------------


def stacked_forms(place: str, own: str = "mlp", mlx: str = "mlp") -> tuple[Part, ...]:
    """Return how ``gate``, ``up`` or ``down`` (the place) of all experts are saved in one tensor.

    Transformers 5 keeps gate and up in one, ``(experts, 2 ff, embd)``, in the block ``own``; MLX each by itself in the
    block ``mlx``.
    """
    wide, narrow = ("experts", "ff_exp", "embd"), ("experts", "embd", "ff_exp")
    if place == "down":
        return Part(f"{own}.experts.down_proj", narrow, suffix=""), Part(f"{mlx}.switch_mlp.down_proj", narrow)
    half = "first_half_exps" if place == "gate" else "second_half_exps"
    fused = Part(f"{own}.experts.gate_up_proj", wide, half, ("experts", "2ff_exp", "embd"), suffix="")
    return fused, Part(f"{mlx}.switch_mlp.{place}_proj", wide)


EXPERTS: Parts = {
    "ffn_gate_inp": Part("mlp.gate", ("experts", "embd")),
    "ffn_gate_exps": Part(
        "mlp.experts.{e}.gate_proj", ("experts", "ff_exp", "embd"), also=stacked_forms("gate")
    ),
    "ffn_up_exps": Part("mlp.experts.{e}.up_proj", ("experts", "ff_exp", "embd"), also=stacked_forms("up")),
    "ffn_down_exps": Part(
        "mlp.experts.{e}.down_proj", ("experts", "embd", "ff_exp"), also=stacked_forms("down")
    ),
}  # fmt: skip

SHARED_EXPERT: Parts = {  # Qwen's, behind a gate
    "ffn_gate_inp_shexp": Part("mlp.shared_expert_gate", ("one", "embd")),
    "ffn_gate_shexp": Part("mlp.shared_expert.gate_proj", ("ff_shexp", "embd")),
    "ffn_up_shexp": Part("mlp.shared_expert.up_proj", ("ff_shexp", "embd")),
    "ffn_down_shexp": Part("mlp.shared_expert.down_proj", ("embd", "ff_shexp")),
}


def numbered_experts(block: str, width: str = "ff_exp") -> Parts:
    """Return Mixtral's experts: ``w1`` (gate), ``w3`` (up) and ``w2`` (down) of each in the block ``block``.

    Transformers 5 saves those of Mixtral and MiniMax stacked in the block ``mlp``.
    """
    wide, narrow = ("experts", width, "embd"), ("experts", "embd", width)
    own = block if block == "feed_forward" else "mlp"
    return {
        f"ffn_{place}_exps": Part(f"{block}.experts.{{e}}.{name}", shape, also=stacked_forms(place, own, block))
        for place, name, shape in (("gate", "w1", wide), ("up", "w3", wide), ("down", "w2", narrow))
    }


SCORE_BIAS: Parts = {
    "exp_probs_b.bias": Part("mlp.gate.e_score_correction_bias", ("experts",), suffix=""),
}

SHARED_EXPERTS: Parts = {
    "ffn_gate_shexp": Part("mlp.shared_experts.gate_proj", ("ff_shexp", "embd"), when=flag("n_shared_experts")),
    "ffn_up_shexp": Part("mlp.shared_experts.up_proj", ("ff_shexp", "embd"), when=flag("n_shared_experts")),
    "ffn_down_shexp": Part("mlp.shared_experts.down_proj", ("embd", "ff_shexp"), when=flag("n_shared_experts")),
}

# --- settings, sizes and keys ---------------------------------------------------------------------------------

EXPERT_FF_KEY = Key("expert_feed_forward_length", "moe_intermediate_size", GGUFValueType.UINT32)

SHARED_FF_KEY = Key(
    "expert_shared_feed_forward_length", "shared_expert_intermediate_size", GGUFValueType.UINT32
)  # fmt: skip

ROUTED_DEFAULTS = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True}

ROUTED_KEYS = (
    EXPERT_FF_KEY,
    Key("expert_weights_scale", "routed_scaling_factor"),
    Key("expert_weights_norm", "norm_topk_prob", GGUFValueType.BOOL),
)


def is_dense_layer(config: Config, layer: int) -> bool:
    """Return whether a layer comes before the first with experts."""
    return not config.get("num_experts") or layer < (config.get("first_k_dense_replace") or 0)


def is_sparse_layer(config: Config, layer: int) -> bool:
    """Return whether a layer has experts."""
    return not is_dense_layer(config, layer)


def shared_sizes(config: Config) -> dict[str, int]:
    """Return the width of the shared experts, which are one feed-forward block."""
    return {"ff_shexp": (config.get("n_shared_experts") or 0) * config["moe_intermediate_size"]}


def expert_keys(config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return the keys of routed and shared experts behind leading dense layers."""
    return counts({
        "expert_group_count": config.get("n_group"),
        "expert_group_used_count": config.get("topk_group"),
        "expert_shared_count": config.get("n_shared_experts") or 0,
        "leading_dense_block_count": sum(is_dense_layer(config, i) for i in range(sizes["layers"])),
    })  # fmt: skip


def gating_key(name: str) -> dict[str, GGUFValue]:
    """Return the key of the function from a router's outputs to scores, ``SOFTMAX`` or ``SIGMOID``."""
    return {"expert_gating_func": kv(int(ExpertGatingFuncType[name]), GGUFValueType.UINT32)}


def sigmoid_keys(config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return the keys of those that route like DeepSeek-V3."""
    return {**expert_keys(config, sizes), **gating_key("SIGMOID")}
