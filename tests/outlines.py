"""GGUFs of the dimensions of known models, with a hole in place of the weights: llama.cpp can say what they would take.

They have no vocabulary, only its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

Shape = tuple[int, ...]
_F32_ONLY = ("conv1d", "ssm_a", "ssm_d", "gate_inp", "norm")


@dataclass(frozen=True)
class Outline:
    """Architecture, keys without its prefix, shapes by GGUF name, and tokens of the vocabulary."""

    architecture: str
    keys: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    n_vocab: int

    @property
    def full_keys(self) -> dict[str, Any]:
        """The keys as a GGUF has them."""
        return {f"{self.architecture}.{name}": value for name, value in self.keys.items()}


def write_outline(path: Path, outline: Outline) -> int:
    """Write the file, matrices in Q4_0, and return the bytes of its weights."""
    writer = GGUFWriter(path, outline.architecture)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    writer.add_uint32(f"{outline.architecture}.vocab_size", outline.n_vocab)
    add: dict[type, Any] = {float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
    for key, value in outline.full_keys.items():
        add[type(value)](key, value)
    total = 0
    for name, shape in outline.shapes.items():
        is_matrix = len(shape) > 1 and shape[-1] % 32 == 0 and not any(word in name for word in _F32_ONLY)
        ggml_type = GGMLQuantizationType.Q4_0 if is_matrix else GGMLQuantizationType.F32
        per_block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        n_bytes = int(np.prod(shape)) // per_block * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, raw_dtype=ggml_type)
        total += -(-n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as stream:
        stream.truncate(-(-path.stat().st_size // 32) * 32 + total)
    return total


def _decoder(n_layers: int, d: int, n_vocab: int, tied: bool, layer: Mapping[str, Shape]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"token_embd.weight": (n_vocab, d), "output_norm.weight": (d,)}
    if not tied:
        shapes["output.weight"] = (n_vocab, d)
    return shapes | {f"blk.{i}.{name}": shape for i in range(n_layers) for name, shape in layer.items()}


def llama(architecture: str, sizes: Sequence[int], n_vocab: int, tied: bool, experts: Sequence[int] = (),
          **keys: Any) -> Outline:  # fmt: skip
    """Return a model of the Llama kind: ``sizes`` are layers, width, hidden units, heads, KV heads, channels of a head.

    ``experts``: how many, hidden units of each, how many a token uses. Names of keys have ``__`` for a dot.
    """
    n_layers, d, ff, n_heads, n_kv, head = sizes
    layer: dict[str, Shape] = {
        "attn_norm.weight": (d,),
        "attn_q.weight": (n_heads * head, d),
        "attn_k.weight": (n_kv * head, d),
        "attn_v.weight": (n_kv * head, d),
        "attn_output.weight": (d, n_heads * head),
        "ffn_norm.weight": (d,),
    }
    if architecture.startswith(("qwen3", "gemma3")):
        layer |= {"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)}
    if architecture.startswith("gemma"):
        layer |= {"post_attention_norm.weight": (d,), "post_ffw_norm.weight": (d,)}
    stated: dict[str, Any] = {}
    if experts:
        n, hidden, used = experts
        layer |= {"ffn_gate_inp.weight": (n, d), "ffn_gate_exps.weight": (n, hidden, d),
                  "ffn_up_exps.weight": (n, hidden, d), "ffn_down_exps.weight": (n, d, hidden)}  # fmt: skip
        stated = {"expert_count": n, "expert_used_count": used, "expert_feed_forward_length": hidden}
    else:
        layer |= {"ffn_gate.weight": (ff, d), "ffn_up.weight": (ff, d), "ffn_down.weight": (d, ff)}
    stated |= {
        "block_count": n_layers, "embedding_length": d, "feed_forward_length": ff, "attention.head_count": n_heads,
        "attention.head_count_kv": n_kv, "attention.key_length": head, "attention.value_length": head,
        "rope.dimension_count": head, "context_length": 131072, "attention.layer_norm_rms_epsilon": 1e-5,
        **{name.replace("__", "."): value for name, value in keys.items()},
    }  # fmt: skip
    return Outline(architecture, stated, _decoder(n_layers, d, n_vocab, tied, layer), n_vocab)


def deepseek_v3() -> Outline:
    """Return DeepSeek-V3: latent attention, 256 experts of which a token uses 8."""
    n_layers, d, ff, n_heads, q_rank, kv_rank, nope, rope = 61, 7168, 18432, 128, 1536, 512, 128, 64
    n, hidden, dense = 256, 2048, 3
    shapes: dict[str, Shape] = _decoder(n_layers, d, 129280, False, {
        "attn_norm.weight": (d,), "attn_q_a.weight": (q_rank, d), "attn_q_a_norm.weight": (q_rank,),
        "attn_q_b.weight": (n_heads * (nope + rope), q_rank), "attn_kv_a_mqa.weight": (kv_rank + rope, d),
        "attn_kv_a_norm.weight": (kv_rank,), "attn_k_b.weight": (n_heads, kv_rank, nope),
        "attn_v_b.weight": (n_heads, nope, kv_rank), "attn_output.weight": (d, n_heads * nope), "ffn_norm.weight": (d,),
    })  # fmt: skip
    for i in range(n_layers):
        block: dict[str, Shape] = {"gate": (ff, d), "up": (ff, d), "down": (d, ff)}
        if i >= dense:
            block = {f"{name}_exps": (n, *shape) for name, shape in
                     {"gate": (hidden, d), "up": (hidden, d), "down": (d, hidden)}.items()}  # fmt: skip
            block |= {"gate_inp": (n, d), "gate_shexp": (hidden, d), "up_shexp": (hidden, d), "down_shexp": (d, hidden)}
        shapes |= {f"blk.{i}.ffn_{name}.weight": shape for name, shape in block.items()}
    keys = {
        "block_count": n_layers, "embedding_length": d, "feed_forward_length": ff, "attention.head_count": n_heads,
        "attention.head_count_kv": 1, "attention.key_length": kv_rank + rope, "attention.value_length": kv_rank,
        "attention.key_length_mla": nope + rope, "attention.value_length_mla": nope, "rope.dimension_count": rope,
        "context_length": 131072, "attention.layer_norm_rms_epsilon": 1e-5, "attention.q_lora_rank": q_rank,
        "attention.kv_lora_rank": kv_rank, "expert_count": n, "expert_used_count": 8, "expert_shared_count": 1,
        "expert_feed_forward_length": hidden, "leading_dense_block_count": dense, "expert_weights_scale": 1.0,
        "expert_gating_func": 1,
    }  # fmt: skip
    return Outline("deepseek2", keys, shapes, 129280)


def mamba() -> Outline:
    """Return Mamba 1.4B: states alone."""
    n_layers, d, state, rank = 48, 2048, 16, 128
    inner = 2 * d
    layer: dict[str, Shape] = {
        "attn_norm.weight": (d,), "ssm_in.weight": (2 * inner, d), "ssm_conv1d.weight": (inner, 4),
        "ssm_conv1d.bias": (inner,), "ssm_x.weight": (rank + 2 * state, inner), "ssm_dt.weight": (inner, rank),
        "ssm_dt.bias": (inner,), "ssm_a": (inner, state), "ssm_d": (inner,), "ssm_out.weight": (d, inner),
    }  # fmt: skip
    keys = {
        "block_count": n_layers, "embedding_length": d, "feed_forward_length": 0, "attention.head_count": 0,
        "context_length": 1048576, "attention.layer_norm_rms_epsilon": 1e-5, "ssm.conv_kernel": 4,
        "ssm.inner_size": inner, "ssm.state_size": state, "ssm.time_step_rank": rank,
    }  # fmt: skip
    return Outline("mamba", keys, _decoder(n_layers, d, 50280, True, layer), 50280)


def granite_hybrid() -> Outline:
    """Return a model like Granite 4 H Micro: four layers of 40 attend, the others are Mamba 2."""
    n_layers, d, ff, n_heads, n_kv, inner, state, ssm_heads = 40, 2048, 8192, 32, 8, 4096, 128, 64
    conv, head = inner + 2 * state, d // n_heads
    attention: dict[str, Shape] = {
        "attn_q.weight": (d, d), "attn_k.weight": (n_kv * head, d), "attn_v.weight": (n_kv * head, d),
        "attn_output.weight": (d, d),
    }  # fmt: skip
    recurrent: dict[str, Shape] = {
        "ssm_in.weight": (inner + conv + ssm_heads, d), "ssm_conv1d.weight": (conv, 4), "ssm_conv1d.bias": (conv,),
        "ssm_dt.bias": (ssm_heads,), "ssm_a": (ssm_heads, 1), "ssm_d": (ssm_heads, 1), "ssm_norm.weight": (1, inner),
        "ssm_out.weight": (d, inner),
    }  # fmt: skip
    shapes = _decoder(n_layers, d, 100352, True, {
        "attn_norm.weight": (d,), "ffn_norm.weight": (d,), "ffn_gate.weight": (ff, d), "ffn_up.weight": (ff, d),
        "ffn_down.weight": (d, ff),
    })  # fmt: skip
    attends = [i % 10 == 5 for i in range(n_layers)]
    for i, is_attention in enumerate(attends):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in (attention if is_attention else recurrent).items()}
    keys = {
        "block_count": n_layers, "embedding_length": d, "feed_forward_length": ff, "attention.head_count": n_heads,
        "attention.head_count_kv": [n_kv if attends_here else 0 for attends_here in attends],
        "context_length": 131072, "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": head,
        "ssm.conv_kernel": 4, "ssm.inner_size": inner, "ssm.state_size": state, "ssm.time_step_rank": ssm_heads,
        "ssm.group_count": 1,
    }  # fmt: skip
    return Outline("granitehybrid", keys, shapes, 100352)


KNOWN = {
    "SmolLM2 135M": llama("llama", (30, 576, 1536, 9, 3, 64), 49152, True),
    "TinyLlama 1.1B": llama("llama", (22, 2048, 5632, 32, 4, 64), 32000, False),
    "Llama 3.1 8B": llama("llama", (32, 4096, 14336, 32, 8, 128), 128256, False),
    "Llama 2 7B": llama("llama", (32, 4096, 11008, 32, 32, 128), 32000, False),
    "Qwen3 4B": llama("qwen3", (36, 2560, 9728, 32, 8, 128), 151936, True),
    "Gemma 3 4B": llama("gemma3", (34, 2560, 10240, 8, 4, 256), 262208, True, attention__sliding_window=1024),
    "Gemma 2 9B": llama("gemma2", (42, 3584, 14336, 16, 8, 256), 256000, True, attention__sliding_window=4096),
    "Mixtral 8x7B": llama("llama", (32, 4096, 14336, 32, 8, 128), 32000, False, (8, 14336, 2)),
    "Qwen3 30B A3B": llama("qwen3moe", (48, 2048, 6144, 32, 4, 128), 151936, False, (128, 768, 8)),
    "DeepSeek V3": deepseek_v3(),
    "Mamba 1.4B": mamba(),
    "Granite 4 H Micro": granite_hybrid(),
}
