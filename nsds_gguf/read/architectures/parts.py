"""Parts and settings that several families share; those of experts are in ``experts``."""

from __future__ import annotations

from dataclasses import replace

from .family import Part, Parts

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

FUSED_QKV = ("qkv", "embd")
QKV = "attn_q attn_k attn_v"
ALL_ATTENTION = f"{QKV} attn_output"
ALL_FFN = "ffn_gate ffn_up ffn_down"

# --- settings -------------------------------------------------------------------------------------------------

UNTIED = {"tie_word_embeddings": False}
RMS = {**UNTIED, "norm_eps": 1e-6}
LAYER_NORM = {"norm_eps": 1e-5}
LLAMA_ROPE_KINDS = ("default", "linear", "yarn", "llama3")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")  # ggml's GELU is the tanh form
