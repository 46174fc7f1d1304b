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


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"rope_type", "rope_theta", ...}`` from either form; ``rope_type`` is ``default`` when unscaled."""
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(nested, Mapping):
        raise ModelError(f"config.json: rope settings: wanted an object, got {nested!r}")
    settings = dict(nested)
    settings["rope_type"] = str(settings.get("rope_type", settings.pop("type", "default"))).lower()
    settings.setdefault("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    for key in ("original_max_position_embeddings", "partial_rotary_factor"):
        if config.get(key) is not None:
            settings.setdefault(key, config[key])
    return settings


def check_rope(settings: Mapping[str, Any], architecture: str, kinds: tuple[str, ...]) -> None:
    """Raise ``UnsupportedError`` for a kind or option that llama.cpp's architecture does not compute."""
    kind = settings["rope_type"]
    if kind not in kinds:
        raise UnsupportedError(
            f"config.json: rope scaling {kind!r} is not supported for {architecture}; known: {', '.join(kinds)}"
        )
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        factor = settings["partial_rotary_factor"]
        raise UnsupportedError(f"config.json: partial_rotary_factor {factor} is not supported for {architecture}")
    if kind == "yarn":
        _check_yarn(settings)


def _check_yarn(settings: Mapping[str, Any]) -> None:
    wanted = {"beta_fast": YARN_BETA_FAST, "beta_slow": YARN_BETA_SLOW, "truncate": True}
    for key, value in wanted.items():
        if settings.get(key) not in (None, value):
            raise UnsupportedError(
                f"config.json: yarn rope with {key} {settings[key]}: llama.cpp computes only {key} {value}"
            )
    if settings.get("factor") is None or settings.get("original_max_position_embeddings") is None:
        raise ModelError("config.json: yarn rope needs factor and original_max_position_embeddings")


def add_rope_keys(writer: GGUFWriter, settings: Mapping[str, Any]) -> None:
    """Add the keys of theta and scaling to ``writer``; raises ``ModelError`` when a needed number is missing."""
    writer.add_rope_freq_base(float(settings["rope_theta"]))
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
    explicit, factor = settings.get("attention_factor"), number(settings, "factor")
    if explicit is not None:
        return float(explicit)
    mscale, mscale_all = settings.get("mscale"), settings.get("mscale_all_dim")
    if mscale and mscale_all:
        return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all)
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
    """Return a number of the rope settings; raises ``ModelError`` when it is missing or none."""
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"config.json: rope setting {key}: wanted a number, got {value!r}")
    return float(value)
