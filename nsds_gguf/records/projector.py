"""The vision part of a multimodal model: encoder and projector, which llama.cpp loads from a separate file (mmproj)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf.gguf_writer import GGUFValue

from ..system.filestate import FileState
from .tensor import Tensor


@dataclass(frozen=True)
class Projector:
    """An opened vision part: its tensors, their types, and GGUF keys.

    Attributes:
        path: the model folder.
        source_class: class that the checkpoint names, such as ``Gemma3ForConditionalGeneration``.
        kind: llama.cpp's name of the projector, ``clip.projector_type``.
        type: the type that was asked for, ``F16`` for example; some tensors have another.
        tensors: in the order of the file.
        types: type of every tensor by name.
        metadata: every key of the file.
        inputs: state of all weight files when they were opened.
    """

    path: Path
    source_class: str
    kind: str
    type: str
    tensors: tuple[Tensor, ...]
    types: Mapping[str, str]
    metadata: Mapping[str, GGUFValue]
    inputs: tuple[FileState, ...] = ()

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(tensor.n_weights for tensor in self.tensors)
