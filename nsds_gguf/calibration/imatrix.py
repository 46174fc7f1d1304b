"""Importance matrices of llama.cpp: mean squared inputs of every column, collected by evaluating a text.

Reads both formats of ``llama-imatrix``, and writes the first (tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp).

GGUF: per tensor ``NAME.in_sum2`` ``(n_matrices, n_cols)``, the sums of squares, and ``NAME.counts``
``(n_matrices, 1)``, their numbers of tokens; leading dimensions of 1 are not in the file. The older binary format,
little-endian: i32 entries; each: i32 length, name, i32 calls, i32 values, float32 sums; at the end i32 chunks and the
name of the text. ``n_matrices`` is above 1 for stacked experts; the older format does not store it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from ..compute.input_moments import Moments
from ..errors import ModelError, RecordError
from ..llamacpp.gguf_header import is_gguf, read_gguf_header
from ..records import Float32, Model

IMATRIX = "imatrix:"  # precedes the digest in the name of a calibration from a file

_SUMS, _COUNTS = ".in_sum2", ".counts"
_FLOOR = 1e-4  # of a tensor's mean: ggml would divide by zero in a block of columns without input
_I32 = struct.Struct("<i")


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix: by tensor name the mean squared input of each column, ``(n_matrices, n_cols)`` float32."""

    path: Path
    sha256: str
    columns: Mapping[str, Float32]

    @property
    def name(self) -> str:
        """Its name in records: the first digits of its SHA-256."""
        return IMATRIX + self.sha256[:12]

    def weights(self, model: Model) -> dict[str, Float32]:
        """Return the column weights of the model's tensors: ``(n_cols,)``, or ``(n_experts, n_cols)`` for a stack.

        Raises ``RecordError`` when it has no tensor of the model, or a tensor of another shape.
        """
        matrices = {tensor.name: tensor for tensor in model.tensors if tensor.is_matrix}
        found = {}
        for name, columns in self.columns.items():
            if name not in matrices:
                continue
            shape = matrices[name].shape
            n_matrices = shape[0] if len(shape) == 3 else 1
            if columns.shape == (1, n_matrices * shape[-1]):  # the older format, of a stack
                columns = columns.reshape(n_matrices, -1)
            if columns.shape not in ((1, shape[-1]), (n_matrices, shape[-1])):
                raise RecordError(
                    f"{self.path}: {name}: wanted {n_matrices} x {shape[-1]} columns, got {columns.shape[0]} x "
                    f"{columns.shape[1]}; the importance matrix belongs to another model"
                )
            found[name] = columns if len(columns) > 1 else columns[0]
        if not found:
            raise RecordError(f"{self.path}: has no tensor of {model.name}; it belongs to another model")
        return found

    def note(self, model: Model) -> str:
        """Return the note on the source of column weights, with the tensors that have no entry."""
        matrices = [tensor.name for tensor in model.tensors if tensor.is_matrix]
        missing = [name for name in matrices if name not in self.columns]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        named = f"{', '.join(missing[:3])}{more}"
        rest = f" It has no entry for {named}: their weights come from random tokens." if missing else ""
        return f"Column weights come from {self.path.name} (SHA-256 {self.sha256[:12]}…).{rest}"


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix in either format; raise ``RecordError`` for any other or a damaged file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}; wanted an importance matrix") from error
    try:
        entries = dict(_of_gguf(path) if is_gguf(path) else _of_legacy(data))
    except (ValueError, ModelError) as error:
        raise RecordError(f"{path}: not a readable importance matrix: {error}") from error
    for name, columns in entries.items():
        if not columns.size or not np.isfinite(columns).all() or (columns < 0).any():
            raise RecordError(f"{path}: {name}: wanted finite mean squares from 0 up; create the file again")
    return Imatrix(path, hashlib.sha256(data).hexdigest(), {name: _floored(value) for name, value in entries.items()})


def write_imatrix(path: Path, moments: Mapping[str, Moments], *, source: str, n_chunks: int, n_ctx: int) -> None:
    """Write mean squares in the GGUF format of llama-imatrix.

    Args:
        path: file to write; an existing one is replaced.
        moments: by tensor name.
        source: origin of the tokens, stored in the file.
        n_chunks: number of sequences.
        n_ctx: tokens per sequence.

    """
    writer = GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [source])
    writer.add_uint32("imatrix.chunk_count", n_chunks)
    writer.add_uint32("imatrix.chunk_size", n_ctx)
    for name in sorted(moments):
        counts = moments[name].counts.astype(np.float32)[:, np.newaxis]
        sums = moments[name].mean_squares.reshape(len(counts), -1) * counts
        writer.add_tensor(name + _SUMS, sums.astype(np.float32))
        writer.add_tensor(name + _COUNTS, counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _of_gguf(path: Path) -> Iterator[tuple[str, Float32]]:
    header = read_gguf_header(path)
    kind = header.metadata.get("general.type")
    if kind is None or kind.value != "imatrix":
        raise ValueError(f"general.type is {kind and kind.value!r}, wanted 'imatrix'")
    tensors = {tensor.name: tensor for tensor in header.tensors}
    for name, entry in tensors.items():
        if not name.endswith(_SUMS):
            continue
        counts = tensors.get(name.removesuffix(_SUMS) + _COUNTS)
        n_matrices = math.prod(entry.shape[:-1])
        if counts is None or {entry.type, counts.type} != {"F32"} or math.prod(counts.shape) != n_matrices:
            raise ValueError(f"{name} has no matching {_COUNTS}")
        sums, n_tokens = (
            np.fromfile(path, np.float32, tensor.n_bytes // 4, offset=tensor.offset).reshape(n_matrices, -1)
            for tensor in (entry, counts)
        )
        with np.errstate(all="ignore"):  # the caller refuses values that are not finite
            means = np.where(n_tokens > 0, sums / np.maximum(n_tokens, 1), np.float32(1)).astype(np.float32)
        yield name.removesuffix(_SUMS), means


def _of_legacy(data: bytes) -> Iterator[tuple[str, Float32]]:
    at = 0

    def take(n_bytes: int) -> bytes:
        nonlocal at
        if not 0 <= n_bytes <= len(data) - at:
            raise ValueError(f"{n_bytes} bytes wanted at byte {at} of {len(data)}")
        at += n_bytes
        return data[at - n_bytes : at]

    def integer() -> int:
        return int(_I32.unpack(take(_I32.size))[0])

    n_entries = integer()
    if not 0 < n_entries < 1 << 20:
        raise ValueError(f"{n_entries} entries")
    for _ in range(n_entries):
        name = take(integer()).decode()
        n_calls, n_values = integer(), integer()
        values = np.frombuffer(take(4 * n_values), "<f4").astype(np.float32)
        with np.errstate(all="ignore"):
            means = values / np.float32(max(n_calls, 1))
        yield name, means[np.newaxis]


def _floored(columns: Float32) -> Float32:
    """Return the means, at least ``_FLOOR`` of the mean of their matrix; ones for a matrix without input."""
    means = columns.mean(axis=1, keepdims=True)
    floored: Float32 = np.where(means > 0, np.maximum(columns, means * np.float32(_FLOOR)), np.float32(1))
    return floored.astype(np.float32)
