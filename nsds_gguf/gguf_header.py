"""The header of a GGUF file, read back: its keys and its tensor table.

gguf's own reader makes numpy views of every string, which for a vocabulary of 150 000 tokens and its merges takes half
a GiB and many seconds; this one takes what the strings take. Nothing is allocated on the word of a file that has not
been checked against its size.

Layout (GGUF v3, ggml docs/gguf.md), little-endian:

=========  ============================================================================================
magic      4 bytes ``GGUF``
version    u32
counts     u64 tensors, u64 keys
keys       each: string name, u32 value type, value
tensors    each: string name, u32 n_dims, u64 per dimension (fastest first), u32 type, u64 offset in the data
padding    to the alignment
data       each tensor padded to the alignment
=========  ============================================================================================

A string is a u64 length and UTF-8 bytes; an array a u32 item type, a u64 length and the items.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.gguf_writer import GGUFValue

from .errors import ModelError
from .records import ALIGNMENT_BYTES, kv

MAX_DIMS = 4  # GGML_MAX_DIMS
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # of one layout; 1 had 32-bit lengths
_START = struct.Struct("<4sIQQ")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

_SCALARS: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True)
class TensorEntry:
    """One line of the tensor table: ``shape`` in numpy order, ``offset`` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Keys and tensors of a file, in its order; ``n_bytes`` is where the data begins."""

    metadata: Mapping[str, GGUFValue]
    tensors: tuple[TensorEntry, ...]
    n_bytes: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Read everything before the tensor data; scalars and strings come as Python values, arrays as lists.

    Raises ``ModelError`` when the file is no GGUF, is truncated or contradicts itself.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(_Cursor(data))
    except (OSError, ValueError) as error:  # mmap refuses an empty file with ValueError, _Cursor what is damaged
        raise ModelError(f"{path}: not a readable GGUF file: {error}") from error


class _Cursor:
    """A place in the file that moves on as values are taken; raises ``ValueError`` at whatever cannot be."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > len(self.data) - self.at:
            raise ValueError(f"truncated or damaged: {n_bytes} bytes wanted at byte {self.at} of {len(self.data)}")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self.take(layout.size))

    def u32(self) -> int:
        return int(self.unpack(_U32)[0])

    def u64(self) -> int:
        return int(self.unpack(_U64)[0])

    def string(self) -> str:
        return self.take(self.u64()).decode()

    def numbers(self, kind: GGUFValueType, n: int) -> list[Any]:
        dtype = _SCALARS[kind]
        values: list[Any] = np.frombuffer(self.take(n * dtype.itemsize), dtype).tolist()
        return values

    def value(self) -> GGUFValue:
        kind = GGUFValueType(self.u32())
        if kind == GGUFValueType.STRING:
            return kv(self.string(), kind)
        if kind != GGUFValueType.ARRAY:
            return kv(self.numbers(kind, 1)[0], kind)
        item, n = GGUFValueType(self.u32()), self.u64()
        if item == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays, which llama.cpp does not read either")
        if item != GGUFValueType.STRING:
            return kv(self.numbers(item, n), kind, item)
        return kv([self.string() for _ in range(n)], kind, item)


def _header(cursor: _Cursor) -> GgufHeader:
    magic, version, n_tensors, n_keys = cursor.unpack(_START)
    if magic != _MAGIC or version not in _VERSIONS:
        raise ValueError(f"wanted {_MAGIC!r} and version 2 or 3, got {magic!r} and {version}")
    metadata: dict[str, GGUFValue] = {}
    for _ in range(n_keys):
        name = cursor.string()
        if name in metadata:
            raise ValueError(f"key {name} is there twice")
        metadata[name] = cursor.value()
    entries = [_entry(cursor) for _ in range(n_tensors)]
    alignment = metadata["general.alignment"].value if "general.alignment" in metadata else ALIGNMENT_BYTES
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors = tuple(_placed(entry, start, alignment, len(cursor.data)) for entry in entries)
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("a tensor is there twice")
    return GgufHeader(metadata, tensors, start)


def _entry(cursor: _Cursor) -> TensorEntry:
    """Return one line of the table, its offset still relative to the data."""
    name, n_dims = cursor.string(), cursor.u32()
    if not 0 < n_dims <= MAX_DIMS:
        raise ValueError(f"tensor {name}: {n_dims} dimensions")
    dims = [cursor.u64() for _ in range(n_dims)]
    kind = GGMLQuantizationType(cursor.u32())
    block_weights, block_bytes = GGML_QUANT_SIZES[kind]
    if dims[0] % block_weights:
        raise ValueError(f"tensor {name}: rows of {dims[0]} weights cannot be {kind.name}")
    n_bytes = math.prod(dims) // block_weights * block_bytes
    return TensorEntry(name, tuple(reversed(dims)), kind.name, n_bytes, cursor.u64())


def _placed(entry: TensorEntry, start: int, alignment: int, n_file: int) -> TensorEntry:
    """Return the line with its offset from the start of the file, after checking that the data is inside."""
    if entry.offset % alignment:
        raise ValueError(f"tensor {entry.name}: offset {entry.offset} is no multiple of {alignment}")
    offset = start + entry.offset
    if offset + entry.n_bytes > n_file:
        raise ValueError(f"tensor {entry.name}: ends at byte {offset + entry.n_bytes}, the file has {n_file}")
    return replace(entry, offset=offset)
