"""Quantized weights in config.json: accept FP8 and MXFP4, refuse every other method with a way around it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError, UnsupportedError
from .mxfp4 import MxTensor
from .packed import CODES, ORIGINAL, Packed, packed_weights
from .stored import StoredTensor

DEFAULT_BLOCK = (128, 128)  # transformers' FineGrainedFP8Config where config.json has no weight_block_size

_SILENT = (
    "config.json does not describe the FP8 weights: their scales are read by shape, one per tensor, row or block of "
    "128 x 128."
)

# Methods that llama.cpp's convert_hf_to_gguf.py dequantizes (conversion/base.py, dequant_model).
_GPTQ_BITS = (2, 4, 8)
_COMPRESSED_INTEGERS = ("pack-quantized", "int-quantized", "naive-quantized")


@dataclass(frozen=True)
class Fp8:
    """FP8 weights: rows and columns per scale; ``None`` if no tensor has blocks."""

    block: tuple[int, int] | None


def read_quantization(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[Fp8 | None, list[str]]:
    """Return the quantization of the weights (``None``: not quantized), and notes on ignored settings.

    The tensors decide whether they are quantized; config.json adds the block size of FP8 weights.

    Args:
        folder: model folder, for messages.
        config: the parsed config.json.
        tensors: all tensors of the checkpoint, by name.

    Raises:
        UnsupportedError: a method that is not supported.
        ModelError: invalid settings.

    """
    settings, packed = _settings(config), packed_weights(tensors)
    if packed is not None:
        raise _unsupported(folder, settings, packed)
    if any(isinstance(tensor, MxTensor) for tensor in tensors.values()):
        return None, []
    has_codes = any(tensor.dtype == "F8_E4M3" for tensor in tensors.values())
    if not settings:
        return (Fp8(DEFAULT_BLOCK), [_SILENT]) if has_codes else (None, [])
    if not has_codes:
        return None, [_leftover(settings, tensors)]
    if not isinstance(settings, Mapping):
        raise ModelError(f"{folder / 'config.json'}: quantization_config: wanted an object, got {settings!r}")
    return _fp8(folder / "config.json", settings), []


def refuse_codes(folder: Path, config: Mapping[str, Any], dtypes: Collection[str]) -> None:
    """Raise ``UnsupportedError`` when config.json and dtypes show packed weights, before their download."""
    settings, codes = _settings(config), sorted(set(dtypes) & set(CODES))
    if settings and codes and not _is_mxfp4(settings):
        method = _called(settings)
        raise _unsupported(folder, settings, Packed(method, f"stored as {', '.join(codes)}", ORIGINAL))


def _is_mxfp4(settings: Any) -> bool:
    return isinstance(settings, Mapping) and settings.get("quant_method") == "mxfp4"


def _leftover(settings: Any, tensors: Mapping[str, StoredTensor]) -> str:
    """Return the note on quantization settings of weights that are not quantized."""
    dtypes = ", ".join(sorted({tensor.dtype for tensor in tensors.values()}))
    return (
        f"config.json says that the weights are quantized ({_called(settings)}), but they are plain {dtypes}: "
        "its quantization settings are ignored."
    )


def _fp8(file: Path, settings: Mapping[str, Any]) -> Fp8:
    """Return the FP8 settings: the block, ``None`` for one scale per row or tensor."""
    if settings.get("quant_method") == "fp8":
        return Fp8(_block(file, "weight_block_size", settings.get("weight_block_size", DEFAULT_BLOCK)))
    groups = settings.get("config_groups")
    listed = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [group.get("weights") for group in listed if isinstance(group, Mapping)]
    found = [weight for weight in weights if isinstance(weight, Mapping)]
    blocks = {_block(file, "block_structure", weight.get("block_structure")) for weight in found}
    if len(blocks) > 1:
        raise UnsupportedError(
            f"{file}: quantization_config: groups of different block_structure; wanted one for all FP8 weights"
        )
    return Fp8(blocks.pop() if blocks else None)


def _settings(config: Mapping[str, Any]) -> Any:
    """Return the quantization settings from any place that transformers has used for them."""
    text = config.get("text_config")
    places = [config, text] if isinstance(text, Mapping) else [config]
    keys = ("quantization_config", "compression_config", "quantization")
    return next((place[key] for place in places for key in keys if place.get(key)), None)


def _block(file: Path, key: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    sizes = tuple(value) if isinstance(value, list | tuple) else ()
    if len(sizes) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise ModelError(f"{file}: {key}: wanted two positive integers, rows and columns of a block, got {value!r}")
    return sizes


def _unsupported(folder: Path, settings: Any, packed: Packed) -> UnsupportedError:
    method = _called(settings) if settings and isinstance(settings, Mapping) else packed.method
    if method == "unknown":  # MLX names none
        method = packed.method
    route = ""
    if isinstance(settings, Mapping) and _llama_cpp_reads(settings):
        route = (
            ", or let llama.cpp's converter dequantize it: `python convert_hf_to_gguf.py --outtype f16 --outfile "
            f"model-F16.gguf {folder}`, then `nsds-gguf convert model-F16.gguf`"
        )
    return UnsupportedError(
        f"{folder}: the weights are quantized ({method}: {packed.name}); wanted F32, F16, BF16, MXFP4 or FP8 (fp8, "
        "modelopt FP8, compressed-tensors float-quantized with one scale per tensor, row or block): "
        f"{packed.step.replace('IN', str(folder))}{route}"
    )


def _called(settings: Any) -> str:
    """Return the name of the method and its variant."""
    if not isinstance(settings, Mapping):
        return str(settings)
    details = [str(settings[key]) for key in ("format", "quant_algo", "bits") if settings.get(key) is not None]
    method = settings.get("quant_method", "unknown")
    return "unknown" if method == "unknown" else " ".join([str(method), *details])


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
