"""Inspect any GGUF file: its metadata, its bits per weight in three ways, and its tensors by type, role and layer."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf.gguf_writer import GGUFValue

from ..errors import ModelError
from ..llamacpp.gguf_header import (
    SPLIT_NO,
    GgufHeader,
    GgufPart,
    TensorEntry,
    part_paths,
    read_gguf_header,
    split_number,
)
from ..records import UNQUANTIZED

OURS = "nsds_gguf."  # prefix of the keys that say how nsds-gguf made a file
VECTORS = "vectors"  # role that counts norms, biases and the like

# Layers of a decoder, or of one of several stacks: ``blk.3.attn_q``, ``enc.blk.3.attn_q``, ``v.blk.3.attn_q``.
_LAYER = re.compile(r"(?:(?P<stack>\w+)\.)?blk\.(?P<layer>\d+)\.(?P<rest>.+)")
_SHOWN_ITEMS = 4  # of an array
_SHOWN_LETTERS = 500  # of a text


@dataclass(frozen=True)
class FoundTensor:
    """One tensor of a file.

    ``stack`` is empty for decoder layers and outside layers; ``shape`` is in numpy order, ``n_bytes`` without padding.
    """

    name: str
    role: str
    stack: str
    layer: int | None
    shape: tuple[int, ...]
    type: str
    n_weights: int
    n_bytes: int


@dataclass(frozen=True)
class Sums:
    """Totals of tensors; ``types`` counts them by type, most first."""

    n_tensors: int
    n_weights: int
    n_bytes: int
    types: Mapping[str, int]

    @classmethod
    def of(cls, tensors: Iterable[FoundTensor]) -> Sums:
        """Add up tensors."""
        found = list(tensors)
        types = dict(Counter(t.type for t in found).most_common())
        return cls(len(found), sum(t.n_weights for t in found), sum(t.n_bytes for t in found), types)

    @property
    def bpw(self) -> float:
        """Bits over weights; 0 without weights."""
        return _bpw(self.n_bytes, self.n_weights)


@dataclass(frozen=True)
class Inspection:
    """A GGUF, with all parts of a split model.

    Attributes:
        path: the file that the user named.
        files: the files that were read, in order.
        missing: missing parts; sums leave them out.
        file_bytes: bytes of all files that were read.
        metadata: keys of the first file, with long arrays and texts shortened.
        tensors: in the order of the files.
    """

    path: str
    files: tuple[str, ...]
    missing: tuple[str, ...]
    file_bytes: int
    metadata: dict[str, Any]
    tensors: tuple[FoundTensor, ...]

    @property
    def architecture(self) -> str:
        """``general.architecture``, or else ``general.type``."""
        return str(self.metadata.get("general.architecture") or self.metadata.get("general.type") or "unknown")

    @property
    def name(self) -> str:
        """``general.name``; empty when there is none."""
        return str(self.metadata.get("general.name", ""))

    @property
    def made_by_us(self) -> dict[str, str]:
        """How nsds-gguf made it: version, recipe and digests; empty for other files."""
        return {key.removeprefix(OURS): str(value) for key, value in self.metadata.items() if key.startswith(OURS)}

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(tensor.n_weights for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits over the weights of all tensors, as in llama.cpp; 0 in a file without tensors."""
        return Sums.of(self.tensors).bpw

    @property
    def quantized_bpw(self) -> float:
        """Bits over the weights of quantized tensors alone; 0 without any."""
        return Sums.of(tensor for tensor in self.tensors if tensor.type not in UNQUANTIZED).bpw

    @property
    def file_bpw(self) -> float:
        """Bits of all files over the weights of all tensors."""
        return _bpw(self.file_bytes, self.n_weights)

    @cached_property
    def roles(self) -> dict[str, Sums]:
        """Sums of matrices by role, in the order of the file, then of all vectors."""
        groups: dict[str, list[FoundTensor]] = {}
        for tensor in self.tensors:
            role = tensor.role if len(tensor.shape) > 1 else VECTORS
            groups.setdefault(role, []).append(tensor)
        vectors = groups.pop(VECTORS, None)
        return {role: Sums.of(group) for role, group in {**groups, **({VECTORS: vectors} if vectors else {})}.items()}

    @cached_property
    def layers(self) -> dict[str, dict[int, Sums]]:
        """Sums by stack and layer number; the decoder's stack is ``""``."""
        groups: dict[str, dict[int, list[FoundTensor]]] = {}
        for tensor in self.tensors:
            if tensor.layer is not None:
                groups.setdefault(tensor.stack, {}).setdefault(tensor.layer, []).append(tensor)
        return {stack: {layer: Sums.of(layers[layer]) for layer in sorted(layers)} for stack, layers in groups.items()}

    def bytes_by_type(self) -> dict[str, int]:
        """Bytes per type, most first."""
        counter: Counter[str] = Counter()
        for tensor in self.tensors:
            counter[tensor.type] += tensor.n_bytes
        return dict(counter.most_common())

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        sums = {
            "architecture": self.architecture,
            "name": self.name,
            "made_by_us": self.made_by_us,
            "n_weights": self.n_weights,
            "bpw": self.bpw,
            "quantized_bpw": self.quantized_bpw,
            "file_bpw": self.file_bpw,
            "bytes_by_type": self.bytes_by_type(),
            "roles": {role: {**asdict(found), "bpw": found.bpw} for role, found in self.roles.items()},
            "layers": {
                stack: [{"layer": layer, **asdict(found), "bpw": found.bpw} for layer, found in layers.items()]
                for stack, layers in self.layers.items()
            },
        }
        return {**asdict(self), **sums}


def inspect_gguf(path: Path) -> Inspection:
    """Read the metadata and tensor table of a GGUF, and of the parts of a split model that are present.

    Raises ``ModelError`` when it is not a GGUF.
    """
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; wanted a GGUF file")
    if not path.is_file():
        raise ModelError(f"{path}: no such file; wanted a GGUF file")
    parts, missing = _present_parts(path, read_gguf_header(path))
    return Inspection(
        path=str(path),
        files=tuple(str(part.path) for part in parts),
        missing=tuple(map(str, missing)),
        file_bytes=sum(part.path.stat().st_size for part in parts),
        metadata={key: _shown(value) for key, value in parts[0].header.metadata.items()},
        tensors=tuple(_found(entry) for part in parts for entry in part.header.tensors),
    )


def _present_parts(path: Path, header: GgufHeader) -> tuple[list[GgufPart], list[Path]]:
    """Return the present parts of a model, and the paths of the missing ones.

    A part with another name than a part's, or among files of another split, stands alone.
    """
    try:
        paths = part_paths(path, header)
    except ModelError:
        paths = (path,)
    parts = [GgufPart(p, header if p == path else read_gguf_header(p)) for p in paths if p.is_file()]
    if len(paths) > 1 and any(split_number(part.header, SPLIT_NO) != paths.index(part.path) for part in parts):
        return [GgufPart(path, header)], []
    return parts, [p for p in paths if not p.is_file()]


def _found(entry: TensorEntry) -> FoundTensor:
    match = _LAYER.fullmatch(entry.name)
    stack, layer = (match["stack"] or "", int(match["layer"])) if match else ("", None)
    role = (match["rest"] if match else entry.name).removesuffix(".weight")
    if stack:
        role = f"{stack}.{role}"
    n_weights = math.prod(entry.shape)
    return FoundTensor(entry.name, role, stack, layer, entry.shape, entry.type, n_weights, entry.n_bytes)


def _shown(entry: GGUFValue) -> Any:
    value = entry.value
    if isinstance(value, str) and len(value) > _SHOWN_LETTERS:
        return f"{value[:_SHOWN_LETTERS]}… {len(value)} characters in all"
    if not isinstance(value, list) or len(value) <= _SHOWN_ITEMS:
        return value
    return f"[{', '.join(map(str, value[:_SHOWN_ITEMS]))}, … {len(value)} in all]"


def _bpw(n_bytes: int, n_weights: int) -> float:
    return n_bytes * 8 / n_weights if n_weights else 0.0
