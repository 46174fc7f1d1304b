"""Errors for missing weights: the missing tensors, those in their place, and the likely cause."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ModelError, UnsupportedError
from .foreign import merge_step
from .names import Found
from .stored import StoredTensor, some

# Names of tensors that PEFT adds to a model.
_ADAPTER = re.compile(
    r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|hada_w\d_[ab]|lokr_w\d(_[ab])?|ia3_l|vera_lambda_[bd]"
    r"|oft_[rR]|boft_[RS]|modules_to_save|trainable_tokens_delta|prompt_embeddings)(\.|$)"
)

_MISTRAL = re.compile(r"(^|\.)layers\.0\.attention\.wq\.weight")

_ZERO3 = (
    "placeholders of DeepSpeed ZeRO-3 without weights: save again with "
    "stage3_gather_16bit_weights_on_model_save, or run `python zero_to_fp32.py CHECKPOINT OUT` in the folder of the "
    "training checkpoint and convert OUT"
)

_OWN_NAMES = (
    "The names are those of Meta's and Mistral's own format: get the weights in Hugging Face format, "
    "model*.safetensors, or convert them with transformers' convert_llama_weights_to_hf.py or "
    "convert_mistral_weights_to_hf.py."
)


def check_complete(found: Found, hints: Sequence[str]) -> None:
    """Raise ``ModelError`` unless every wanted tensor exists and is not empty.

    Args:
        found: the resolved names.
        hints: to add to the message, one sentence each.

    """
    used = [name for _, names in found.places for name in names]
    missing = [name for name in used if name not in found.stored]
    empty = [tensor.name for tensor in map(found.stored.get, used) if tensor is not None and is_empty(tensor)]
    empty = empty or [tensor.name for tensor in found.stored.values() if missing and is_empty(tensor)]
    if empty:
        raise ModelError(_with_hints(f"{len(empty)} tensors are empty ({some(empty)}): {_ZERO3}", hints))
    if not missing:
        return
    unplaced = [tensor.name for name, tensor in found.stored.items() if name not in set(used)]
    if any(_MISTRAL.search(name) for name in found.stored):
        hints = (*hints, _OWN_NAMES)
    instead = f"; unused tensors in the weights: {some(unplaced)}" if unplaced else ""
    raise ModelError(
        _with_hints(
            f"tensors missing from the weights: {some(missing)}{instead}; "
            "the checkpoint is incomplete or config.json belongs to another model",
            hints,
        )
    )


def check_no_adapter(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ``UnsupportedError`` for weights of an adapter, alone or within a model."""
    adapted = [name for name in tensors if _ADAPTER.search(name)]
    if not adapted:
        return
    what = "an adapter that is not merged" if len(adapted) < len(tensors) else "an adapter, not a model"
    raise UnsupportedError(
        f"{folder}: the weights hold {what} ({len(adapted)} tensors: {some(adapted)}): merge it into its base model: "
        f"{merge_step(folder)}"
    )


def is_empty(tensor: StoredTensor) -> bool:
    """Return whether a tensor has no weights."""
    return 0 in tensor.shape


def _with_hints(message: str, hints: Sequence[str]) -> str:
    """Return one line: the message, then the hints."""
    return " ".join([message, *(f"({hint})" for hint in hints)])
