"""The data model of projectors, keys of every encoder, and checked settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ...errors import ModelError
from ...records import kv
from .family import Config, Parts, Sizes

U32, INT32, FLOAT = GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.FLOAT32
BOOL, ARRAY = GGUFValueType.BOOL, GGUFValueType.ARRAY
Keys = dict[str, GGUFValue]


@dataclass(frozen=True)
class ProjectorFamily:
    """One projector type of llama.cpp and the checkpoint classes that convert to it.

    Functions take the settings of ``projector.read_settings``: config.json with the defaults filled in, where
    ``vision`` holds the settings of the encoder, ``text`` those of the language model, and ``image`` those of
    preprocessor_config.json.

    Attributes:
        classes: names under ``architectures`` in config.json.
        encoders: names of the encoder, ``model_type`` of ``vision_config``.
        kind: ``clip.projector_type``.
        roots: prefixes of the names of its tensors; each of these tensors must have a place.
        layer: role -> part, within ``layer_prefix``.
        layer_prefix: of checkpoint names; ``{i}`` is the layer.
        outside: role -> part outside the layers; a role is the GGUF name without ``.weight``.
        keys: returns keys in addition to those of every encoder.
        vision: transformers' defaults of ``vision_config``.
        defaults: transformers' defaults of other settings.
        activations: activation functions of the encoder that llama.cpp supports.
        fixed: other settings for which llama.cpp supports one value only.
        types: types of tensors that do not follow the type asked for, by role.
        sizes: returns dimensions in addition to those of every encoder, which it gets.
        more: returns parts that depend on the settings, like ``outside``.
        ignored: returns patterns of checkpoint tensors that the GGUF does not need.
        unfolded: roles of convolutions stored as matrices, the pixels of a patch in a row, colours last.
        kind_key: key of ``kind``.
        token: special token whose embedding is part of the file: its id is the size ``token``.
        example: a well-known repository.
    """

    classes: tuple[str, ...]
    encoders: tuple[str, ...]
    kind: str
    roots: tuple[str, ...]
    layer: Parts
    layer_prefix: str
    outside: Parts
    keys: Callable[[Config, Sizes], Keys]
    vision: Config
    defaults: Config = field(default_factory=dict)
    activations: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    sizes: Callable[[Config, Sizes], dict[str, int]] = lambda _config, _sizes: {}
    more: Callable[[Config], Parts] = lambda _: {}
    ignored: Callable[[Config, Sizes], tuple[str, ...]] = lambda _config, _sizes: ()
    unfolded: tuple[str, ...] = ()
    kind_key: str = "clip.projector_type"
    token: str = ""
    example: str = ""


def vision_keys(config: Config, sizes: Sizes) -> Keys:
    """Return the keys of every encoder (llama.cpp ``conversion/base.py``, ``MmprojModel``)."""
    numbers = {
        "projection_dim": sizes["text"],
        "image_size": sizes["image"],
        "patch_size": sizes["patch"],
        "embedding_length": sizes["embd"],
        "feed_forward_length": sizes["ff"],
        "block_count": sizes["layers"],
        "attention.head_count": sizes["heads"],
    }
    return {
        "clip.has_vision_encoder": kv(True, BOOL),
        **{f"clip.vision.{name}": kv(value, U32) for name, value in numbers.items()},
        "clip.vision.image_mean": _colours(config, "image_mean"),
        "clip.vision.image_std": _colours(config, "image_std"),
    }


def _colours(config: Config, name: str) -> GGUFValue:
    """Return three numbers of preprocessor_config.json, for red, green and blue."""
    found = config["image"].get(name)
    if not isinstance(found, list) or len(found) != 3:
        raise ModelError(f"preprocessor_config.json: {name}: wanted three numbers, got {found!r}")
    return kv([number(value, f"preprocessor_config.json: {name}") for value in found], ARRAY, FLOAT)


def number(value: Any, name: str) -> float:
    """Return a finite number; raise ``ModelError`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelError(f"{name}: wanted a number, got {value!r}")
    return float(value)


def positive(value: Any, name: str) -> int:
    """Return a positive integer; raise ``ModelError`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ModelError(f"{name}: wanted a positive integer, got {value!r}")
    return value


def eps_key(value: Any) -> Keys:
    """Return the key of the norms' epsilon."""
    eps = number(value, "config.json: epsilon of the vision encoder's norms")
    return {"clip.vision.attention.layer_norm_epsilon": kv(eps, FLOAT)}
