"""Rope settings: from the two forms that config.json knows to GGUF keys and the ``rope_freqs`` tensor.

transformers up to 4 writes ``rope_theta`` and ``rope_scaling``, transformers 5 one ``rope_parameters``; both are read.
A kind or an option that llama.cpp would compute differently is an error: it would load and answer nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType

from ..errors import ModelError, UnsupportedError
from ..records import Float32

DEFAULT_THETA = 10000.0  # transformers' default for the supported classes

# llama.cpp computes yarn with these and reads no key for them in the supported architectures (llama-model.cpp).
YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0

# Far beyond any model's, and safe in float32 arithmetic and in a uint32 key.
MIN_NUMBER, MAX_NUMBER = 1e-3, 1e9

# Settings that may also stand at the top of config.json.
_OUTER_KEYS = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")

# Numbers that each kind needs, and those that yarn may have.
_NEEDED = {
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_YARN_OPTIONS = ("attention_factor", "mscale", "mscale_all_dim")


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"rope_type", "rope_theta", ...}`` from either form; ``rope_type`` is ``default`` when unscaled.

    Raises:
        ModelError: a setting is given twice with different values.
        UnsupportedError: kinds of layers have settings of their own.

    """
    forms = [_settings(config, form) for form in ("rope_parameters", "rope_scaling") if config.get(form)]
    if len(forms) == 2 and forms[0] != forms[1]:
        raise ModelError("config.json: rope_parameters and rope_scaling disagree; keep the one that is meant")
    return forms[0] if forms else _settings(config, None)


def _settings(config: Mapping[str, Any], form: str | None) -> dict[str, Any]:
    given = config[form] if form else {}
    if not isinstance(given, Mapping):
        raise ModelError(f"config.json: {form}: wanted an object, got {given!r}")
    nested = next((key for key, value in given.items() if isinstance(value, Mapping)), None)
    if nested is not None:
        raise UnsupportedError(f"config.json: {form}: {nested} has settings of its own; wanted one for all layers")
    settings = {key: value for key, value in given.items() if value is not None or key == "truncate"}
    settings.setdefault("rope_type", settings.pop("type", "default"))
    for key in _OUTER_KEYS:
        outer = config.get(key)
        if outer is not None and settings.setdefault(key, outer) != outer:
            raise ModelError(
                f"config.json: {key} is {outer!r}, but {settings[key]!r} in {form}; keep the one that is meant"
            )
    settings.setdefault("rope_theta", DEFAULT_THETA)
    # An original context that is not named is the context (transformers modeling_rope_utils, standardize_rope_params).
    settings.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return settings


def check_rope(settings: Mapping[str, Any], architecture: str, kinds: tuple[str, ...]) -> None:
    """Check the settings before they are used.

    Raises:
        UnsupportedError: a kind or option that llama.cpp's architecture does not compute.
        ModelError: a number is missing or out of range.

    """
    kind = settings["rope_type"]
    if kind not in kinds:
        raise UnsupportedError(
            f"config.json: rope scaling {kind!r} is not supported for {architecture}; known: {', '.join(kinds)}"
        )
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        factor = settings["partial_rotary_factor"]
        raise UnsupportedError(f"config.json: partial_rotary_factor {factor} is not supported for {architecture}")
    for key in ("rope_theta", *_NEEDED.get(kind, ())):
        value = number(settings, key)
        if key == "original_max_position_embeddings" and not value.is_integer():
            raise ModelError(f"config.json: rope setting {key}: wanted a whole number, got {value:g}")
    if kind == "llama3" and number(settings, "low_freq_factor") >= number(settings, "high_freq_factor"):
        raise ModelError("config.json: llama3 rope: wanted low_freq_factor below high_freq_factor")
    if kind == "yarn":
        _check_yarn(settings)


def _check_yarn(settings: Mapping[str, Any]) -> None:
    wanted = {"beta_fast": YARN_BETA_FAST, "beta_slow": YARN_BETA_SLOW, "truncate": True}
    for key, value in wanted.items():
        if settings.get(key, value) != value:
            raise UnsupportedError(
                f"config.json: yarn rope with {key} {settings[key]}: llama.cpp computes only {key} {value}"
            )
    for key in _YARN_OPTIONS:
        if key in settings:
            number(settings, key)


def add_rope_keys(writer: GGUFWriter, settings: Mapping[str, Any]) -> None:
    """Add the keys of theta and scaling to ``writer``; ``settings`` have passed ``check_rope``."""
    writer.add_rope_freq_base(number(settings, "rope_theta"))
    kind = settings["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(number(settings, "factor"))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(number(settings, "original_max_position_embeddings")))
        correction = yarn_attention_factor(settings) / yarn_magnitude(number(settings, "factor"))
        if not math.isclose(correction, 1.0, rel_tol=1e-6):
            writer.add_rope_scaling_attn_factors(correction)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """Return yarn's factor on cos and sin, ``0.1 mscale ln(factor) + 1`` (arXiv 2309.00071, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def yarn_attention_factor(settings: Mapping[str, Any]) -> float:
    """Return the factor on cos and sin that transformers computes (modeling_rope_utils).

    llama.cpp multiplies by ``yarn_magnitude(factor)`` on its own and by the key ``rope.scaling.attn_factor`` on top
    (llama-context.cpp), so the key holds the quotient of the two.
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

    Wavelengths shorter than ``n_ctx / high_freq_factor`` stay, those longer than ``n_ctx / low_freq_factor`` are
    stretched by ``factor``, those between are blended (transformers, ``_compute_llama3_parameters``).
    """
    factor = number(settings, "factor")
    low, high = number(settings, "low_freq_factor"), number(settings, "high_freq_factor")
    n_ctx = number(settings, "original_max_position_embeddings")
    theta = number(settings, "rope_theta")
    frequencies = 1.0 / theta ** (np.arange(0, rope_dim, 2, dtype=np.float32) / np.float32(rope_dim))
    wavelengths = 2 * math.pi / frequencies
    smooth = np.clip((n_ctx / wavelengths - low) / (high - low), 0.0, 1.0)
    factors: Float32 = (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def number(settings: Mapping[str, Any], key: str) -> float:
    """Return a number of the rope settings; raises ``ModelError`` when it is missing or no sensible number."""
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_NUMBER <= value <= MAX_NUMBER:
        raise ModelError(
            f"config.json: rope setting {key}: wanted a number from {MIN_NUMBER:g} to {MAX_NUMBER:g}, got {value!r}"
        )
    return float(value)
