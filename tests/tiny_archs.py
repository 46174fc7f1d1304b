"""Random GGUFs of architectures that no Hugging Face reader of ours knows, small and loadable by llama.cpp.

Their rows fit K-quants where llama.cpp's loader leaves the choice. The vocabulary is that of ``tiny_gguf``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import ExpertGatingFuncType, GGUFWriter
from numpy.typing import NDArray
from tiny_gguf import N_VOCAB, add_vocabulary, tiny_vocabulary

N_LAYERS, N_EMBD, N_FF, N_HEADS, N_KV_HEADS = 2, 256, 512, 4, 2
D_INNER, D_STATE, D_CONV, DT_RANK = 2 * N_EMBD, 16, 4, 16  # mamba
Q_RANK, KV_RANK, NOPE, ROPE, N_EXPERTS = 256, 256, 32, 32, 4  # deepseek2
EPS = 1e-5

Arrays = dict[str, NDArray[np.float32]]


class _Random:
    """Draws weights that keep the size of a random vector, and gains around one."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(11)

    def matrix(self, *shape: int) -> NDArray[np.float32]:
        return (self._rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    def gain(self, n: int) -> NDArray[np.float32]:
        return self._rng.uniform(0.5, 1.5, n).astype(np.float32)

    def bias(self, n: int) -> NDArray[np.float32]:
        return self._rng.uniform(-0.5, 0.5, n).astype(np.float32)


def _frame(rng: _Random, layer: Callable[[int], Arrays], norm_bias: bool = False) -> Arrays:
    """Return embedding, layers, norm and output."""
    arrays = {"token_embd.weight": rng.matrix(N_VOCAB, N_EMBD)}
    for i in range(N_LAYERS):
        arrays |= {f"blk.{i}.{name}": array for name, array in layer(i).items()}
    arrays["output_norm.weight"] = rng.gain(N_EMBD)
    if norm_bias:
        arrays["output_norm.bias"] = rng.bias(N_EMBD)
    arrays["output.weight"] = rng.matrix(N_VOCAB, N_EMBD) / 2  # guesses little: no perplexity looks absurd
    return arrays


def mamba_arrays() -> Arrays:
    rng = _Random()
    return _frame(
        rng,
        lambda _: {
            "attn_norm.weight": rng.gain(N_EMBD),
            "ssm_in.weight": rng.matrix(2 * D_INNER, N_EMBD),
            "ssm_conv1d.weight": rng.matrix(D_INNER, D_CONV),
            "ssm_conv1d.bias": rng.bias(D_INNER),
            "ssm_x.weight": rng.matrix(DT_RANK + 2 * D_STATE, D_INNER),
            "ssm_dt.weight": rng.matrix(D_INNER, DT_RANK),
            "ssm_dt.bias": rng.bias(D_INNER),
            "ssm_a": -np.tile(np.arange(1, D_STATE + 1, dtype=np.float32), (D_INNER, 1)),
            "ssm_d": rng.gain(D_INNER),
            "ssm_out.weight": rng.matrix(N_EMBD, D_INNER),
        },
    )


def _mamba_keys(writer: GGUFWriter) -> None:
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(D_CONV)
    writer.add_ssm_inner_size(D_INNER)
    writer.add_ssm_state_size(D_STATE)
    writer.add_ssm_time_step_rank(DT_RANK)
    writer.add_layer_norm_rms_eps(EPS)


def starcoder2_arrays() -> Arrays:
    rng = _Random()
    n_kv = N_EMBD // N_HEADS * N_KV_HEADS
    return _frame(
        rng,
        lambda _: {
            "attn_norm.weight": rng.gain(N_EMBD),
            "attn_norm.bias": rng.bias(N_EMBD),
            "attn_q.weight": 2 * rng.matrix(N_EMBD, N_EMBD),
            "attn_q.bias": rng.bias(N_EMBD),
            "attn_k.weight": 2 * rng.matrix(n_kv, N_EMBD),
            "attn_k.bias": rng.bias(n_kv),
            "attn_v.weight": rng.matrix(n_kv, N_EMBD),
            "attn_v.bias": rng.bias(n_kv),
            "attn_output.weight": rng.matrix(N_EMBD, N_EMBD),
            "attn_output.bias": rng.bias(N_EMBD),
            "ffn_norm.weight": rng.gain(N_EMBD),
            "ffn_norm.bias": rng.bias(N_EMBD),
            "ffn_up.weight": rng.matrix(N_FF, N_EMBD),
            "ffn_up.bias": rng.bias(N_FF),
            "ffn_down.weight": rng.matrix(N_EMBD, N_FF),
            "ffn_down.bias": rng.bias(N_EMBD),
        },
        norm_bias=True,
    )


def _starcoder2_keys(writer: GGUFWriter) -> None:
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_layer_norm_eps(EPS)
    writer.add_rope_freq_base(10000.0)


def deepseek2_arrays() -> Arrays:
    """Latent attention in both layers, the first with a dense block, the second with routed and shared experts."""
    rng = _Random()

    def layer(i: int) -> Arrays:
        attention = {
            "attn_norm.weight": rng.gain(N_EMBD),
            "attn_q_a.weight": rng.matrix(Q_RANK, N_EMBD),
            "attn_q_a_norm.weight": rng.gain(Q_RANK),
            "attn_q_b.weight": 2 * rng.matrix(N_HEADS * (NOPE + ROPE), Q_RANK),
            "attn_kv_a_mqa.weight": rng.matrix(KV_RANK + ROPE, N_EMBD),
            "attn_kv_a_norm.weight": rng.gain(KV_RANK),
            "attn_k_b.weight": 2 * rng.matrix(N_HEADS, KV_RANK, NOPE),
            "attn_v_b.weight": rng.matrix(N_HEADS, NOPE + ROPE, KV_RANK),
            "attn_output.weight": rng.matrix(N_EMBD, N_HEADS * (NOPE + ROPE)),
            "ffn_norm.weight": rng.gain(N_EMBD),
        }
        dense = {
            "ffn_gate.weight": rng.matrix(N_FF, N_EMBD),
            "ffn_up.weight": rng.matrix(N_FF, N_EMBD),
            "ffn_down.weight": rng.matrix(N_EMBD, N_FF),
        }
        experts = {
            "ffn_gate_inp.weight": 2 * rng.matrix(N_EXPERTS, N_EMBD),
            "exp_probs_b.bias": rng.bias(N_EXPERTS),
            "ffn_gate_exps.weight": rng.matrix(N_EXPERTS, N_EMBD, N_EMBD),
            "ffn_up_exps.weight": rng.matrix(N_EXPERTS, N_EMBD, N_EMBD),
            "ffn_down_exps.weight": rng.matrix(N_EXPERTS, N_EMBD, N_EMBD),
            "ffn_gate_shexp.weight": rng.matrix(N_EMBD, N_EMBD),
            "ffn_up_shexp.weight": rng.matrix(N_EMBD, N_EMBD),
            "ffn_down_shexp.weight": rng.matrix(N_EMBD, N_EMBD),
        }
        return attention | (experts if i else dense)

    return _frame(rng, layer)


def _deepseek2_keys(writer: GGUFWriter) -> None:
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(ROPE)
    writer.add_q_lora_rank(Q_RANK)
    writer.add_kv_lora_rank(KV_RANK)
    writer.add_key_length(KV_RANK + ROPE)
    writer.add_value_length(KV_RANK)
    writer.add_key_length_mla(NOPE + ROPE)
    writer.add_value_length_mla(NOPE + ROPE)
    writer.add_leading_dense_block_count(1)
    writer.add_expert_count(N_EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_expert_shared_count(1)
    writer.add_expert_feed_forward_length(N_EMBD)
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


ARCHITECTURES: dict[str, tuple[Callable[[], Arrays], Callable[[GGUFWriter], None]]] = {
    "mamba": (mamba_arrays, _mamba_keys),
    "starcoder2": (starcoder2_arrays, _starcoder2_keys),
    "deepseek2": (deepseek2_arrays, _deepseek2_keys),
}


def write_tiny_arch(path: Path, architecture: str) -> Path:
    """Write the F32 GGUF of one of ``ARCHITECTURES`` and return ``path``."""
    arrays, keys = ARCHITECTURES[architecture]
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_block_count(N_LAYERS)
    writer.add_embedding_length(N_EMBD)
    keys(writer)
    add_vocabulary(writer, tiny_vocabulary())
    for name, array in arrays().items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
