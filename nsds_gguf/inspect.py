"""Look into any GGUF file: what it is, its bits per weight three ways, and which type holds what."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguf.gguf_writer import GGUFValue

from .errors import ModelError
from .gguf_header import TensorEntry, read_gguf_header
from .records import UNQUANTIZED

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_SHOWN_ITEMS = 4  # of an array


@dataclass(frozen=True)
class FoundTensor:
    """One tensor of a file; ``shape`` in numpy order, ``n_bytes`` without padding."""

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    type: str
    n_weights: int
    n_bytes: int


@dataclass(frozen=True)
class Inspection:
    """A GGUF file: its metadata, long arrays as a shortened text, and its tensors."""

    path: str
    file_bytes: int
    metadata: dict[str, Any]
    tensors: tuple[FoundTensor, ...]

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(tensor.n_weights for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits over weights of all tensors (llama.cpp's definition); 0 in a file without tensors."""
        return _bpw(sum(tensor.n_bytes for tensor in self.tensors), self.n_weights)

    @property
    def quantized_bpw(self) -> float:
        """Bits over weights of the quantized tensors alone."""
        quantized = [tensor for tensor in self.tensors if tensor.type not in UNQUANTIZED]
        return _bpw(sum(t.n_bytes for t in quantized), sum(t.n_weights for t in quantized))

    @property
    def file_bpw(self) -> float:
        """Bits of the whole file over weights of all tensors."""
        return _bpw(self.file_bytes, self.n_weights)

    def bytes_by_type(self) -> dict[str, int]:
        """Bytes per type, most first."""
        counter: Counter[str] = Counter()
        for tensor in self.tensors:
            counter[tensor.type] += tensor.n_bytes
        return dict(counter.most_common())

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        sums = {"bpw": self.bpw, "quantized_bpw": self.quantized_bpw, "file_bpw": self.file_bpw}
        return {**asdict(self), **sums, "bytes_by_type": self.bytes_by_type()}


def inspect_gguf(path: Path) -> Inspection:
    """Read the metadata and tensor table of a GGUF; raises ``ModelError`` when it is none."""
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; wanted a GGUF file")
    if not path.is_file():
        raise ModelError(f"{path}: no such file; wanted a GGUF file")
    header = read_gguf_header(path)
    metadata = {key: _shown(value) for key, value in header.metadata.items()}
    return Inspection(str(path), path.stat().st_size, metadata, tuple(_found(entry) for entry in header.tensors))


def _found(entry: TensorEntry) -> FoundTensor:
    match = _LAYER.fullmatch(entry.name)
    role = (match[2] if match else entry.name).removesuffix(".weight")
    layer = int(match[1]) if match else None
    return FoundTensor(entry.name, role, layer, entry.shape, entry.type, math.prod(entry.shape), entry.n_bytes)


def _shown(entry: GGUFValue) -> Any:
    value = entry.value
    if not isinstance(value, list) or len(value) <= _SHOWN_ITEMS:
        return value
    return f"[{', '.join(map(str, value[:_SHOWN_ITEMS]))}, … {len(value)} in all]"


def _bpw(n_bytes: int, n_weights: int) -> float:
    return n_bytes * 8 / n_weights if n_weights else 0.0
