"""Hyperparameters (hparams) of a decoder, from the architecture, keys, tensor names and shapes of a GGUF.

The same function serves Hugging Face folders and GGUFs, so that both give the same scores and plans. It refuses
nothing: keys state most hparams of an unknown architecture too, and the others become 0, 1 or ``unknown``, which later
stages treat as not supported.

Facts that a GGUF does not store (activation function, scales fixed in code) come from llama.cpp's graphs in
``src/models/*.cpp``, as tables of exceptions from the common case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from gguf.gguf_writer import GGUFValue

from ..records import Hparams, Tensor

NormKind = Literal["rms", "layer", "unknown"]
RopeKind = Literal["norm", "neox", "none"]
ExpertScores = Literal["softmax", "sigmoid", "unknown"]

# FFN activation where it is not SiLU, llama.cpp's default (``LLM_FFN_*`` in src/models/*.cpp). ``unknown``: moment
# propagation has no formula for it.
ACTIVATIONS = {
    **dict.fromkeys(
        (
            "bert", "bloom", "codeshell", "falcon", "gemma", "gemma-embedding", "gemma2", "gemma3", "gemma3n", "gemma4",
            "gemma4-assistant", "gpt2", "gptj", "gptneox", "grok", "jina-bert-v2", "jina-bert-v3", "modern-bert", "mpt",
            "nomic-bert-moe", "phi2", "spark2_5", "starcoder", "starcoder2",
        ),
        "gelu",
    ),
    **dict.fromkeys(("arcee", "jais2", "nemotron", "nemotron_h", "nemotron_h_moe", "plm"), "relu2"),
    "smallthinker": "relu",
    **dict.fromkeys(("gpt-oss", "minimax-m3"), "swiglu_oai"),
    **dict.fromkeys(("apertus", "kimi-k3", "t5", "t5encoder"), "unknown"),
}  # fmt: skip

# Architectures whose graphs multiply the embedding by sqrt(n_embd), or by a constant that a key can override.
SQRT_EMBEDDING = ("afmoe", "gemma", "gemma-embedding", "gemma2", "gemma3", "gemma3n", "gemma4")
EMBEDDING_SCALES = {"minicpm": 12.0, "minicpm3": 12.0, "grok": 78.38367176906169}

# Residual updates are scaled by ``1.4 / sqrt(n_layers)``, which a key can override.
DEPTH_SCALED = ("minicpm", "minicpm3")
DEPTH_SCALE = 1.4

# Factor of the attention logits where it is not ``1 / sqrt(head_dim)``.
UNSCALED_ATTENTION = ("gemma3n", "gemma4")
# The 27B models, recognised by their number of layers, scale by ``1 / sqrt(n_embd / n_heads)``.
WIDTH_SCALED_ATTENTION = {"gemma2": 46, "gemma3": 62}

# The only architecture whose graph reads ``use_parallel_residual``; elsewhere the norms of the layer decide.
PARALLEL_KEY = ("gptneox",)

# Architectures with NORM rope (``llama_model_rope_type`` in src/llama-model.cpp), and without rope (position embeddings
# or biases on the logits); all others have NEOX rope.
NORM_ROPE = (
    "arcee", "arctic", "baichuan", "bailingmoe", "chameleon", "chatglm", "cohere2", "command-r", "deci", "deepseek",
    "deepseek2", "ernie4_5", "ernie4_5-moe", "glm4", "granite", "granitehybrid", "granitemoe", "internlm2", "llada",
    "llama", "llama4", "minicpm", "mistral3", "neo-bert", "olmo", "plm", "smollm3", "starcoder", "xverse",
)  # fmt: skip
NO_ROPE = ("bert", "bloom", "gpt2", "jais", "jina-bert-v2", "mpt", "refact", "starcoder", "t5", "t5encoder")

DEFAULT_THETA = 10000.0  # llama.cpp's default

# Architectures that divide the output's logits by ``logit_scale``; others multiply.
DIVIDED_LOGITS = ("granite", "granitemoe", "granitehybrid", "minicpm")

# Function from a router's logits to scores, and whether the weights of the chosen experts are divided by their sum
# (``build_moe_ffn`` in src/llama-graph.cpp and its callers); ``None``: a key decides. Architectures that are not listed
# route otherwise, or have not been examined.
ROUTING: dict[str, tuple[ExpertScores | None, bool | None]] = {
    **dict.fromkeys(
        (
            "ernie4_5-moe",
            "granitehybrid",
            "granitemoe",
            "hunyuan-moe",
            "llama",
            "qwen35moe",
            "qwen3moe",
            "qwen3next",
            "qwen3vlmoe",
        ),
        ("softmax", True),
    ),
    **dict.fromkeys(("deepseek", "olmoe", "qwen2moe"), ("softmax", False)),
    "bailingmoe": ("softmax", None),
    **dict.fromkeys(("dots1", "glm4moe"), (None, None)),
    **dict.fromkeys(("lfm2moe", "minimax-m2"), (None, True)),
}
GATING: dict[int, ExpertScores] = {1: "softmax", 2: "sigmoid"}  # ``expert_gating_func``: llama_expert_gating_func_type


def read_hparams(architecture: str, metadata: Mapping[str, GGUFValue], tensors: Sequence[Tensor]) -> Hparams:
    """Return the hparams of a model.

    Args:
        architecture: ``general.architecture``; an unknown one is treated as a plain decoder.
        metadata: GGUF keys; only those of the architecture count. Of a key with one number per layer, the largest
            counts; later stages derive a layer's own from the shapes of its tensors.
        tensors: names and shapes; reads no weights.

    Returns:
        The hparams; 0 where neither keys nor shapes state one.

    """
    keys = _Keys(architecture, metadata)
    by_name = {tensor.name: tensor for tensor in tensors}
    embedding = by_name.get("token_embd.weight")
    n_counted = keys.integer("block_count") - keys.integer("nextn_predict_layers")
    n_layers = n_counted or 1 + max((t.layer for t in tensors if t.layer is not None), default=-1)
    n_embd = keys.integer("embedding_length") or (embedding.n_cols if embedding else 0)
    n_heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length") or (n_embd // n_heads if n_heads else 0)
    norm, eps = _norm(keys)
    expert_scores, norm_topk_prob = _routing(architecture, keys)
    return Hparams(
        n_layers=n_layers,
        n_embd=n_embd,
        n_ff=keys.integer("feed_forward_length") or _widest(tensors, ("ffn_down", "ffn_down_exps")),
        n_heads=n_heads,
        n_kv_heads=keys.integer("attention.head_count_kv") or n_heads,
        head_dim=head_dim,
        n_vocab=embedding.shape[0] if embedding else keys.integer("vocab_size"),
        n_ctx_train=keys.integer("context_length"),
        norm_eps=eps,
        activation=ACTIVATIONS.get(architecture, "silu"),
        qk_norm=any(tensor.role in ("attn_q_norm", "attn_k_norm") for tensor in tensors),
        value_dim=keys.integer("attention.value_length") or (n_embd // n_heads if n_heads else 0),
        norm=norm,
        parallel_residual=architecture in PARALLEL_KEY and bool(keys.first("use_parallel_residual", True)),
        embedding_scale=_embedding_scale(architecture, keys, n_embd),
        residual_scale=_residual_scale(architecture, keys, n_layers),
        attention_scale=_attention_scale(architecture, keys, n_layers, n_embd, n_heads),
        n_experts=keys.integer("expert_count"),
        n_experts_used=keys.integer("expert_used_count"),
        experts_scale=keys.number("expert_weights_scale") or 1.0,
        expert_scores=expert_scores,
        norm_topk_prob=norm_topk_prob,
        rope=_rope(architecture),
        rope_dim=keys.integer("rope.dimension_count") or head_dim,
        rope_theta=keys.number("rope.freq_base") or DEFAULT_THETA,
        rope_factor=_rope_factor(keys),
        attn_logit_softcapping=keys.number("attn_logit_softcapping"),
        final_logit_softcapping=keys.number("final_logit_softcapping"),
        logit_scale=_logit_scale(architecture, keys),
    )


def _routing(architecture: str, keys: _Keys) -> tuple[ExpertScores, bool]:
    """Return the score function of a router, and whether the chosen scores are divided by their sum."""
    if architecture not in ROUTING or keys.integer("expert_group_count") > 1:  # chosen within chosen groups
        return "unknown", False
    scores, normed = ROUTING[architecture]
    scores = GATING.get(keys.integer("expert_gating_func"), "unknown") if scores is None else scores
    return scores, bool(keys.first("expert_weights_norm", False)) if normed is None else normed


def _rope(architecture: str) -> RopeKind:
    if architecture in NO_ROPE:
        return "none"
    return "norm" if architecture in NORM_ROPE else "neox"


def _rope_factor(keys: _Keys) -> float:
    """Return the divisor of positions in linear scaling."""
    kind = keys.first("rope.scaling.type")
    kind = kind.decode(errors="replace") if isinstance(kind, bytes) else kind
    return keys.number("rope.scaling.factor") or 1.0 if kind == "linear" else 1.0


def _logit_scale(architecture: str, keys: _Keys) -> float:
    scale = keys.number("logit_scale") or 1.0
    return 1 / scale if architecture in DIVIDED_LOGITS else scale


class _Keys:
    """Keys of one architecture by name without its prefix; of a list, the largest entry counts."""

    def __init__(self, architecture: str, metadata: Mapping[str, GGUFValue]) -> None:
        self.architecture, self.metadata = architecture, metadata

    def first(self, name: str, default: Any = None) -> Any:
        entry = self.metadata.get(f"{self.architecture}.{name}")
        return default if entry is None else entry.value

    def number(self, name: str) -> float:
        """Return a finite number, the largest of a list; 0 without one.

        Fractions are rounded to float32, as in a GGUF, so that a folder and its GGUF give the same value.
        """
        value = self.first(name)
        values = value if isinstance(value, list | tuple) else [value]
        with np.errstate(over="ignore"):
            numbers = [float(np.float32(v)) if isinstance(v, float) else v for v in values]
        return max((float(v) for v in numbers if isinstance(v, int | float) and math.isfinite(v)), default=0.0)

    def integer(self, name: str) -> int:
        return int(self.number(name))


def _norm(keys: _Keys) -> tuple[NormKind, float]:
    """Return the kind of the stream's norms and their epsilon; the name of the epsilon key decides the kind."""
    kinds: tuple[tuple[NormKind, str], ...] = (("rms", "layer_norm_rms_epsilon"), ("layer", "layer_norm_epsilon"))
    for kind, name in kinds:
        if keys.first(f"attention.{name}") is not None:
            return kind, keys.number(f"attention.{name}")
    return "unknown", 0.0


def _widest(tensors: Sequence[Tensor], roles: Sequence[str]) -> int:
    return max((tensor.n_cols for tensor in tensors if tensor.role in roles), default=0)


def _embedding_scale(architecture: str, keys: _Keys, n_embd: int) -> float:
    fixed = math.sqrt(n_embd) if architecture in SQRT_EMBEDDING else EMBEDDING_SCALES.get(architecture, 1.0)
    return keys.number("embedding_scale") or fixed


def _residual_scale(architecture: str, keys: _Keys, n_layers: int) -> float:
    fixed = DEPTH_SCALE / math.sqrt(n_layers) if architecture in DEPTH_SCALED and n_layers else 1.0
    return keys.number("residual_scale") or fixed


def _attention_scale(architecture: str, keys: _Keys, n_layers: int, n_embd: int, n_heads: int) -> float | None:
    if architecture in UNSCALED_ATTENTION:
        return 1.0
    if WIDTH_SCALED_ATTENTION.get(architecture) == n_layers and n_heads:
        return 1.0 / math.sqrt(n_embd / n_heads)
    return keys.number("attention.scale") or None
