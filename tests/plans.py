"""Models ready to be written and plans of chosen types, for tests of what happens after allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from gguf import GGUFWriter, TokenType
from gguf.gguf_writer import GGUFValue
from models import make_model
from numpy.typing import NDArray
from recipes import recipe
from tiny_gguf import tiny_vocabulary

from nsds_gguf.llamacpp import ggml
from nsds_gguf.quantize.header import header_bytes
from nsds_gguf.records import Hparams, Model, Plan, PlannedTensor, Target


def writable_model(arrays: Mapping[str, NDArray[np.floating]], hparams: Hparams) -> Model:
    """Return a llama model of ``arrays`` with the keys that llama.cpp needs; the vocabulary may be cut short."""
    return replace(make_model(arrays, hparams), metadata={**llama_keys(hparams), **vocabulary_keys(hparams.n_vocab)})


def llama_keys(h: Hparams) -> dict[str, GGUFValue]:
    """Return the keys without which llama.cpp does not open a llama model."""
    writer = GGUFWriter(None, "llama")
    writer.add_name("Test Model")
    writer.add_block_count(h.n_layers)
    writer.add_context_length(h.n_ctx_train)
    writer.add_embedding_length(h.n_embd)
    writer.add_feed_forward_length(h.n_ff)
    writer.add_head_count(h.n_heads)
    writer.add_head_count_kv(h.n_kv_heads)
    writer.add_key_length(h.head_dim)
    writer.add_value_length(h.head_dim)
    writer.add_rope_dimension_count(h.head_dim)
    writer.add_layer_norm_rms_eps(h.norm_eps)
    writer.add_vocab_size(h.n_vocab)
    return dict(writer.kv_data[0])


def vocabulary_keys(n_vocab: int) -> dict[str, GGUFValue]:
    """Return a sentencepiece vocabulary: special tokens, bytes, and made-up words up to ``n_vocab``."""
    tokens = [*tiny_vocabulary(), *(f"▁word{i}" for i in range(n_vocab))][:n_vocab]
    kinds = [TokenType.BYTE if token.startswith("<0x") else TokenType.NORMAL for token in tokens]
    writer = GGUFWriter(None, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-0.1 * i for i in range(n_vocab)])
    writer.add_token_types([TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *kinds[3:]])
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    del writer.kv_data[0]["general.architecture"]
    return dict(writer.kv_data[0])


def plan_of(
    model: Model,
    types: Mapping[str, str],
    *,
    target: Target | None = None,
    calibration: str = "none",
    scores: str = "",
) -> Plan:
    """Return a plan of the given types by tensor name; the other tensors stay F32. ``scores`` is a digest."""
    tensors = [
        PlannedTensor(t.name, t.role, t.layer, t.shape, name, n_bytes, "chosen", "test")
        for t in model.tensors
        for name in [types.get(t.name, "F32")]
        for n_bytes in [t.n_rows * ggml.row_bytes(name, t.n_cols)]
    ]
    asked = recipe(target, types=tuple(sorted(set(types.values()))), calibration=calibration)
    return Plan(
        recipe=asked,
        tensors=tuple(tensors),
        header_bytes=header_bytes(model, asked),
        model_id=model.model_id,
        model_name=model.name,
        scores_digest=scores,
    )


def uniform_plan(model: Model, type_name: str) -> Plan:
    """Return a plan that gives every matrix one type."""
    return plan_of(model, {tensor.name: type_name for tensor in model.tensors if tensor.is_matrix})


def cycled_types(model: Model, type_names: Sequence[str] = tuple(ggml.TYPES)) -> dict[str, str]:
    """Return the types dealt out in turn to the matrices of a model."""
    matrices = [tensor.name for tensor in model.tensors if tensor.is_matrix]
    return {name: type_names[i % len(type_names)] for i, name in enumerate(matrices)}
