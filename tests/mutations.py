"""Wrong conversions of a right model: what each would write if one thing were forgotten or taken for another.

A logits test is worth what it would notice. ``mutations`` makes every error that applies to a model, so that tests can
assert how far each of them moves the logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nsds_gguf.records import FromArray, Model, Tensor, kv

Edit = Callable[[NDArray[np.float32]], NDArray[np.float32]]

# Keys of the architecture by what may happen to them. Some that llama.cpp demands have no "left out".
_OPTIONAL_KEYS = (
    "attention.clamp_kqv",
    "attention.scale",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_weights_scale",
    "final_logit_softcapping",
    "residual_scale",
    "rope.freq_base",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.yarn_log_multiplier",
)
_CHANGED_KEYS = {
    "rope.freq_base": (1.25, "25 % larger"),
    "rope.scaling.factor": (1.05, "5 % larger"),
    "attention.layer_norm_epsilon": (2, "doubled"),
    "attention.layer_norm_rms_epsilon": (2, "doubled"),
    "attention.sliding_window": (2, "doubled"),
    "expert_used_count": (2, "doubled"),
    "logit_scale": (0.5, "halved"),
}
_ROPE_KEYS = ("dimension_count", "freq_base", "freq_base_swa", "scaling.type", "scaling.original_context_length")
# llama.cpp computes no window for Phi 3, has no layer norm in Nemotron-H's own layers, and reads no epsilon for
# Qwen2-VL (qwen2vl.cpp): it takes 0.
_UNUSED_KEYS = {
    "phi3": ("attention.sliding_window",),
    "qwen2vl": ("attention.layer_norm_rms_epsilon",),
    **dict.fromkeys(("nemotron_h", "nemotron_h_moe"), ("attention.layer_norm_epsilon",)),
}

# Architectures whose rope rotates neighbouring channels (llama.cpp, llama_model_rope_type: NORM).
_NEIGHBOURS = (
    "llama", "granite", "granitemoe", "internlm2", "olmo", "smollm3", "command-r", "cohere2", "glm4",
    "ernie4_5", "ernie4_5-moe", "mistral3",
)  # fmt: skip

_DEFAULT_LOCAL_THETA = 10000.0  # llama.cpp's (llama-hparams.h, rope_freq_base_train_swa)

# Architectures that may rotate a part of each head.
_PARTIAL = ("glm4", "glm4moe", "gptneox", "minimax-m2", "qwen35", "qwen35moe", "qwen3next", "phi2", "phi3", "stablelm")

# Pairs of roles that an error may exchange.
_PAIRS = {
    "gate and up exchanged": ("ffn_gate", "ffn_up"),
    "gates and ups of experts exchanged": ("ffn_gate_exps", "ffn_up_exps"),
    "gate and up of the shared expert exchanged": ("ffn_gate_shexp", "ffn_up_shexp"),
    "norms exchanged": ("attn_norm", "ffn_norm"),
    "norms behind the blocks exchanged": ("post_attention_norm", "post_ffw_norm"),
}


def mutations(model: Model) -> dict[str, Model]:
    """Return the mutants of a model by what is wrong with them."""
    roles = {tensor.role for tensor in model.tensors}
    mutants = {
        what: _exchanged(model, *pair) for what, pair in _PAIRS.items() if roles.issuperset(pair)
    }  # fmt: skip
    return (
        mutants
        | _key_mutations(model)
        | _tie_mutations(model)
        | _rope_mutations(model)
        | _attention_mutations(model)
        | _norm_mutations(model)
        | _bias_mutations(model)
        | _expert_mutations(model)
        | _family_mutations(model)
    )


def _key_mutations(model: Model) -> dict[str, Model]:
    given = _computing_keys(model)
    mutants = {f"{name} left out": _without_key(model, name) for name in _OPTIONAL_KEYS if name in given}
    for name, (factor, what) in _CHANGED_KEYS.items():
        if name in given:
            mutants[f"{name} {what}"] = _scaled_key(model, name, factor)
    return mutants


def _computing_keys(model: Model) -> set[str]:
    """Return the names of the keys, less the architecture's, that llama.cpp computes with."""
    prefix = f"{model.architecture}."
    given = {key.removeprefix(prefix) for key in model.metadata} - set(_UNUSED_KEYS.get(model.architecture, ()))
    if "rope.scaling.type" in given and model.metadata[f"{prefix}rope.scaling.type"].value == "none":
        given -= {"rope.scaling.factor"}
    finetuned = model.metadata.get(f"{prefix}rope.scaling.finetuned")  # Granite 4: whether there is rope at all
    return given - {"rope.freq_base"} if finetuned is not None and not finetuned.value else given


def _tie_mutations(model: Model) -> dict[str, Model]:
    if not model.is_tied:
        tensors = tuple(tensor for tensor in model.tensors if not tensor.name.startswith("output."))
        return {"tied": replace(model, tensors=tensors)}
    embedding = model.by_name["token_embd.weight"]
    other = _with_array(embedding, embedding.load()[::-1])
    return {"untied": replace(model, tensors=(*model.tensors, replace(other, name="output.weight", role="output")))}


def _rope_mutations(model: Model) -> dict[str, Model]:
    given = {name: model.metadata.get(f"{model.architecture}.rope.{name}") for name in _ROPE_KEYS}
    values = {name: entry.value for name, entry in given.items() if entry is not None}
    mutants = {}
    if model.architecture in _PARTIAL and values["dimension_count"] < model.hparams.head_dim:
        mutants["rope.dimension_count left out"] = _without_key(model, "rope.dimension_count")
    if "freq_base_swa" in values and values["freq_base_swa"] not in (values["freq_base"], _DEFAULT_LOCAL_THETA):
        mutants["rope.freq_base_swa left out"] = _without_key(model, "rope.freq_base_swa")
    original = "rope.scaling.original_context_length"
    if values.get("scaling.type") == "yarn":
        mutants["rope.scaling.type left out"] = _without_key(model, "rope.scaling.type")  # llama.cpp: linear
        mutants[f"{original} left out"] = _without_key(model, original)
    if values.get("scaling.type") == "longrope":  # 64 for 256 and 256 for 64: the other side of llama.cpp's context
        other = 2**14 // values["scaling.original_context_length"]
        mutants[f"{original} on the other side"] = _with_value(model, original, other)
    if "rope_freqs.weight" in model.by_name:
        tensors = tuple(tensor for tensor in model.tensors if tensor.name != "rope_freqs.weight")
        mutants["rope_freqs left out"] = replace(model, tensors=tensors)
        if model.architecture == "gemma4":  # 1, and for the channels that stand still as good as infinite
            mutants["rope_freqs of ones"] = _edited(model, "rope_freqs", np.ones_like)
        else:
            mutants["rope_freqs halved"] = _edited(model, "rope_freqs", lambda factors: np.maximum(factors / 2, 1))
    if "rope_factors_long.weight" in model.by_name:
        mutants["long and short rope factors exchanged"] = _exchanged(
            model, "rope_factors_long", "rope_factors_short"
        )  # fmt: skip
        mutants["rope factors of ones"] = _edited(model, "rope_factors_.*", np.ones_like)
    return mutants


def _attention_mutations(model: Model) -> dict[str, Model]:
    roles = {tensor.role for tensor in model.tensors}
    has_rope = "rope.freq_base" in _computing_keys(model)
    mutants = {}
    if roles.issuperset(("attn_q", "attn_k")) and has_rope:
        mutants["q and k in the other order"] = _edited(model, r"attn_[qk]", _reordered(model))
        if "attn_q.bias" in roles:
            mutants["q and k biases in the other order"] = _edited(model, r"attn_[qk]\.bias", _reordered(model))
    if "attn_qkv" in roles:
        head_dim = model.hparams.head_dim
        mutants["q, k, v taken for k, v, q"] = _edited(model, "attn_qkv", lambda rows: np.roll(rows, head_dim, axis=0))
        mutants["q, k, v by head"] = _edited(model, "attn_qkv", lambda rows: _by_head(rows, head_dim))
    for role in ("attn_q_norm", "attn_k_norm"):
        if any(tensor.role == role and len(tensor.shape) == 2 for tensor in model.tensors):
            mutants[f"{role}: heads in another order"] = _edited(model, role, lambda rows: rows[::-1])
    return mutants


def _norm_mutations(model: Model) -> dict[str, Model]:
    roles = sorted({tensor.role for tensor in model.tensors if tensor.role.endswith("norm")})
    mutants = {f"{role} of ones": _edited(model, re.escape(role), np.ones_like) for role in roles}
    if model.architecture.startswith(("gemma", "qwen3next", "qwen35")):
        mutants["norms without their 1"] = _edited(model, "(?!ssm_).*norm", lambda gains: gains - 1)
    return mutants


def _bias_mutations(model: Model) -> dict[str, Model]:
    roles = sorted({tensor.role for tensor in model.tensors if tensor.role.endswith(".bias")})
    return {f"{role} left out": _edited(model, re.escape(role), np.zeros_like) for role in roles}


def _expert_mutations(model: Model) -> dict[str, Model]:
    roles = {tensor.role for tensor in model.tensors}
    mutants = {}
    if "ffn_down_exps" in roles:
        mutants["ffn_down_exps in another order"] = _edited(model, "ffn_down_exps", lambda experts: experts[::-1])
        mutants["ffn_gate_inp in another order"] = _edited(model, "ffn_gate_inp", lambda rows: rows[::-1])
    if "attn_sinks" in roles:
        mutants["attn_sinks left out"] = _edited(model, "attn_sinks", lambda sinks: np.full_like(sinks, -1e9))
    if "ffn_gate_inp_shexp" in roles:
        mutants["ffn_gate_inp_shexp left out"] = _edited(model, "ffn_gate_inp_shexp", np.zeros_like)
    return mutants


def _family_mutations(model: Model) -> dict[str, Model]:
    """Return errors that a few architectures alone can have."""
    roles = {tensor.role for tensor in model.tensors}
    if model.architecture.startswith("gemma"):
        scale = np.float32(np.sqrt(model.hparams.n_embd))
        return {"embedding scaled by the converter too": _edited(model, "token_embd", lambda rows: rows * scale)}
    if model.architecture in ("glm4", "phi3"):
        return {"halves of ffn_up exchanged": _edited(model, "ffn_up", lambda rows: np.roll(rows, len(rows) // 2, 0))}
    if model.architecture == "apertus":
        return {
            f"{key} one larger": _one_larger(model, key) for key in ("xielu.alpha_n", "xielu.alpha_p", "xielu.beta")
        }
    if model.architecture == "gpt2":
        return {
            "position_embd one row late": _edited(model, "position_embd", lambda rows: np.roll(rows, 1, axis=0)),
            "attn_output not transposed": _edited(model, "attn_output", lambda rows: rows.T),
        }
    if model.architecture == "internlm2":
        return {"wqkv split as q, then k, then v": _split_in_one_piece(model)}
    if model.architecture == "gptneox":
        is_parallel = model.metadata["gptneox.use_parallel_residual"].value
        return {"the other residual": _with_value(model, "use_parallel_residual", not is_parallel)}
    if model.architecture == "deepseek2":
        gating = model.metadata["deepseek2.expert_gating_func"].value  # 1 softmax, 2 sigmoid
        return {
            "the other gating": _with_value(model, "expert_gating_func", 3 - gating),
            "attn_k_b: heads in another order": _edited(model, "attn_k_b", lambda heads: heads[::-1]),
            "attn_v_b: heads in another order": _edited(model, "attn_v_b", lambda heads: heads[::-1]),
        }
    if "shortconv.conv.weight" in roles:
        return {
            "shortconv.conv backwards": _edited(model, r"shortconv\.conv\.weight", lambda kernels: kernels[:, ::-1]),
            "thirds of shortconv.in_proj turned": _edited(
                model, r"shortconv\.in_proj\.weight", lambda rows: np.roll(rows, len(rows) // 3, axis=0)
            ),
        }
    if "ssm_alpha" in roles or "ssm_ba" in roles:
        return {
            "ssm_a as its logarithm": _edited(model, "ssm_a", lambda rates: np.log(-rates)),
            "ssm_conv1d backwards": _edited(model, "ssm_conv1d", lambda kernels: kernels[:, ::-1]),
            "ssm_out: heads in another order": _edited(
                model, "ssm_out", lambda rows: np.roll(rows, rows.shape[1] // 4, axis=1)
            ),
            "attn_gate: heads in another order": _edited(
                model, "attn_gate", lambda rows: np.roll(rows, len(rows) // 4, axis=0)
            ),
        }
    if "ssm_a" in roles:
        return {
            "ssm_a as its logarithm": _edited(model, "ssm_a", lambda rates: np.log(-rates)),
            "ssm_conv1d backwards": _edited(model, "ssm_conv1d", lambda kernels: kernels[:, ::-1]),
            "ssm_d left out": _edited(model, "ssm_d", np.zeros_like),
        }
    return {}


def _reordered(model: Model) -> Edit:
    """Return what takes rope's rows from the order of the architecture to the other one, head by head."""
    half = model.hparams.head_dim // 2
    split = (half, 2) if model.architecture in _NEIGHBOURS else (2, half)

    def edit(array: NDArray[np.float32]) -> NDArray[np.float32]:
        return array.reshape(-1, *split, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)

    return edit


def _by_head(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Return fused rows with the first, the middle and the last third taken in turns, a head each."""
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    order = np.argsort(np.arange(len(heads)) % -(-len(heads) // 3), kind="stable")
    return heads[order].reshape(rows.shape)


def _split_in_one_piece(model: Model) -> Model:
    """Return an InternLM 2 whose fused rows, which go by key/value head, were taken for all of q, then k, then v."""
    arrays = {(tensor.layer, tensor.role): tensor.load() for tensor in model.tensors}
    wrong = {}
    for layer in range(model.hparams.n_layers):
        q, k, v = (arrays[layer, role] for role in ("attn_q", "attn_k", "attn_v"))
        by_head = (model.hparams.n_kv_heads, -1, model.hparams.head_dim, q.shape[1])
        fused = np.concatenate([rows.reshape(by_head) for rows in (q, k, v)], axis=1).reshape(-1, q.shape[1])
        pieces = np.split(fused, [len(q), len(q) + len(k)])
        wrong |= {(layer, role): rows for role, rows in zip(("attn_q", "attn_k", "attn_v"), pieces, strict=True)}
    return replace(
        model,
        tensors=tuple(
            _with_array(tensor, wrong[tensor.layer, tensor.role]) if (tensor.layer, tensor.role) in wrong else tensor
            for tensor in model.tensors
        ),
    )


def _exchanged(model: Model, first: str, second: str) -> Model:
    other = {first: second, second: first}
    arrays = {(tensor.layer, tensor.role): tensor for tensor in model.tensors if tensor.role in other}
    return replace(
        model,
        tensors=tuple(
            _with_array(tensor, arrays[tensor.layer, other[tensor.role]].load()) if tensor.role in other else tensor
            for tensor in model.tensors
        ),
    )


def _edited(model: Model, role: str, edit: Edit) -> Model:
    """Return the model with the tensors edited whose role matches the pattern."""
    matches = [re.fullmatch(role, tensor.role) is not None for tensor in model.tensors]
    assert any(matches), role
    tensors = zip(model.tensors, matches, strict=True)
    return replace(
        model, tensors=tuple(_with_array(tensor, edit(tensor.load())) if hit else tensor for tensor, hit in tensors)
    )


def _with_array(tensor: Tensor, array: NDArray[np.float32]) -> Tensor:
    return replace(tensor, stored=FromArray(tensor.source, np.ascontiguousarray(array)), transforms=())


def _without_key(model: Model, name: str) -> Model:
    metadata = dict(model.metadata)
    del metadata[f"{model.architecture}.{name}"]
    return replace(model, metadata=metadata)


def _scaled_key(model: Model, name: str, factor: float) -> Model:
    value = model.metadata[f"{model.architecture}.{name}"].value
    return _with_value(model, name, type(value)(factor * value))


def _one_larger(model: Model, key: str) -> Model:
    """Return the model with 1 added to each number in a list that has no prefix."""
    entry = model.metadata[key]
    larger = kv([value + 1 for value in entry.value], entry.type, entry.sub_type)
    return replace(model, metadata={**model.metadata, key: larger})


def _with_value(model: Model, name: str, value: float | bool) -> Model:
    key = f"{model.architecture}.{name}"
    return replace(model, metadata={**model.metadata, key: kv(value, model.metadata[key].type)})
