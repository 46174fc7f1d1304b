"""What llama.cpp leaves as it is, and what its kernels take in F32 alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ..records import Tensor

# --- what may be quantized ------------------------------------------------------------------------------------

# Parts of the names of matrices that llama.cpp leaves as they are, and why (tensor_allows_quantization in
# src/llama-quant.cpp).
_KEPT = {
    r"_norm\.weight": "norm",
    r"ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight": "router",
    r"altup|laurel|per_layer_model_proj|indexer\.[kq]_proj\.weight": "small",
    r"ssm_conv1d|shortconv\.conv\.weight": "convolution",
    r"time_mix_(first|[wva][012]|g[12]|decay_w[12]|lerp_fused)\.weight": "recurrence",
    r"^position_embd\.weight|^token_types\.weight|\.position_embd|sam\.pos_embd|\.rel_pos|attn_rel_b\.weight":
        "positions",
    r"sam\.neck\.|sam\.net_|\.patch_embd|\.patch_merger": "pictures",
    r"a\.rvq\.codebook|mm\.a\.code_embd": "sound",
}  # fmt: skip
_KEPT_BY_ARCHITECTURE = {
    "glm5-next": (
        r"hc_|indexer\.(attn_q_b|attn_k|proj)|indexer_compressor_(gate|ape)|ssm_(f_[ab]|g_[ab]|beta)\.weight"
        r"|attn_(kv_a_mqa|k_b|v_b)\.weight"
    )
}


def kept_reason(tensor: Tensor, architecture: str = "") -> str:
    """Return why llama.cpp does not quantize a tensor, in a word or two; empty when it does."""
    if not tensor.is_matrix or tensor.n_rows == 1:  # ggml counts no dimension of 1 behind the first
        return "vector"
    special = _KEPT_BY_ARCHITECTURE.get(architecture)
    if special is not None and re.search(special, tensor.name):
        return "small"
    return next((why for pattern, why in _KEPT.items() if re.search(pattern, tensor.name)), "")


# Tensors with two dimensions or more that llama.cpp adds, multiplies element by element, convolves or scans with, and
# so takes in F32 alone (LLM_TENSOR_INFOS in src/llama-arch.cpp; binary-ops.cpp and ops.cpp of ggml-cpu).
_F32_ONLY = re.compile(
    r"_norm(_\d|_key|_query|_conv|_exps)?\.weight$|norm\.weight$|\.(bias|scale)$|\.(ssm_a|ssm_d)$"
    r"|ssm_conv1d(_[qkv])?\.weight$|shortconv\.conv\.weight$|ple_conv1d\.weight$"
    r"|(time|channel)_mix_(lerp_\w+|first|decay|[wav]0|k_k|k_a|r_k|ln)\.weight$|rope_(freqs|factors_long|factors_short)"
    r"|altup_correct_scale\.weight$|kpool_ape|exp_probs_b|attn_sinks|hc_\w+_(base|scale)|layer_output_scale"
)


def needs_f32(name: str, shape: Sequence[int]) -> bool:
    """Return whether llama.cpp computes with a tensor in no type but F32: vectors, norms, biases, convolutions."""
    return math.prod(shape[:-1]) == 1 or _F32_ONLY.search(name) is not None
