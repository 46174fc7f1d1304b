"""What config.json says about quantized weights: FP8 is read, every other method is refused with a way around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError, UnsupportedError

DEFAULT_BLOCK = (128, 128)  # transformers' FineGrainedFP8Config where config.json has no weight_block_size

# What llama.cpp's convert_hf_to_gguf.py dequantizes beyond what we read (conversion/base.py, dequant_model).
_GPTQ_BITS = (2, 4, 8)
_COMPRESSED_INTEGERS = ("pack-quantized", "int-quantized", "naive-quantized")
_COMPRESSED_FLOATS = ("float-quantized", "naive-quantized")
_COMPRESSED_STRATEGIES = ("tensor", "channel", "block")


@dataclass(frozen=True)
class Fp8:
    """FP8 weights: rows and columns that one scale covers, ``None`` where no tensor has a grid of blocks."""

    block: tuple[int, int] | None


def read_quantization(folder: Path, config: Mapping[str, Any]) -> Fp8 | None:
    """Return how the weights are quantized, ``None`` when they are not.

    Args:
        folder: model folder, for messages.
        config: the parsed config.json.

    Raises:
        UnsupportedError: a method that is not read.
        ModelError: settings that are none.

    """
    file, settings = folder / "config.json", _settings(config)
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise ModelError(f"{file}: quantization_config: wanted an object, got {settings!r}")
    method = settings.get("quant_method")
    if method == "fp8":
        return Fp8(_block(file, "weight_block_size", settings.get("weight_block_size", DEFAULT_BLOCK)))
    if method == "modelopt" and settings.get("quant_algo") == "FP8":
        return Fp8(None)
    groups = _float_groups(settings) if method == "compressed-tensors" else []
    blocks = {_block(file, "block_structure", group.get("block_structure")) for group in groups}
    if len(blocks) == 1:
        return Fp8(blocks.pop())
    raise _unsupported(folder, settings)


def _settings(config: Mapping[str, Any]) -> Any:
    """Return the settings, wherever transformers and its predecessors put them."""
    text = config.get("text_config")
    places = [config, text] if isinstance(text, Mapping) else [config]
    keys = ("quantization_config", "compression_config")
    return next((place[key] for place in places for key in keys if place.get(key)), None)


def _float_groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the weight settings of compressed-tensors' groups, none unless every group is FP8."""
    groups = settings.get("config_groups")
    if settings.get("format") not in _COMPRESSED_FLOATS or not isinstance(groups, Mapping):
        return []
    weights = [group.get("weights") if isinstance(group, Mapping) else None for group in groups.values()]
    found = [weight for weight in weights if isinstance(weight, Mapping) and _is_fp8(weight)]
    return found if len(found) == len(weights) else []


def _is_fp8(weight: Mapping[str, Any]) -> bool:
    is_float = weight.get("type") == "float" and weight.get("num_bits") == 8
    return is_float and weight.get("strategy") in _COMPRESSED_STRATEGIES and not weight.get("group_size")


def _block(file: Path, key: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    sizes = tuple(value) if isinstance(value, list | tuple) else ()
    if len(sizes) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise ModelError(f"{file}: {key}: wanted two positive integers, rows and columns of a block, got {value!r}")
    return sizes


def _unsupported(folder: Path, settings: Mapping[str, Any]) -> UnsupportedError:
    method = settings.get("quant_method", "unknown")
    details = [str(settings[key]) for key in ("format", "quant_algo", "bits") if settings.get(key) is not None]
    route = ""
    if _llama_cpp_reads(settings):
        route = (
            ", or let llama.cpp's converter dequantize it: `python convert_hf_to_gguf.py --outtype f16 --outfile "
            f"model-F16.gguf {folder}`, then `nsds-gguf convert model-F16.gguf`"
        )
    return UnsupportedError(
        f"{folder / 'config.json'}: the weights are quantized ({' '.join([str(method), *details])}); wanted F32, F16, "
        "BF16 or FP8 (fp8, modelopt FP8, compressed-tensors float-quantized with one scale a tensor, row or block): "
        f"use the original checkpoint{route}"
    )


def _llama_cpp_reads(settings: Mapping[str, Any]) -> bool:
    match settings.get("quant_method"):
        case "bitnet":
            return True
        case "gptq":
            return settings.get("bits") in _GPTQ_BITS
        case "compressed-tensors":
            groups = settings.get("config_groups")
            is_one = isinstance(groups, Mapping) and len(groups) == 1
            return is_one and settings.get("format") in _COMPRESSED_INTEGERS
    return False
