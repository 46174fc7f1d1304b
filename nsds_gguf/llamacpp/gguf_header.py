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

A model may be split over several files, ``NAME-00001-of-00003.gguf`` and so on. Each part has the keys ``split.no``
(counted from 0) and ``split.count``; the other keys are those of the first part (llama.cpp, llama-model-loader.cpp).
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ..errors import ModelError
from ..records import ALIGNMENT_BYTES, kv
from . import ggml

MAX_DIMS = 4  # GGML_MAX_DIMS
_BUFFER_BYTES = 1 << 20  # keys and names are short and many
MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # of one layout; 1 had 32-bit lengths
_START = struct.Struct("<4sIQQ")

SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
_SPLIT_NAME = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

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
    """Keys and tensors of a file, in its order; ``n_bytes`` is where the data begins, ``keys_end`` where keys end."""

    metadata: Mapping[str, GGUFValue]
    tensors: tuple[TensorEntry, ...]
    n_bytes: int
    keys_end: int = 0


def is_gguf(path: Path) -> bool:
    """Return whether a path is a file that is a GGUF or is called one."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return path.suffix.lower() == ".gguf" or stream.read(len(MAGIC)) == MAGIC


@dataclass(frozen=True)
class GgufPart:
    """One file of a GGUF: where it lies and what it begins with."""

    path: Path
    header: GgufHeader


def read_gguf_parts(path: Path) -> tuple[GgufPart, ...]:
    """Read the header of a GGUF and, where it is one part of a split model, those of all parts, in order.

    Raises ``ModelError`` when a file is missing, no GGUF or damaged, or the parts contradict one another.
    """
    header = read_gguf_header(path)
    paths = part_paths(path, header)
    if paths == (path,):
        return (GgufPart(path, header),)
    missing = next((part for part in paths if not part.is_file()), None)
    if missing:
        raise ModelError(f"{missing}: missing part; the model is split into {len(paths)} files: put them together")
    parts = tuple(GgufPart(part, read_gguf_header(part)) for part in paths)
    for number, part in enumerate(parts):
        found = split_number(part.header, SPLIT_NO), split_number(part.header, SPLIT_COUNT)
        if found != (number, len(parts)):
            raise ModelError(f"{part.path}: its keys say part {found[0]} of {found[1]} (counted from 0), "
                             f"its name says {number} of {len(parts)}; download it again")  # fmt: skip
    names = [tensor.name for part in parts for tensor in part.header.tensors]
    if len(set(names)) < len(names):
        raise ModelError(f"{path}: a tensor is in two parts of the split model; download it again")
    wanted = split_number(header, SPLIT_TENSORS)
    if wanted not in (None, len(names)):
        raise ModelError(f"{path}: the split model has {len(names)} tensors, wanted {wanted}; download it again")
    return parts


def part_paths(path: Path, header: GgufHeader) -> tuple[Path, ...]:
    """Return the paths of all parts of the model that a file belongs to, whether they exist or not.

    Raises ``ModelError`` when the file is a part but is not called so.
    """
    n_parts = split_number(header, SPLIT_COUNT) or 1
    if n_parts == 1:
        return (path,)
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != n_parts or int(match["number"]) > n_parts:
        raise ModelError(
            f"{path}: is a part of a model split into {n_parts} files; wanted a name such as "
            f"NAME-00001-of-{n_parts:05d}.gguf: rename the parts as they were"
        )
    return tuple(path.with_name(f"{match['name']}-{i + 1:05d}-of-{n_parts:05d}.gguf") for i in range(n_parts))


def split_number(header: GgufHeader, key: str) -> int | None:
    """Return the value of a ``split.*`` key, ``None`` where there is none or no number from 0 up."""
    entry = header.metadata.get(key)
    if entry is None or type(entry.value) is not int or entry.value < 0:
        return None
    return int(entry.value)


def read_gguf_header(path: Path) -> GgufHeader:
    """Read everything before the tensor data; scalars and strings come as Python values, arrays as lists.

    Raises ``ModelError`` when the file is no GGUF, is truncated or contradicts itself.
    """
    try:
        with path.open("rb", _BUFFER_BYTES) as stream:
            return _header(_Cursor(stream))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not a readable GGUF file: {error}") from error


class _Cursor:
    """A place in the file that moves on as values are taken; raises ``ValueError`` at whatever cannot be."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.n_file, self.at = stream, os.fstat(stream.fileno()).st_size, 0

    def take(self, n_bytes: int) -> bytes:
        data = self._stream.read(n_bytes) if n_bytes <= self.n_file - self.at else b""
        if len(data) < n_bytes:
            raise ValueError(f"truncated or damaged: {n_bytes} bytes wanted at byte {self.at} of {self.n_file}")
        self.at += n_bytes
        return data

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self.take(layout.size))

    def u32(self) -> int:
        return int(self.unpack(_U32)[0])

    def u64(self) -> int:
        return int(self.unpack(_U64)[0])

    def string(self) -> str:
        return self.take(self.u64()).decode()

    def text(self) -> str:
        """Take a string that may hold bytes which are not UTF-8, as tokens do; they become lone surrogates."""
        return self.take(self.u64()).decode(errors="surrogateescape")

    def numbers(self, kind: GGUFValueType, n: int) -> list[Any]:
        dtype = _SCALARS[kind]
        values: list[Any] = np.frombuffer(self.take(n * dtype.itemsize), dtype).tolist()
        return values

    def value(self) -> GGUFValue:
        kind = GGUFValueType(self.u32())
        if kind == GGUFValueType.STRING:
            return kv(self.text(), kind)
        if kind != GGUFValueType.ARRAY:
            return kv(self.numbers(kind, 1)[0], kind)
        item, n = GGUFValueType(self.u32()), self.u64()
        if item == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays, which llama.cpp does not read either")
        if item != GGUFValueType.STRING:
            return kv(self.numbers(item, n), kind, item)
        return kv([self.text() for _ in range(n)], kind, item)


def _header(cursor: _Cursor) -> GgufHeader:
    magic, version, n_tensors, n_keys = cursor.unpack(_START)
    if magic == MAGIC and version & 0xFFFF == 0:
        raise ValueError("it is big-endian; wanted a little-endian file: convert it with gguf-convert-endian")
    if magic != MAGIC or version not in _VERSIONS:
        raise ValueError(f"wanted {MAGIC!r} and version 2 or 3, got {magic!r} and {version}")
    metadata: dict[str, GGUFValue] = {}
    for _ in range(n_keys):
        name = cursor.string()
        if name in metadata:
            raise ValueError(f"key {name} is there twice")
        metadata[name] = cursor.value()
    keys_end = cursor.at
    entries = [_entry(cursor) for _ in range(n_tensors)]
    alignment = metadata["general.alignment"].value if "general.alignment" in metadata else ALIGNMENT_BYTES
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors = tuple(_placed(entry, start, alignment, cursor.n_file) for entry in entries)
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("a tensor is there twice")
    return GgufHeader(metadata, tensors, start, keys_end)


def _entry(cursor: _Cursor) -> TensorEntry:
    """Return one line of the table, its offset still relative to the data."""
    name, n_dims = cursor.string(), cursor.u32()
    if not 0 < n_dims <= MAX_DIMS:
        raise ValueError(f"tensor {name}: {n_dims} dimensions")
    dims = [cursor.u64() for _ in range(n_dims)]
    number = cursor.u32()
    kind = ggml.type_named(number)
    if kind is None:
        raise ValueError(f"tensor {name}: type {number} is not known; upgrade the package gguf if the file is newer")
    block_weights, block_bytes = ggml.block(kind)
    if dims[0] % block_weights:
        raise ValueError(f"tensor {name}: rows of {dims[0]} weights cannot be {kind}")
    n_bytes = math.prod(dims) // block_weights * block_bytes
    return TensorEntry(name, tuple(reversed(dims)), kind, n_bytes, cursor.u64())


def _placed(entry: TensorEntry, start: int, alignment: int, n_file: int) -> TensorEntry:
    """Return the line with its offset from the start of the file, after checking that the data is inside."""
    if entry.offset % alignment:
        raise ValueError(f"tensor {entry.name}: offset {entry.offset} is no multiple of {alignment}")
    offset = start + entry.offset
    if offset + entry.n_bytes > n_file:
        raise ValueError(f"tensor {entry.name}: ends at byte {offset + entry.n_bytes}, the file has {n_file}")
    return replace(entry, offset=offset)
