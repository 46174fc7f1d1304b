"""Packed weights: detect the method by names and dtypes of tensors, and suggest a way out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .stored import StoredTensor

_DEQUANTIZE = (
    "dequantize it with transformers (`AutoModelForCausalLM.from_pretrained(IN).dequantize()`, then save_pretrained), "
    "or use the original checkpoint"
)
ORIGINAL = "use the original checkpoint"
_MLX = "dequantize it with `mlx_lm.convert --hf-path IN --mlx-path OUT --dequantize`, then convert OUT"


@dataclass(frozen=True)
class Packed:
    """Packed weights: the name of the method, a tensor that shows it, and the suggested step."""

    method: str
    name: str
    step: str


@dataclass(frozen=True)
class _Sign:
    """Signature of a method: a pattern of names, and dtypes of such a tensor (default: any)."""

    method: str
    pattern: str
    step: str = ORIGINAL
    dtypes: tuple[str, ...] = ()


# Dtypes that low-bit codes are packed into, as named by safetensors and torch.
CODES = ("I8", "U8", "I32", "U32", "I64", "F4", "int8", "uint8", "int32", "int64")

# The first match counts; less specific patterns come last.
_SIGNS = (
    _Sign("bitsandbytes", r".*\.(absmax|quant_map|nested_absmax|SCB|quant_state\..*)", _DEQUANTIZE),
    _Sign("GPTQ", r".*\.g_idx"),
    _Sign("AWQ or GPTQ", r".*\.qweight"),
    _Sign("compressed-tensors", r".*\.weight_packed", ORIGINAL),
    _Sign("modelopt NVFP4", r".*\.weight_scale_2"),
    _Sign("MXFP4", r".*_blocks", _DEQUANTIZE, CODES),
    _Sign("HQQ", r".*\.W_q"),
    _Sign("quanto", r".*\.weight\._data"),
    _Sign("torchao", r".*(:_?(data|qdata)|_weight_qdata|\.weight_(qdata|int_data))"),
    _Sign("AQLM", r".*\.codebooks"),
    _Sign("VPTQ", r".*\.centroids(\.weight)?"),
    _Sign("QuIP#", r".*\.Qidxs(_\d+)?"),
    _Sign("EXL3", r".*\.trellis"),
    _Sign("EXL2", r".*\.q_weight"),
    _Sign("EETQ", r".*\.weight_scales"),
)


def packed_weights(tensors: Mapping[str, StoredTensor]) -> Packed | None:
    """Return how the weights are packed; ``None`` for plain weights."""
    for sign in _SIGNS:
        for name, tensor in tensors.items():
            if re.fullmatch(sign.pattern, name) and (not sign.dtypes or tensor.dtype in sign.dtypes):
                return Packed(sign.method, name, sign.step)
    for name, tensor in tensors.items():
        if tensor.dtype in CODES and name.endswith("weight") and len(tensor.shape) > 1:
            is_mlx = name.removesuffix("weight") + "scales" in tensors
            return Packed("MLX", name, _MLX) if is_mlx else Packed(f"codes of {tensor.dtype}", name, ORIGINAL)
    return None
