"""Stage 1, read: what the user names becomes a ``Model`` of canonical tensors.

Headers and JSON only; weights are read later, a slab of rows at a time, through ``Tensor.read_rows``.
"""

from __future__ import annotations

from pathlib import Path

from ..records import Model
from .families import supported_classes
from .folder import open_folder

__all__ = ["open_model", "supported_classes"]


def open_model(path: Path, pre: str | None = None) -> Model:
    """Open a Hugging Face model folder; see ``open_folder``."""
    return open_folder(path, pre)
