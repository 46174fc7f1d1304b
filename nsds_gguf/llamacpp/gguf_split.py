"""Split a GGUF into parts, as llama-gguf-split does: all keys in the first part, whole tensors in each.

Parts are called ``NAME-00001-of-00003.gguf`` and so on (``llama_split_path``). The keys ``split.no`` (counted from 0),
``split.count`` and ``split.tensors.count`` join the others, whose bytes are copied as they are.
Source: llama.cpp tools/gguf-split/gguf-split.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from gguf import GGUFValueType

from ..records import ALIGNMENT_BYTES, Progress, no_progress
from . import ggml
from .gguf_header import MAGIC, SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, GgufHeader, TensorEntry, read_gguf_header

_VERSION = 3
_START = struct.Struct("<4sIQQ")
_COPIED_BYTES = 1 << 22  # at once


def part_names(path: Path, n_parts: int) -> list[str]:
    """Return the names of the parts of a file."""
    stem = path.name.removesuffix(".gguf")
    return [f"{stem}-{i + 1:05d}-of-{n_parts:05d}.gguf" for i in range(n_parts)]


def split_tensors(header: GgufHeader, max_bytes: int) -> list[list[TensorEntry]]:
    """Return the tensors of each part, in order: as many as fit ``max_bytes``, the header of the file included.

    A tensor that is larger has a part of its own.
    """
    alignment = _alignment(header)
    parts: list[list[TensorEntry]] = [[]]
    n_bytes = header.n_bytes  # more than the header of any part but the first
    for tensor in header.tensors:
        padded = -(-tensor.n_bytes // alignment) * alignment
        if parts[-1] and n_bytes + padded > max_bytes:
            parts.append([])
            n_bytes = header.n_bytes
        parts[-1].append(tensor)
        n_bytes += padded
    return parts


def write_parts(path: Path, folder: Path, max_bytes: int, progress: Progress = no_progress) -> list[Path]:
    """Write the parts of a GGUF into a folder and return their paths; raises ``OSError`` where that fails."""
    header = read_gguf_header(path)
    parts = split_tensors(header, max_bytes)
    targets = [folder / name for name in part_names(path, len(parts))]
    total, done = sum(tensor.n_bytes for tensor in header.tensors), 0
    with path.open("rb") as source:
        for number, (tensors, target) in enumerate(zip(parts, targets, strict=True)):
            with target.open("wb") as stream:
                stream.write(_part_header(source, header, tensors, (number, len(parts))))
                for tensor in tensors:
                    _copy(source, stream, tensor, _alignment(header))
                    done += tensor.n_bytes
                    progress(done, total)
    return targets


def _alignment(header: GgufHeader) -> int:
    entry = header.metadata.get("general.alignment")
    return ALIGNMENT_BYTES if entry is None else int(entry.value)


def _part_header(
    source: IO[bytes], header: GgufHeader, tensors: Sequence[TensorEntry], number_and_count: tuple[int, int]
) -> bytes:
    """Return everything before the data of a part, padded."""
    number, count = number_and_count
    keys, n_keys = b"", 0
    if number == 0:
        source.seek(_START.size)
        keys, n_keys = source.read(header.keys_end - _START.size), len(header.metadata)
    keys += _key(SPLIT_NO, GGUFValueType.UINT16, struct.pack("<H", number))
    keys += _key(SPLIT_COUNT, GGUFValueType.UINT16, struct.pack("<H", count))
    keys += _key(SPLIT_TENSORS, GGUFValueType.INT32, struct.pack("<i", len(header.tensors)))
    alignment, table, offset = _alignment(header), b"", 0
    for tensor in tensors:
        dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        table += _string(tensor.name) + dims + struct.pack("<IQ", ggml.TYPE_NUMBERS[tensor.type], offset)
        offset += -(-tensor.n_bytes // alignment) * alignment
    found = _START.pack(MAGIC, _VERSION, len(tensors), n_keys + 3) + keys + table
    return found + b"\0" * (-len(found) % alignment)


def _key(name: str, kind: GGUFValueType, value: bytes) -> bytes:
    return _string(name) + struct.pack("<I", kind) + value


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _copy(source: IO[bytes], target: IO[bytes], tensor: TensorEntry, alignment: int) -> None:
    """Copy the data of a tensor, padded."""
    source.seek(tensor.offset)
    left = tensor.n_bytes
    while left:
        data = source.read(min(left, _COPIED_BYTES))
        if not data:
            raise OSError(f"{tensor.name}: the file ends before its data")
        target.write(data)
        left -= len(data)
    target.write(b"\0" * (-tensor.n_bytes % alignment))
