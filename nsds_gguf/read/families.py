"""Model families as tables: which class is which architecture, and where each tensor comes from.

A family states its differences from ``Family``'s defaults; nothing is overridden. Checkpoint names appear only in
this package: everything later speaks GGUF names.

Sources: transformers' modeling files for the checkpoint side, llama.cpp ``src/models/*.cpp`` for what each architecture
loads (a bias or rope kind that it would not load is an error here, not a loss there).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import UnsupportedError

# GGUF name -> checkpoint name; {i} is the layer. Weights that every supported decoder has.
GLOBAL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "attn_q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "attn_k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "attn_v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "attn_output.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "ffn_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "ffn_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "ffn_down.weight": "model.layers.{i}.mlp.down_proj.weight",
}
QK_NORM_TENSORS = {
    "attn_q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "attn_k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
}

# Checkpoint tensors that hold nothing the GGUF needs: tables that rope recomputes, saved by old transformers.
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")

ALWAYS = "always"

# transformers' defaults: of every supported class; of those that can have a window; of those where only the layers from
# ``max_window_layers`` on have it.
DEFAULT_NORM_EPS = 1e-6
DEFAULT_WINDOW = 4096
DEFAULT_FULL_LAYERS = 28


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp and the checkpoint classes that convert to it.

    Attributes:
        classes: names under ``architectures`` in config.json.
        architecture: llama.cpp's name.
        biases: role -> config flag that switches the bias on, or ``ALWAYS``.
        rope_kinds: rope scaling kinds that llama.cpp computes for this architecture.
        permutes_qk: rows of q and k are interleaved within each head (ggml's rope order "norm").
        qk_norm: has norms on the heads' queries and keys.
        fixed_head_dim: llama.cpp's loader demands ``head_dim * n_heads == n_embd``.
        window: config flag that switches ``sliding_window`` on, or ``ALWAYS``; ``None``: the class has no window.
        writes_rope_dim: the architecture's keys include ``rope.dimension_count`` and ``vocab_size``.
    """

    classes: tuple[str, ...]
    architecture: str
    biases: Mapping[str, str] = field(default_factory=dict)
    rope_kinds: tuple[str, ...] = ("default", "linear", "yarn")
    permutes_qk: bool = False
    qk_norm: bool = False
    fixed_head_dim: bool = False
    window: str | None = None
    writes_rope_dim: bool = False

    @property
    def layer_tensors(self) -> dict[str, str]:
        """GGUF name within a layer -> checkpoint name template."""
        return {**LAYER_TENSORS, **(QK_NORM_TENSORS if self.qk_norm else {})}


_QKV = ("attn_q", "attn_k", "attn_v")
_LLAMA_ROPE_KINDS = ("default", "linear", "yarn", "llama3")

FAMILIES = (
    Family(
        classes=("LlamaForCausalLM",),
        architecture="llama",
        biases={
            **dict.fromkeys((*_QKV, "attn_output"), "attention_bias"),
            **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "mlp_bias"),
        },
        rope_kinds=_LLAMA_ROPE_KINDS,
        permutes_qk=True,
        writes_rope_dim=True,
    ),
    Family(
        classes=("MistralForCausalLM",),
        architecture="llama",
        rope_kinds=_LLAMA_ROPE_KINDS,
        permutes_qk=True,
        window=ALWAYS,
        writes_rope_dim=True,
    ),
    Family(
        classes=("Qwen2ForCausalLM",),
        architecture="qwen2",
        biases=dict.fromkeys(_QKV, ALWAYS),
        fixed_head_dim=True,
        window="use_sliding_window",
    ),
    Family(
        classes=("Qwen3ForCausalLM",),
        architecture="qwen3",
        biases=dict.fromkeys(_QKV, "attention_bias"),
        qk_norm=True,
        window="use_sliding_window",
    ),
)


def supported_classes() -> tuple[str, ...]:
    """Return every checkpoint class that converts."""
    return tuple(name for family in FAMILIES for name in family.classes)


def find_family(class_name: str) -> Family:
    """Return the family of a checkpoint class; raises ``UnsupportedError`` naming the nearest supported one."""
    for family in FAMILIES:
        if class_name in family.classes:
            return family
    nearest = difflib.get_close_matches(class_name, supported_classes(), n=1, cutoff=0.0)
    raise UnsupportedError(
        f"config.json: class {class_name} is not supported; nearest is {nearest[0]}, "
        f"all: {', '.join(supported_classes())}"
    )
