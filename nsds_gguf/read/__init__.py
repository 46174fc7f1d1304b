"""Open a model folder or a GGUF as a ``Model`` of canonical tensors.

Reads headers and JSON only; ``Tensor.rows`` reads weights later, a slab of rows at a time.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError
from ..llamacpp.gguf_header import is_gguf
from ..records import Model
from .architectures.families import supported_classes
from .folder import check_supported, open_folder
from .gguf_source import open_gguf

__all__ = ["check_supported", "open_model", "supported_classes"]


def open_model(path: Path, pre: str | None = None, allow_requantize: bool = False, mtp: str | None = None) -> Model:
    """Open a Hugging Face model folder or a GGUF file; see ``open_folder`` and ``open_gguf``."""
    if is_gguf(path):
        return open_gguf(path, pre, allow_requantize, mtp)
    if path.is_dir() and not (path / "config.json").exists():
        _refuse_folder_of_ggufs(path)
    return open_folder(path, pre, mtp)


def _refuse_folder_of_ggufs(folder: Path) -> None:
    """Raise ``ModelError`` naming the file to pass when a folder holds GGUFs."""
    files = sorted(folder.glob("*.gguf"), key=lambda file: (file.name.startswith("mmproj"), file.name))
    if files:
        others = f" (or another of its {len(files)} GGUF files)" if len(files) > 1 else ""
        raise ModelError(f"{folder}: holds GGUF files and no config.json; pass the file: {files[0]}{others}")
