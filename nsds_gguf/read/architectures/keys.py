"""The ``general.*`` and architecture keys of a model from a folder, as llama.cpp's converter writes them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from gguf import GGUFType, GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue

from ...errors import ModelError
from ...records import kv
from ..config import integer, norm_eps
from .family import Config, Family, Key
from .rope import add_rope_keys, rope_dim

DEFAULT_FULL_LAYERS = 28  # transformers' default in Qwen 2 and 3: the first layers, without a window

_LARGEST_FLOAT32 = 3.4e38

_WINDOWED = "sliding_attention"


def model_keys(
    about: Mapping[str, GGUFValue],
    config: Config,
    family: Family,
    sizes: Mapping[str, int],
    rope: Mapping[str, Any] | None,
) -> dict[str, GGUFValue]:
    """Return the ``general.*`` and architecture keys of a model.

    Args:
        about: known ``general.*`` keys.
        config: canonical settings.
        family: of the model.
        sizes: by name of the dimension.
        rope: checked settings; ``None`` without rope.

    """
    writer = GGUFWriter(None, family.architecture)
    writer.add_type(GGUFType.MODEL)
    writer.kv_data[0].update(about)
    writer.add_block_count(sizes["layers"])
    writer.add_context_length(sizes["ctx"])
    writer.add_embedding_length(sizes["embd"])
    if sizes["ff"]:
        writer.add_feed_forward_length(sizes["ff"])
    writer.add_head_count(sizes["heads"])
    if family.writes_kv_heads:
        writer.add_head_count_kv(sizes["kv_heads"])
    (writer.add_layer_norm_rms_eps if family.norm == "rms" else writer.add_layer_norm_eps)(norm_eps(config, family))
    if config.get("head_dim") is not None:
        writer.add_key_length(sizes["head"])
        writer.add_value_length(sizes["head"])
    if sizes["experts"]:
        writer.add_expert_count(sizes["experts"])
        writer.add_expert_used_count(integer(config, "num_experts_per_tok"))
    if family.writes_vocab_size:
        writer.add_vocab_size(sizes["vocab"])
    if rope is not None:
        if family.writes_rope_dim:
            writer.add_rope_dimension_count(rope_dim(rope, sizes["head"]))
        add_rope_keys(writer, rope)
    _add_window_keys(writer, config, family, sizes["layers"])
    keys = dict(writer.kv_data[0])
    for key in family.keys:
        if config.get(key.setting) is not None and not _says_nothing(config, key):
            keys[f"{family.architecture}.{key.name}"] = kv(_fitted(config, key), key.type)
    more = family.more_keys(config, sizes)
    return {**keys, **{f"{family.architecture}.{name}": value for name, value in more.items()}}


def _says_nothing(config: Config, key: Key) -> bool:
    """Return whether a number is 0, which means absence (such as the width of a shared expert)."""
    return key.type == GGUFValueType.UINT32 and config[key.setting] == 0


def _fitted(config: Config, key: Key) -> Any:
    """Return a setting as a value of its key's type; raise ``ModelError`` if it has another type."""
    value = config[key.setting]
    if key.type == GGUFValueType.BOOL:
        return bool(value)
    if key.type == GGUFValueType.UINT32:
        return integer(config, key.setting, at_least=0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST_FLOAT32:
        raise ModelError(f"config.json: {key.setting}: wanted a number, got {reprlib.repr(value)}")
    return float(value)


def _add_window_keys(writer: GGUFWriter, config: Config, family: Family, n_layers: int) -> None:
    """Add the window if llama.cpp supports it, and the layers that have it if they differ from its default."""
    if family.window is None or not family.window.period or not (window := _window(config)):
        return
    writer.add_sliding_window(window)
    period = family.window.period
    assumed = [(i + 1) % period != 0 for i in range(n_layers)]
    actual = _windowed_layers(config, assumed)
    if actual != assumed or family.window.lists_layers:
        writer.add_sliding_window_pattern(actual)


def _windowed_layers(config: Config, assumed: list[bool]) -> list[bool]:
    """Return whether each layer has the window: from the list or period in config.json, else as assumed."""
    listed = config.get("layer_types")
    if isinstance(listed, list):
        if len(listed) != len(assumed):
            raise ModelError(f"config.json: layer_types: wanted {len(assumed)} entries, got {len(listed)}")
        return [kind == _WINDOWED for kind in listed]
    period = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
    if type(period) is int and period > 0:
        return [(i + 1) % period != 0 for i in range(len(assumed))]
    return assumed


def window_note(config: Config, family: Family, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the note on a window that llama.cpp does not support and that is shorter than the context."""
    window = _window(config)
    if family.window is None or family.window.period or not window or window >= sizes["ctx"]:
        return ()
    if not _has_windowed_layers(config, family.window.flag, sizes["layers"]):
        return ()
    return (
        f"llama.cpp has no sliding window for {family.architecture}: beyond {window} tokens, attention is full, "
        f"where the original attends to {window}.",
    )


def _window(config: Config) -> int:
    window = config.get("sliding_window")
    if not window:
        return 0
    if type(window) is not int or window < 0:
        raise ModelError(f"config.json: sliding_window: wanted a number of tokens or null, got {window!r}")
    return window


def _has_windowed_layers(config: Config, flag: str, n_layers: int) -> bool:
    if not flag:
        return True
    if not config.get(flag):
        return False
    layer_types, n_full = config.get("layer_types"), config.get("max_window_layers", DEFAULT_FULL_LAYERS)
    if isinstance(layer_types, list):
        return _WINDOWED in layer_types
    if not isinstance(n_full, int):
        raise ModelError(f"config.json: max_window_layers: wanted a number of layers, got {n_full!r}")
    return n_layers > n_full
