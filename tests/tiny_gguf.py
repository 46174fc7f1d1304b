"""A llama model of two tiny layers, as a GGUF made from a seed alone, and a text for it.

llama.cpp's numbers for these very files are recorded in ``golden/perplexity.json`` by
``tools/check/check_perplexity.py``. The output rows are the embedding rows plus noise, so that the model expects each
token to be followed by itself, and the text stutters: shift a target by one, or score another half of a chunk, and the
perplexity is another.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from numpy.typing import NDArray

N_LAYERS, N_EMBD, N_FF, N_HEADS, N_KV_HEADS = 2, 64, 96, 4, 2
HEAD_DIM = N_EMBD // N_HEADS
ROPE_THETA = 10000.0
NORM_EPS = 1e-5
UNK, BOS, EOS = range(3)
SPECIALS = ("<unk>", "<s>", "</s>")
N_VOCAB = len(SPECIALS) + 256 + 1  # a token for each byte, and one for the space

Weights = dict[str, NDArray[np.float32]]


def tiny_weights(seed: int = 1) -> Weights:
    """Return the tensors by GGUF name, rows first."""
    rng = np.random.default_rng(seed)

    def matrix(n_rows: int, n_cols: int, gain: float = 1.0) -> NDArray[np.float32]:
        return (rng.standard_normal((n_rows, n_cols)) * gain / np.sqrt(n_cols)).astype(np.float32)

    embedding = matrix(N_VOCAB, N_EMBD, gain=8)
    weights = {"token_embd.weight": embedding}
    for layer in range(N_LAYERS):
        weights |= {
            f"blk.{layer}.attn_norm.weight": rng.uniform(0.5, 1.5, N_EMBD).astype(np.float32),
            f"blk.{layer}.attn_q.weight": matrix(N_EMBD, N_EMBD, gain=2),
            f"blk.{layer}.attn_k.weight": matrix(N_KV_HEADS * HEAD_DIM, N_EMBD, gain=2),
            f"blk.{layer}.attn_v.weight": matrix(N_KV_HEADS * HEAD_DIM, N_EMBD),
            f"blk.{layer}.attn_output.weight": matrix(N_EMBD, N_EMBD),
            f"blk.{layer}.ffn_norm.weight": rng.uniform(0.5, 1.5, N_EMBD).astype(np.float32),
            f"blk.{layer}.ffn_gate.weight": matrix(N_FF, N_EMBD),
            f"blk.{layer}.ffn_up.weight": matrix(N_FF, N_EMBD),
            f"blk.{layer}.ffn_down.weight": matrix(N_EMBD, N_FF),
        }
    weights["output_norm.weight"] = rng.uniform(0.5, 1.5, N_EMBD).astype(np.float32)
    weights["output.weight"] = embedding / 8 + matrix(N_VOCAB, N_EMBD)
    return weights


def write_tiny_gguf(
    path: Path,
    type_name: str = "F32",
    *,
    weights: Weights | None = None,
    add_bos: bool = True,
    add_eos: bool = False,
    vocabulary: list[str] | None = None,
    split_max_tensors: int = 0,
) -> Path:
    """Write the model with its matrices in one type, in one file unless a file takes fewer tensors; return ``path``."""
    writer = GGUFWriter(path, "llama", split_max_tensors=split_max_tensors)
    writer.add_context_length(512)
    writer.add_block_count(N_LAYERS)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_THETA)
    add_vocabulary(writer, vocabulary or tiny_vocabulary(), add_bos, add_eos)
    for name, tensor in (weights or tiny_weights()).items():
        kind = GGMLQuantizationType[type_name] if tensor.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_vocabulary() -> list[str]:
    """Return the tokens: specials, bytes, and sentencepiece's mark for a space."""
    return [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]


def add_vocabulary(writer: GGUFWriter, tokens: list[str], add_bos: bool = True, add_eos: bool = False) -> None:
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    kinds += [TokenType.BYTE if token.startswith("<0x") else TokenType.NORMAL for token in tokens[len(SPECIALS) :]]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(add_eos)


def tiny_text(n_bytes: int = 2700, seed: int = 2) -> str:
    """Return a stuttering text of letters, spaces and newlines: a byte is a token, but for one space before it all."""
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz \n", dtype=np.uint8)
    drawn = letters[rng.integers(0, len(letters), n_bytes)]
    fresh = rng.random(n_bytes) > 0.6
    fresh[0] = True
    return drawn[np.maximum.accumulate(np.where(fresh, np.arange(n_bytes), 0))].tobytes().decode()
