"""Command R and R7B."""

from __future__ import annotations

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ...records import kv
from .family import (
    Config,
    Family,
    Key,
    Part,
    Sizes,
    Window,
    flag,
)
from .parts import (
    ATTENTION,
    ATTENTION_NORM,
    FFN,
    LAYER_NORM,
    OUTSIDE,
)

_LOGIT_SCALE_KEY = Key("logit_scale", "logit_scale")


def unscaled_rope(_config: Config, _sizes: Sizes) -> dict[str, GGUFValue]:
    """Return the key that says that rope is not scaled."""
    return {"rope.scaling.type": kv("none", GGUFValueType.STRING)}


def command_r_keys(config: Config, sizes: Sizes) -> dict[str, GGUFValue]:
    """Return Command R's keys; the context it was trained for is its ``model_max_length``, where it has one."""
    n_ctx = config.get("model_max_length") or sizes["ctx"]
    return {**unscaled_rope(config, sizes), "context_length": kv(n_ctx, GGUFValueType.UINT32)}


def has_many_layers(config: Config) -> bool:
    """Return whether llama.cpp expects q and k norms in a Command-R model (command-r.cpp)."""
    return int(config["num_hidden_layers"]) >= 64


COHERE = (
    Family(
        classes=("CohereForCausalLM",),
        architecture="command-r",
        layer={
            **ATTENTION_NORM,
            **ATTENTION,
            "attn_q_norm": Part("self_attn.q_norm", ("heads", "head"), when=flag("use_qk_norm")),
            "attn_k_norm": Part("self_attn.k_norm", ("kv_heads", "head"), when=flag("use_qk_norm")),
            **FFN,
        },
        outside=OUTSIDE,
        defaults={**LAYER_NORM, "logit_scale": 0.0625, "use_qk_norm": False, "rope_theta": 5e5},
        keys=(_LOGIT_SCALE_KEY,),
        norm="layer",
        fixed={"attention_bias": False, "use_qk_norm": has_many_layers},
        fixed_head_dim=True,
        rope_kinds=("default",),
        output="tied",
        more_keys=command_r_keys,
        example="Command R, Aya",
    ),
    Family(
        classes=("Cohere2ForCausalLM",),
        architecture="cohere2",
        layer={**ATTENTION_NORM, **ATTENTION, **FFN},
        outside=OUTSIDE,
        defaults={**LAYER_NORM, "logit_scale": 0.0625, "sliding_window": 4096},
        keys=(_LOGIT_SCALE_KEY,),
        norm="layer",
        fixed={"attention_bias": False, "use_qk_norm": False},
        fixed_head_dim=True,
        rope_kinds=("default",),
        window=Window(period=4),
        writes_rope_dim=True,
        writes_vocab_size=True,
        output="tied",
        more_keys=unscaled_rope,
        example="Command R7B",
    ),
)  # fmt: skip
