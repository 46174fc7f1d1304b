"""Look into any GGUF file: what it is, its bits per weight three ways, and which type holds what."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, ReaderField

from .errors import ModelError
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
    """A GGUF file: metadata as text and its tensors."""

    path: str
    file_bytes: int
    metadata: dict[str, str]
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
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelError(f"{path}: not a readable GGUF file: {error}") from error
    tensors = []
    for tensor in reader.tensors:
        match = _LAYER.fullmatch(tensor.name)
        role = (match[2] if match else tensor.name).removesuffix(".weight")
        shape = tuple(int(n) for n in reversed(tensor.shape))
        layer = int(match[1]) if match else None
        n_weights, n_bytes = int(tensor.n_elements), int(tensor.n_bytes)
        tensors.append(FoundTensor(tensor.name, role, layer, shape, tensor.tensor_type.name, n_weights, n_bytes))
    metadata = {key: _shown(field) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return Inspection(str(path), path.stat().st_size, metadata, tuple(tensors))


def _shown(field: ReaderField) -> str:
    if field.types and field.types[0] == GGUFValueType.ARRAY:
        head = [str(field.contents(i)) for i in range(min(_SHOWN_ITEMS, len(field.data)))]
        more = f", … {len(field.data)} in all" if len(field.data) > _SHOWN_ITEMS else ""
        return f"[{', '.join(head)}{more}]"
    return str(field.contents())


def _bpw(n_bytes: int, n_weights: int) -> float:
    return n_bytes * 8 / n_weights if n_weights else 0.0
