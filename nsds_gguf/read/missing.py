"""What is said when weights are not there: which are wanted, what the checkpoint has in their place, and what it is."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ModelError
from .names import Found
from .stored import StoredTensor, some

_ZERO3 = (
    "placeholders of DeepSpeed ZeRO-3, whose weights are elsewhere: save again with "
    "stage3_gather_16bit_weights_on_model_save, or run `python zero_to_fp32.py CHECKPOINT OUT` in the folder of the "
    "training checkpoint and convert OUT"
)


def check_complete(found: Found, hints: Sequence[str]) -> None:
    """Raise ``ModelError`` unless every wanted tensor is there and holds something.

    Args:
        found: the reading of the names.
        hints: what the reader must know then, one sentence each.

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
    instead = f"; in the weights without a place: {some(unplaced)}" if unplaced else ""
    raise ModelError(
        _with_hints(
            f"tensors missing from the weights: {some(missing)}{instead}; "
            "the checkpoint is incomplete or config.json is another model's",
            hints,
        )
    )


def is_empty(tensor: StoredTensor) -> bool:
    """Tell whether a tensor holds no number."""
    return 0 in tensor.shape


def _with_hints(message: str, hints: Sequence[str]) -> str:
    """Return one line: the message, then the hints."""
    return " ".join([message, *(f"({hint})" for hint in hints)])
