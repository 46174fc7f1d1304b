"""Parts and settings that several families share."""

from __future__ import annotations

from dataclasses import replace

from gguf import GGUFValueType

from .family import Key, Part, Parts

# --- parts ----------------------------------------------------------------------------------------------------

OUTSIDE: Parts = {
    "token_embd": Part("model.embed_tokens", ("vocab", "embd")),
    "output_norm": Part("model.norm", ("embd",)),
    "output": Part("lm_head", ("vocab", "embd")),
}
ATTENTION_NORM: Parts = {"attn_norm": Part("input_layernorm", ("embd",))}
ATTENTION: Parts = {
    "attn_q": Part("self_attn.q_proj", ("q", "embd")),
    "attn_k": Part("self_attn.k_proj", ("kv", "embd")),
    "attn_v": Part("self_attn.v_proj", ("kv", "embd")),
    "attn_output": Part("self_attn.o_proj", ("embd", "q")),
}
# ggml's NORM rope rotates adjacent channels, transformers the two halves of a head (NEOX).
ROTATED_ATTENTION: Parts = {
    **ATTENTION,
    "attn_q": replace(ATTENTION["attn_q"], order="rope_q"),
    "attn_k": replace(ATTENTION["attn_k"], order="rope_k"),
}
QK_NORMS: Parts = {
    "attn_q_norm": Part("self_attn.q_norm", ("head",)),
    "attn_k_norm": Part("self_attn.k_norm", ("head",)),
}
WIDE_QK_NORMS: Parts = {
    "attn_q_norm": Part("self_attn.q_norm", ("q",)),
    "attn_k_norm": Part("self_attn.k_norm", ("kv",)),
}
FFN_NORM: Parts = {"ffn_norm": Part("post_attention_layernorm", ("embd",))}
FFN: Parts = {
    "ffn_gate": Part("mlp.gate_proj", ("ff", "embd")),
    "ffn_up": Part("mlp.up_proj", ("ff", "embd")),
    "ffn_down": Part("mlp.down_proj", ("embd", "ff")),
}


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
SANDWICH_NORMS: Parts = {  # Gemma 2 and 3: norms before and after both blocks
    "post_attention_norm": Part("post_attention_layernorm", ("embd",)),
    "ffn_norm": Part("pre_feedforward_layernorm", ("embd",)),
    "post_ffw_norm": Part("post_feedforward_layernorm", ("embd",)),
}
POST_NORMS: Parts = {  # OLMo 2: norms after both blocks only
    "post_attention_norm": Part("post_attention_layernorm", ("embd",)),
    "post_ffw_norm": Part("post_feedforward_layernorm", ("embd",)),
}

LAYER: Parts = {**ATTENTION_NORM, **ATTENTION, **FFN_NORM, **FFN}
LLAMA_LAYER: Parts = {**ATTENTION_NORM, **ROTATED_ATTENTION, **FFN_NORM, **FFN}

QKV = "attn_q attn_k attn_v"
ALL_ATTENTION = f"{QKV} attn_output"
ALL_FFN = "ffn_gate ffn_up ffn_down"

# --- settings -------------------------------------------------------------------------------------------------

UNTIED = {"tie_word_embeddings": False}
RMS = {**UNTIED, "norm_eps": 1e-6}
LAYER_NORM = {"norm_eps": 1e-5}
LLAMA_ROPE_KINDS = ("default", "linear", "yarn", "llama3")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")  # ggml's GELU is the tanh form

EXPERT_FF_KEY = Key("expert_feed_forward_length", "moe_intermediate_size", GGUFValueType.UINT32)
SHARED_FF_KEY = Key(
    "expert_shared_feed_forward_length", "shared_expert_intermediate_size", GGUFValueType.UINT32
)  # fmt: skip
