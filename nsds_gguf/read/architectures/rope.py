"""Rope settings: from both forms in config.json to GGUF keys and the ``rope_freqs`` tensor.

transformers up to 4 writes ``rope_theta`` and ``rope_scaling``, transformers 5 one ``rope_parameters``; both are read.
A kind or option that llama.cpp computes differently is an error: the model would load and answer nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter, RopeScalingType
from gguf.gguf_writer import GGUFValue

from ...errors import ModelError, UnsupportedError
from ...records import Float32, kv

DEFAULT_THETA = 10000.0  # transformers' default for most classes; families may override it

# llama.cpp's constants of yarn; it reads no keys for them in the supported architectures (llama-model.cpp).
YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0

# Ranges of float32 and uint32 keys.
MIN_NUMBER, MAX_NUMBER = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
MAX_CONTEXT = 2**32 - 1

# Settings that may also be at the top level of config.json.
_OUTER_KEYS = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")

# Settings by kind of layer, for models with sliding-window layers: Gemma 3, OLMo 3.
_FULL, _SLIDING = "full_attention", "sliding_attention"
_LOCAL_THETA = "rope_local_base_freq"  # transformers 4: theta of the layers with a window

# Required numbers of each kind, and optional ones of yarn.
_NEEDED = {
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_YARN_OPTIONS = ("attention_factor", "mscale", "mscale_all_dim")


_STILL = 1e30  # divides the frequency of a channel that does not rotate

# Architectures that llama.cpp runs with whole channels as the bounds of yarn's ramp, though the original has fractions.
_ROUNDED_YARN = ("gpt-oss",)


def rope_settings(config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return ``{"rope_type", "rope_theta", ...}`` from either form; ``rope_type`` is ``default`` when unscaled.

    ``local_theta`` is the theta of layers with a sliding window, if it differs.

    Args:
        config: canonical settings.
        defaults: of the class.

    Raises:
        ModelError: a setting appears twice with different values.
        UnsupportedError: kinds of layers have separate settings that llama.cpp does not support.

    """
    forms = [_settings(config, form) for form in ("rope_parameters", "rope_scaling") if config.get(form)]
    if len(forms) == 2 and forms[0] != forms[1]:
        raise ModelError("config.json: rope_parameters and rope_scaling disagree; keep the correct one")
    settings = forms[0] if forms else _settings(config, None)
    if settings.get("partial_rotary_factor") is None and config.get("rotary_dim") and config.get("head_dim"):
        settings["partial_rotary_factor"] = config["rotary_dim"] / config["head_dim"]  # MiniMax-M2
    for key, value in {"rope_theta": DEFAULT_THETA, **(defaults or {})}.items():
        if key in (*_OUTER_KEYS, _LOCAL_THETA) and settings.get(key) is None:
            settings[key] = value
    # The original context defaults to the context (transformers modeling_rope_utils, standardize_rope_params).
    settings.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    if settings.get("is_dynamic") and settings.get("alpha") and config.get("has_alpha_rope"):  # at any length of text
        settings |= {"is_dynamic": False, "rope_theta": _stretched_theta(settings, config)}
    local = settings.pop(_LOCAL_THETA, None)
    if local is not None:
        settings.setdefault("local_theta", local)
    return settings


def _stretched_theta(settings: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """Return Hunyuan's theta, ``theta alpha^(d / (d - 2))`` for heads of ``d`` channels (llama.cpp, hunyuan.py)."""
    d = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return float(number(settings, "rope_theta") * number(settings, "alpha") ** (d / (d - 2)))


def _settings(config: Mapping[str, Any], form: str | None) -> dict[str, Any]:
    stated = config[form] if form else {}
    if not isinstance(stated, Mapping):
        raise ModelError(f"config.json: {form}: wanted an object, got {stated!r}")
    stated, local = _by_kind_of_layer(stated, str(form))
    settings = {key: value for key, value in stated.items() if value is not None or key == "truncate"}
    settings.setdefault("rope_type", settings.pop("type", "default"))
    if settings["rope_type"] == "su":  # the first name of longrope
        settings["rope_type"] = "longrope"
    if settings["rope_type"] == "mrope":  # the name of Qwen2-VL's repositories: the sections say it
        settings["rope_type"] = "default"
    if settings["rope_type"] == "dynamic":  # frequencies are not scaled within the context
        settings |= {"rope_type": "default", "is_dynamic": True}
    for key in _OUTER_KEYS:
        outer = config.get(key)
        if outer is not None and settings.setdefault(key, outer) != outer:
            raise ModelError(f"config.json: {key} is {outer!r}, but {settings[key]!r} in {form}; keep the correct one")
    if local is not None or config.get(_LOCAL_THETA) is not None:
        settings["local_theta"] = local if local is not None else config[_LOCAL_THETA]
    return settings


def _by_kind_of_layer(stated: Mapping[str, Any], form: str) -> tuple[Mapping[str, Any], Any]:
    """Return the settings of layers without a window, and the separate theta of layers with one, if any."""
    nested = [key for key, value in stated.items() if isinstance(value, Mapping)]
    if not nested:
        return stated, None
    full, sliding = stated.get(_FULL), stated.get(_SLIDING)
    if set(stated) - {_FULL, _SLIDING} or not isinstance(full, Mapping):
        raise UnsupportedError(f"config.json: {form}: {nested[0]} has separate settings; wanted one for all layers")
    sliding = sliding if isinstance(sliding, Mapping) else {}
    if sliding.get("rope_type", "default") != "default":
        raise UnsupportedError(
            f"config.json: {form}: {_SLIDING} is scaled ({sliding['rope_type']}); llama.cpp scales other layers only"
        )
    return full, sliding.get("rope_theta")


def stated_rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the rope settings as config.json states them, in either form; empty without any."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return stated if isinstance(stated, Mapping) else {}


def section_keys(config: Mapping[str, Any], default: Sequence[int]) -> dict[str, GGUFValue]:
    """Return the key of the rotated channels by axis of an image (M-RoPE); of text, all axes have the same positions.

    Raises ``ModelError`` for sections that are not a list.
    """
    sections = stated_rope(config).get("mrope_section") or default
    if not isinstance(sections, Sequence) or isinstance(sections, str):
        raise ModelError(f"config.json: mrope_section: wanted a list, got {sections!r}")
    four = [*sections, 0, 0, 0, 0][:4]
    return {"rope.dimension_sections": kv(four, GGUFValueType.ARRAY, GGUFValueType.INT32)}


def rope_note(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the note on what llama.cpp scales otherwise.

    Dynamic scaling: transformers changes theta beyond the context only, llama.cpp never. Bounds of yarn's ramp.
    """
    if settings.get("truncate") is False:
        return ("llama.cpp rounds the bounds of yarn's ramp to whole channels, the original does not.",)
    if not settings.get("is_dynamic"):
        return ()
    return (
        "llama.cpp has no dynamic rope scaling: the model works up to "
        f"{settings['n_ctx_train']} tokens, its training context, without extension.",
    )


def rope_dim(settings: Mapping[str, Any], head_dim: int) -> int:
    """Return the number of rotated channels of a head; raise ``ModelError`` if it is 0, odd or too large."""
    share = number({"partial_rotary_factor": 1.0, **settings}, "partial_rotary_factor")
    n_rotated = int(head_dim * share)
    if not 0 < n_rotated <= head_dim or n_rotated % 2:
        raise ModelError(
            f"config.json: partial_rotary_factor {share:g}: {n_rotated} of {head_dim} channels are rotated"
        )
    return n_rotated


def check_rope(settings: Mapping[str, Any], architecture: str, kinds: tuple[str, ...], is_partial_known: bool) -> None:
    """Check rope settings.

    Args:
        settings: from ``rope_settings``.
        architecture: llama.cpp's name.
        kinds: supported kinds of scaling.
        is_partial_known: whether the architecture supports partial rotation of heads.

    Raises:
        UnsupportedError: a kind or option that llama.cpp does not support for the architecture.
        ModelError: a number is missing or out of range.

    """
    kind = settings["rope_type"]
    if kind not in kinds:
        raise UnsupportedError(
            f"config.json: rope scaling {kind!r} is not supported for {architecture}; known: {', '.join(kinds)}"
        )
    if settings.get("partial_rotary_factor", 1.0) != 1.0 and not is_partial_known:
        factor = settings["partial_rotary_factor"]
        raise UnsupportedError(f"config.json: partial_rotary_factor {factor} is not supported for {architecture}")
    for key in ("rope_theta", *_NEEDED.get(kind, ())):
        value = number(settings, key)
        if key == "original_max_position_embeddings" and not (value.is_integer() and value <= MAX_CONTEXT):
            raise ModelError(f"config.json: rope setting {key}: wanted a number of tokens, got {value:g}")
    if "local_theta" in settings:
        number(settings, "local_theta")
    if kind == "llama3" and number(settings, "low_freq_factor") >= number(settings, "high_freq_factor"):
        raise ModelError("config.json: llama3 rope: wanted low_freq_factor below high_freq_factor")
    if kind == "yarn":
        _check_yarn(settings, architecture)


def _check_yarn(settings: Mapping[str, Any], architecture: str) -> None:
    wanted = {"beta_fast": YARN_BETA_FAST, "beta_slow": YARN_BETA_SLOW}
    if architecture not in _ROUNDED_YARN:
        wanted["truncate"] = True
    for key, value in wanted.items():
        if settings.get(key, value) != value:
            raise UnsupportedError(
                f"config.json: yarn rope with {key} {settings[key]}: llama.cpp supports only {key} {value}"
            )
    for key in _YARN_OPTIONS:
        if key in settings:
            number(settings, key)
    if settings.get("yarn_log_unit") and settings.get("mscale") != settings.get("mscale_all_dim", 0):
        raise UnsupportedError(
            f"config.json: yarn rope with mscale {settings.get('mscale')} and mscale_all_dim "
            f"{settings.get('mscale_all_dim')}: llama.cpp supports latent attention only if they are equal"
        )


def add_rope_keys(writer: GGUFWriter, settings: Mapping[str, Any]) -> None:
    """Add the keys of theta and scaling to ``writer``, from settings that have passed ``check_rope``."""
    writer.add_rope_freq_base(number(settings, "rope_theta"))
    if "local_theta" in settings:
        writer.add_rope_freq_base_swa(number(settings, "local_theta"))
    kind = settings["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(number(settings, "factor"))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(number(settings, "original_max_position_embeddings")))
    if kind == "yarn" and settings.get("yarn_log_unit"):
        writer.add_rope_scaling_yarn_log_mul(settings["yarn_log_unit"] * number(settings, "mscale_all_dim"))
    elif kind == "yarn":
        correction = yarn_attention_factor(settings) / yarn_magnitude(number(settings, "factor"))
        if not math.isclose(correction, 1.0, rel_tol=1e-6):
            writer.add_rope_scaling_attn_factors(correction)

    if kind == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(int(number(settings, "original_max_position_embeddings")))
        writer.add_rope_scaling_attn_factors(longrope_attention_factor(settings))


def longrope_attention_factor(settings: Mapping[str, Any]) -> float:
    """Return longrope's factor on cos and sin, ``sqrt(1 + ln(s) / ln(n))`` (arXiv 2402.13753; modeling_rope_utils).

    ``n`` is the original context and ``s`` the extension over it, ``n_ctx_train / n``.
    """
    if "attention_factor" in settings:
        return number(settings, "attention_factor")
    original = number(settings, "original_max_position_embeddings")
    factor = number(settings, "n_ctx_train") / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0


def longrope_factors(settings: Mapping[str, Any], n_rotated: int) -> dict[str, Float32]:
    """Return the divisors of the rope frequencies by tensor name, each ``(n_rotated // 2,)`` float32.

    ``rope_factors_short`` applies up to the original context, ``rope_factors_long`` beyond it; llama.cpp chooses by the
    context size, transformers by the length of the text.
    """
    found = {}
    for name in ("long", "short"):
        values = settings.get(f"{name}_factor")
        if (
            not isinstance(values, list)
            or len(values) != n_rotated // 2
            or not all(type(value) in (int, float) and value > 0 for value in values)
        ):
            raise ModelError(f"config.json: longrope {name}_factor: wanted {n_rotated // 2} positive numbers")
        found[f"rope_factors_{name}"] = np.array(values, dtype=np.float32)
    return found


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """Return yarn's factor on cos and sin, ``0.1 mscale ln(factor) + 1`` (arXiv 2309.00071, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def yarn_attention_factor(settings: Mapping[str, Any]) -> float:
    """Return transformers' factor on cos and sin (modeling_rope_utils).

    llama.cpp multiplies by ``yarn_magnitude(factor)`` and by the key ``rope.scaling.attn_factor`` (llama-context.cpp),
    so the key holds the quotient of the two.
    """
    factor = number(settings, "factor")
    if "attention_factor" in settings:
        return number(settings, "attention_factor")
    if "mscale" in settings and "mscale_all_dim" in settings:
        mscale, mscale_all_dim = number(settings, "mscale"), number(settings, "mscale_all_dim")
        return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)
    return yarn_magnitude(factor)


def llama3_factors(settings: Mapping[str, Any], rope_dim: int) -> Float32:
    """Return Llama 3.1's divisors of the rope frequencies, ``(rope_dim // 2,)`` float32: tensor ``rope_freqs``.

    Wavelengths shorter than ``n_ctx / high_freq_factor`` are unchanged, those longer than ``n_ctx / low_freq_factor``
    are stretched by ``factor``, those between are interpolated (transformers, ``_compute_llama3_parameters``).
    """
    one = np.float32(1)
    factor, theta, low, high, n_ctx = (
        np.float32(number(settings, key))
        for key in ("factor", "rope_theta", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    frequencies = one / theta ** (np.arange(0, rope_dim, 2, dtype=np.float32) / np.float32(rope_dim))
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = np.clip((n_ctx / wavelengths - low) / (high - low), np.float32(0), one)
    factors: Float32 = one / ((one - smooth) / factor + smooth)
    return factors


def proportional_factors(settings: Mapping[str, Any], head_dim: int) -> Float32:
    """Return Gemma 4's divisors of the rope frequencies, ``(head_dim // 2,)`` float32: tensor ``rope_freqs``.

    The first channels of each half rotate as those of a whole head, the others stand still (transformers,
    ``_compute_proportional_rope_parameters``): llama.cpp divides their frequencies by 1e30.
    """
    n_rotated = int(head_dim * number(settings, "partial_rotary_factor") / 2)
    factors = np.full(head_dim // 2, _STILL, dtype=np.float32)
    factors[:n_rotated] = settings.get("factor", 1.0)
    return factors


def number(settings: Mapping[str, Any], key: str) -> float:
    """Return a number of the rope settings; raise ``ModelError`` if it is missing or out of range."""
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_NUMBER <= value <= MAX_NUMBER:
        raise ModelError(f"config.json: rope setting {key}: wanted a positive number that float32 holds, got {value!r}")
    return float(value)
