"""Wrong conversions of a right model: what each would write if one thing were forgotten or taken for another.

A logits test is worth what it would notice. ``mutations`` makes every error that applies to a model, so that tests can
assert how far each of them moves the logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nsds_gguf.records import Model, Tensor, kv

Edit = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def mutations(model: Model) -> dict[str, Model]:
    """Return the mutants of a model by what is wrong with them."""
    return {
        "theta left out": _without_key(model, "rope.freq_base"),
        "theta 5 % larger": _scaled_key(model, "rope.freq_base", 1.05),
        "norm eps doubled": _scaled_key(model, "attention.layer_norm_rms_epsilon", 2),
        "q and k in the other order": _edited(model, r"attn_[qk]", _reordered(model)),
        "gate and up exchanged": _exchanged(model, "ffn_gate", "ffn_up"),
        "norms exchanged": _exchanged(model, "attn_norm", "ffn_norm"),
        **_tie_mutations(model),
        **_rope_mutations(model),
        **_bias_mutations(model),
        **_qk_norm_mutations(model),
    }


def _tie_mutations(model: Model) -> dict[str, Model]:
    if not model.is_tied:
        tensors = tuple(tensor for tensor in model.tensors if tensor.name != "output.weight")
        return {"tied": replace(model, tensors=tensors)}
    embedding = model.by_name["token_embd.weight"]
    other = _with_array(embedding, embedding.load()[::-1])
    return {"untied": replace(model, tensors=(*model.tensors, replace(other, name="output.weight", role="output")))}


def _rope_mutations(model: Model) -> dict[str, Model]:
    given = {key.removeprefix(f"{model.architecture}.rope.scaling."): entry for key, entry in model.metadata.items()}
    mutants = {}
    if "factor" in given:
        mutants["rope factor left out"] = _without_key(model, "rope.scaling.factor")
        mutants["rope factor 5 % larger"] = _scaled_key(model, "rope.scaling.factor", 1.05)
    if "original_context_length" in given:
        mutants["yarn taken for linear"] = _without_key(model, "rope.scaling.type")  # which llama.cpp takes for linear
        mutants["original context left out"] = _without_key(model, "rope.scaling.original_context_length")
    if "attn_factor" in given:
        mutants["attention factor left out"] = _without_key(model, "rope.scaling.attn_factor")
    if "rope_freqs.weight" in model.by_name:
        tensors = tuple(tensor for tensor in model.tensors if tensor.name != "rope_freqs.weight")
        mutants["rope_freqs left out"] = replace(model, tensors=tensors)
        mutants["rope_freqs halved"] = _edited(model, "rope_freqs", lambda factors: np.maximum(factors / 2, 1))
    return mutants


def _bias_mutations(model: Model) -> dict[str, Model]:
    roles = sorted({tensor.role for tensor in model.tensors if tensor.role.endswith(".bias")})
    mutants = {f"{role} left out": _edited(model, re.escape(role), np.zeros_like) for role in roles}
    if roles:
        mutants["q and k biases in the other order"] = _edited(model, r"attn_[qk]\.bias", _reordered(model))
    return mutants


def _qk_norm_mutations(model: Model) -> dict[str, Model]:
    roles = ("attn_q_norm", "attn_k_norm") if model.hparams.qk_norm else ()
    return {f"{role} of ones": _edited(model, role, np.ones_like) for role in roles}


def _reordered(model: Model) -> Edit:
    """Return what takes rope's rows from the order of the architecture to the other one, head by head."""
    half = model.hparams.head_dim // 2
    split = (half, 2) if model.architecture == "llama" else (2, half)

    def edit(array: NDArray[np.float32]) -> NDArray[np.float32]:
        return array.reshape(-1, *split, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)

    return edit


def _exchanged(model: Model, first: str, second: str) -> Model:
    other = {first: second, second: first}
    arrays = {(tensor.layer, tensor.role): tensor for tensor in model.tensors if tensor.role in other}
    return replace(
        model,
        tensors=tuple(
            _with_array(tensor, arrays[tensor.layer, other[tensor.role]].load()) if tensor.role in other else tensor
            for tensor in model.tensors
        ),
    )


def _edited(model: Model, role: str, edit: Edit) -> Model:
    """Return the model with the tensors edited whose role matches the pattern."""
    matches = [re.fullmatch(role, tensor.role) is not None for tensor in model.tensors]
    assert any(matches), role
    tensors = zip(model.tensors, matches, strict=True)
    return replace(
        model, tensors=tuple(_with_array(tensor, edit(tensor.load())) if hit else tensor for tensor, hit in tensors)
    )


def _with_array(tensor: Tensor, array: NDArray[np.float32]) -> Tensor:
    rows = np.ascontiguousarray(array).reshape(-1, array.shape[-1])
    return replace(tensor, read_rows=lambda start, stop: rows[start:stop].copy())


def _without_key(model: Model, name: str) -> Model:
    metadata = dict(model.metadata)
    del metadata[f"{model.architecture}.{name}"]
    return replace(model, metadata=metadata)


def _scaled_key(model: Model, name: str, factor: float) -> Model:
    key = f"{model.architecture}.{name}"
    entry = model.metadata[key]
    return replace(model, metadata={**model.metadata, key: kv(factor * entry.value, entry.type)})
