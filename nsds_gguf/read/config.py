"""config.json: reading, canonical names of settings, dimensions of the tensors.

transformers' classes use different names for the same setting, and omit defaults. After ``canonical``, each setting has
one name, and the defaults of the family are filled in.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError, UnsupportedError
from .architectures.classes import named_class
from .architectures.defaults import default_sizes
from .architectures.families import TEXT_MODELS, WRAPPERS
from .architectures.family import Config, Family
from .foreign import describe

MAX_LAYERS = 512  # llama.cpp's (LLAMA_MAX_LAYERS in llama-hparams.h)

# Canonical name -> names in order of precedence.
ALIASES = {
    "first_k_dense_replace": ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"),
    "hidden_act": ("hidden_activation", "hidden_act", "activation_function"),
    "hidden_size": ("hidden_size", "n_embd"),
    "intermediate_size": ("block_ff_dim", "intermediate_size", "n_inner"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "n_ctx"),
    "n_shared_experts": ("n_shared_experts", "moe_num_shared_experts", "num_shared_expert", "num_shared_experts"),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct", "rope_pct"),
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "tie_word_embeddings": ("tie_embedding", "tie_word_embeddings"),
}

# Settings of a whole multimodal model that apply to its language model: transformers 5 ties by one of them, and
# llama.cpp's Qwen3-VL has a key of the other.
_OUTER_SETTINGS = ("tie_word_embeddings", "vision_config")
_MULTIMODAL = "ForConditionalGeneration"

# Settings whose defaults ``rope.rope_settings`` applies.
ROPE_SETTINGS = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor", "original_max_position_embeddings")

_LFS_MARK = "version https://git-lfs"
_FF_FACTOR = 4  # default ratio of intermediate_size to hidden_size (GPT-2)


def read_config(folder: Path, shown: Path) -> dict[str, Any]:
    """Return the parsed config.json of a model folder; ``shown`` is the folder as the user named it.

    Raises ``ModelError`` when it is missing or damaged, ``UnsupportedError`` for a file in place of a folder.
    """
    if not folder.exists():
        raise ModelError(f"{shown}: no such folder")
    if not folder.is_dir():
        raise UnsupportedError(f"{shown}: is a file; wanted a Hugging Face model folder with config.json, or a .gguf")
    file = folder / "config.json"
    try:
        if not file.is_file():
            found = describe(folder)
            raise (UnsupportedError if found else ModelError)(
                f"{shown}: {found or 'no config.json in it; wanted a Hugging Face model folder'}"
            )
        text = file.read_text(encoding="utf-8")
        if text.startswith(_LFS_MARK):
            raise ModelError(f"{file}: is a git-lfs pointer, not the file itself: run `git lfs pull` in {folder}")
        config = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: wanted an object, got {type(config).__name__}")
    return config


def text_model(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    """Return class and settings of the language model (top level or text_config), and notes.

    Raises ``UnsupportedError`` for an unknown type of inner language model.
    """
    name, note = named_class(config)
    notes = [note] if note else []
    inner = config.get("text_config")
    if not isinstance(inner, Mapping) or not name.endswith(_MULTIMODAL):
        return name, dict(config), notes
    shared = {key: config[key] for key in _OUTER_SETTINGS if config.get(key) is not None}
    tokens = {key: value for key, value in config.items() if key.endswith("_token_id")}
    settings = {**tokens, **inner, **shared}
    if name not in WRAPPERS:  # llama.cpp has an architecture for its language model
        return name, settings, notes
    kind = inner.get("model_type", WRAPPERS[name])
    if not isinstance(kind, str) or kind not in TEXT_MODELS:
        raise UnsupportedError(
            f"config.json: {name} around a language model of type {reprlib.repr(kind)}; known: {', '.join(TEXT_MODELS)}"
        )
    return TEXT_MODELS[kind], settings, notes


def is_multimodal(config: Mapping[str, Any], source_class: str) -> bool:
    """Return whether the weights may hold other models (vision, audio) beside the language model.

    ``source_class`` is that of the language model. Qwen2-VL's config.json has no text_config.
    """
    return "text_config" in config or source_class.endswith(_MULTIMODAL)


def canonical(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the settings under their canonical names, with the family's defaults filled in.

    ``rope.rope_settings`` applies the defaults of rope: config.json has two more places for these settings.
    """
    settings = dict(config)
    for name, aliases in ALIASES.items():
        values = [settings.pop(alias) for alias in aliases if alias in settings]
        if values:
            settings[name] = next((value for value in values if value is not None), None)
    settings |= {name: _one_for_all_layers(settings[name]) for name in _BY_LAYER if name in settings}
    defaults = {**default_sizes(family.classes[0]), **family.defaults}
    absent = [name for name in defaults if name not in ROPE_SETTINGS and settings.get(name) is None]
    absent = [name for name in absent if not (name in settings and name in _MAY_BE_NULL)]
    settings |= {name: defaults[name] for name in absent if not callable(defaults[name])}
    _check_whole_numbers(settings)
    for name in absent:
        if callable(defaults[name]):
            settings[name] = defaults[name](settings)
    if settings.get("intermediate_size") is None and isinstance(settings.get("hidden_size"), int):
        settings["intermediate_size"] = _FF_FACTOR * settings["hidden_size"]
    if settings.get("tie_word_embeddings") is None:
        settings["tie_word_embeddings"] = True  # transformers' default
    return settings


# Settings that Hunyuan MoE repeats for every layer.
_BY_LAYER = ("moe_intermediate_size", "n_shared_experts", "num_experts_per_tok")


def _one_for_all_layers(value: Any) -> Any:
    """Return the only entry of a list of equal entries, and everything else unchanged."""
    same = isinstance(value, list) and value and all(entry == value[0] for entry in value)
    return value[0] if same else value


# Integer settings that defaults may be computed from, and their minimums.
_WHOLE = {
    "num_hidden_layers": 1, "hidden_size": 1, "num_attention_heads": 1, "num_key_value_heads": 0, "head_dim": 0,
    "intermediate_size": 0, "num_experts": 0, "moe_intermediate_size": 0, "first_k_dense_replace": 0,
    "n_shared_experts": 0, "q_lora_rank": 0, "kv_lora_rank": 0, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0,
    "v_head_dim": 0, "conv_kernel": 0, "state_size": 0, "mamba_expand": 0, "mamba_n_heads": 0, "mamba_n_groups": 0,
    "mamba_d_state": 0, "mamba_d_conv": 0,
}  # fmt: skip


def _check_whole_numbers(config: Config) -> None:
    """Raise ``ModelError`` for an invalid setting of ``_WHOLE``, ``UnsupportedError`` for too many layers."""
    for key, least in _WHOLE.items():
        if config.get(key) is not None:
            integer(config, key, at_least=least)
    n_layers = integer(config, "num_hidden_layers")
    if n_layers > MAX_LAYERS:
        raise UnsupportedError(f"config.json: num_hidden_layers {n_layers}: llama.cpp takes at most {MAX_LAYERS}")


# Settings for which null is a value; for num_key_value_heads, it means num_attention_heads.
_MAY_BE_NULL = (
    "norm_eps", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "num_key_value_heads",
    "q_lora_rank",
)  # fmt: skip


def check_settings(config: Config, family: Family) -> None:
    """Raise ``UnsupportedError`` for a setting that llama.cpp does not implement for the architecture."""
    activation = config.get("hidden_act") or family.activations[0]
    if activation not in family.activations:
        raise UnsupportedError(
            f"config.json: hidden_act {activation!r} is not supported for {family.architecture}; "
            f"known: {', '.join(family.activations)}"
        )
    for key, value in family.fixed.items():
        wanted = value(config) if callable(value) else value
        found = config.get(key, wanted)
        if found != wanted and (found or wanted):  # null, false, 0 and absent are equivalent
            raise UnsupportedError(
                f"config.json: {key} {found!r}: llama.cpp's {family.architecture} supports {wanted!r} only"
            )


def dimensions(config: Config, family: Family) -> dict[str, int]:
    """Return the size of every dimension that a ``Part`` names.

    Raises:
        ModelError: a size is missing, or sizes contradict one another.
        UnsupportedError: sizes that llama.cpp does not support.

    """
    n_layers, n_heads = integer(config, "num_hidden_layers"), integer(config, "num_attention_heads")
    n_kv_heads = integer(config, "num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        raise ModelError(f"config.json: {n_heads} heads cannot share {n_kv_heads} key/value heads evenly")
    head, ff = _head_dim(config, family, n_heads), integer(config, "intermediate_size")
    n_experts = integer(config, "num_experts", 0, at_least=0)
    ff_exp = integer(config, "moe_intermediate_size", ff)
    ff_shexp = integer(config, _shared_ff(config), 0, at_least=0)
    sizes = {
        "one": 1,
        "layers": n_layers,
        "embd": integer(config, "hidden_size"),
        "vocab": integer(config, "vocab_size"),
        "ctx": integer(config, "max_position_embeddings"),
        "heads": n_heads,
        "kv_heads": n_kv_heads,
        "head": head,
        "q": n_heads * head,
        "kv": n_kv_heads * head,
        "qkv": (n_heads + 2 * n_kv_heads) * head,
        "ff": ff,
        "2ff": 2 * ff,
        "experts": n_experts,
        "ff_exp": ff_exp,
        "2ff_exp": 2 * ff_exp,
        "ff_shexp": ff_shexp,
        "2ff_shexp": 2 * ff_shexp,
    }
    sizes |= _checked_sizes(config, family)
    if n_experts and integer(config, "num_experts_per_tok") > n_experts:
        raise ModelError(f"config.json: {config['num_experts_per_tok']} experts per token of {n_experts} in all")
    return sizes


def _checked_sizes(config: Config, family: Family) -> dict[str, int]:
    """Return the family's own dimensions; raise ``ModelError`` if config.json does not determine them."""
    try:
        found = family.sizes(config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"config.json: no sizes of {family.architecture}: {error!r}") from error
    return {name: integer(found, name, at_least=0) for name in found}


def _shared_ff(config: Config) -> str:
    """Return the name of the setting for the width of the shared expert: Granite's or Qwen's."""
    return "shared_intermediate_size" if "shared_intermediate_size" in config else "shared_expert_intermediate_size"


def integer(config: Config, key: str, default: int | None = None, at_least: int = 1) -> int:
    """Return an integer setting of config.json; raise ``ModelError`` if it is invalid or out of range."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < 2**31:
        raise ModelError(f"config.json: {key}: wanted a positive integer, got {reprlib.repr(value)}")
    return value


def _head_dim(config: Config, family: Family, n_heads: int) -> int:
    n_embd = integer(config, "hidden_size")
    if config.get("head_dim") is None and n_embd % n_heads:
        raise ModelError(f"config.json: hidden_size {n_embd} is not a multiple of num_attention_heads {n_heads}")
    head_dim = integer(config, "head_dim", n_embd // n_heads)
    if family.fixed_head_dim and head_dim * n_heads != n_embd:
        raise UnsupportedError(
            f"config.json: head_dim {head_dim} x {n_heads} heads is not hidden_size {n_embd}; "
            f"llama.cpp's {family.architecture} requires it"
        )
    if head_dim % 2 and family.rope_kinds:
        raise UnsupportedError(f"config.json: head_dim {head_dim} is odd; rope rotates pairs of channels")
    return head_dim


def norm_eps(config: Config, family: Family) -> float:
    """Return the epsilon of the norms; raise ``ModelError`` if it is not a number from 0 to 1."""
    eps, key = config.get("norm_eps"), f"{family.norm}_norm_eps"
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise ModelError(f"config.json: {key}: wanted a number from 0 to 1, got {eps!r}")
    return float(eps)
