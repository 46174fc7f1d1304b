"""llama.cpp's quantization presets (ftypes): the size that ``llama-quantize`` gives a model, computed from its shapes.

The presets are the K-quants that need no importance matrix. For architectures with rules of their own in llama.cpp
(Falcon, GLM 5) the true size may differ a little.

Source: llama.cpp src/llama-quant.cpp, ``llama_tensor_get_type_impl`` and ``tensor_type_fallback``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..records import Hparams, Model
from . import Candidate, candidates, fitting_type

# Presets, smallest first, each with the type of tensors that no rule names.
PRESETS = {
    "Q2_K": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K",
}  # fmt: skip

# The type of attn_output, and of ffn_down in layers without a rule.
_RAISED = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}

_SIX_BITS_IN_PART = ("Q4_K_M", "Q5_K_M")
_OUTPUT_OF_EIGHT_EXPERTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")
_LAYERS_OF_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}

_VALUES = re.compile(r"attn_(?:v|qkv|kv_b)\.weight")


@dataclass(frozen=True)
class _Layers:
    """The position of a tensor among those of its kind."""

    index: int
    count: int

    @property
    def takes_more_bits(self) -> bool:
        """True in the first and last eighth, and for every third in between."""
        i, n = self.index, self.count
        return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def preset_bytes(model: Model, preset: str) -> int:
    """Return the bytes of all tensors, without padding, in llama.cpp's file of a model with a preset."""
    types = preset_types(model, preset)
    return sum(candidate.n_bytes(types[candidate.tensor.name]) for candidate in candidates(model, (PRESETS[preset],)))


def preset_types(model: Model, preset: str) -> Mapping[str, str]:
    """Return the type of every tensor, by name, in llama.cpp's file of a model with a preset.

    Where rows do not fit K-quants, IQ4_NL stands for Q4_0, which takes the same bytes.
    """
    found = candidates(model, (PRESETS[preset],))
    in_order = sorted(found, key=lambda candidate: -1 if candidate.tensor.layer is None else candidate.tensor.layer)
    values = [candidate.tensor.name for candidate in in_order if _VALUES.search(candidate.tensor.name)]
    downs = [candidate.tensor.name for candidate in in_order if "ffn_down" in candidate.tensor.name]
    types: dict[str, str] = {}
    for candidate in found:
        name = candidate.tensor.name
        if candidate.kind == "unquantized":
            types[name] = candidate.types[0]
            continue
        if _is_output(model, name):
            wanted = "Q6_K" if candidate.tensor.n_cols % 256 == 0 else "Q8_0"
        elif name in values:
            wanted = _values_type(model, preset, _Layers(values.index(name), len(values)))
        elif name in downs:
            index = _layer(candidate) if model.hparams.n_experts > 1 else downs.index(name)
            wanted = _down_type(preset, _Layers(index, model.hparams.n_layers))
        else:
            wanted = _other_type(model.hparams, preset, name)
        types[name] = fitting_type(wanted, candidate)
    return types


def _layer(candidate: Candidate) -> int:
    return candidate.tensor.layer or 0


def _is_output(model: Model, name: str) -> bool:
    """Return whether a tensor computes the logits; in a tied model every embedding counts."""
    return name == "output.weight" or (model.is_tied and name in ("token_embd.weight", "per_layer_token_embd.weight"))


def _values_type(model: Model, preset: str, layers: _Layers) -> str:
    """Return the type of attn_v, or of a fused tensor that holds it."""
    h = model.hparams
    if h.n_experts == 8:
        return "Q8_0"
    chosen = PRESETS[preset]
    if preset == "Q2_K":
        chosen = "Q4_K" if h.n_kv_heads and h.n_heads // h.n_kv_heads >= 4 else "Q3_K"
    elif preset == "Q3_K_M":
        chosen = "Q5_K" if layers.index < 2 else "Q4_K"
    elif preset == "Q3_K_L" or (preset == "Q4_K_S" and layers.index < 4):
        chosen = "Q5_K"
    elif preset in _SIX_BITS_IN_PART and layers.takes_more_bits:
        chosen = "Q6_K"
    is_large = h.n_layers == _LAYERS_OF_70B.get(model.architecture)
    shares_values = h.n_heads != h.n_kv_heads or model.architecture != "llama"
    return "Q5_K" if is_large and shares_values and chosen in ("Q3_K", "Q4_K") else chosen


def _down_type(preset: str, layers: _Layers) -> str:
    """Return the type of ffn_down."""
    if preset == "Q3_K_M" and layers.index < layers.count // 16:
        return "Q5_K"
    if preset in _SIX_BITS_IN_PART and layers.takes_more_bits:
        return "Q6_K"
    if preset == "Q4_K_S" and layers.index < layers.count // 8:
        return "Q5_K"
    return _RAISED.get(preset, PRESETS[preset])


def _other_type(h: Hparams, preset: str, name: str) -> str:
    """Return the type of attn_output, attn_k and everything without a rule."""
    if "attn_k.weight" in name and h.n_experts == 8:
        return "Q8_0"
    if "attn_output.weight" not in name:
        return PRESETS[preset]
    if h.n_experts == 8:
        return "Q5_K" if preset in _OUTPUT_OF_EIGHT_EXPERTS else PRESETS[preset]
    return _RAISED.get(preset, PRESETS[preset])
