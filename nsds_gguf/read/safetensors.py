"""safetensors files: checks headers before use, converts rows to float32 on reading.

Layout of a file (safetensors, README "Format"): 8 bytes little-endian length N of the header; N bytes of JSON
``{"name": {"dtype", "shape", "data_offsets": [begin, end]}, ..., "__metadata__": {...}}``; then the data, to which the
offsets are relative. The tensors fill the data without gaps, and names are unique (as the reference implementation
demands). Nothing is allocated before the header is checked.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError, UnsupportedError
from ..records import Float32, Rows
from .small_dtypes import to_float32
from .spans import read_spans, row_runs
from .stored import StoredTensor

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_DIMENSIONS = 8  # twice ggml's limit; bounds the product of a shape

# Bits per value of every dtype of the format (safetensors, tensor.rs); others are refused.
_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "F8_E4M3": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
}  # fmt: skip
LFS_MARK = b"version https://git-lfs"


@dataclass(frozen=True)
class SafetensorsTensor(StoredTensor):
    """A tensor in a safetensors file, at ``offset_bytes``."""

    offset_bytes: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the stored data; values of less than a byte are packed."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8

    def values(self, rows: Rows, columns: slice) -> Float32:
        """Return the weights of some rows and columns as a fresh float32 matrix, finite or not."""
        return to_float32(self.stored(rows, columns), self.dtype)

    def stored(self, rows: Rows, columns: slice) -> NDArray[Any]:
        """Return some rows and columns as a fresh matrix in the stored dtype (BF16 as uint16, FP8 as uint8).

        Slices have step 1. Raises ``UnsupportedError`` for a dtype that is not ``READABLE``.
        """
        self.require_readable()
        first, last, _ = columns.indices(self.n_cols)
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.n_rows)
            return self._read([(start, max(stop - start, 0))], first, last)
        distinct, at = np.unique(rows, return_inverse=True)
        return self._read(row_runs(distinct), first, last)[at]

    def _read(self, runs: list[tuple[int, int]], first: int, last: int) -> NDArray[Any]:
        """Read columns ``first`` to ``last`` of runs of rows: first row and number of rows each."""
        dtype = _NUMPY_DTYPES[self.dtype]
        if last - first < self.n_cols:
            runs = [(row, 1) for start, n in runs for row in range(start, start + n)]
        width, n_rows = max(last - first, 0), sum(n for _, n in runs)
        spans = [
            (self.offset_bytes + (row * self.n_cols + first) * dtype.itemsize, n * width * dtype.itemsize)
            for row, n in runs
        ]
        data = read_spans(self.file, self.name, spans, n_rows * width * dtype.itemsize)
        return data.view(dtype).reshape(n_rows, width)

    def first_bytes(self, n_bytes: int) -> bytes:
        """Return at most ``n_bytes`` bytes of the stored data, from its start; works for any dtype."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset_bytes)
            return stream.read(min(n_bytes, self.n_bytes))


def read_header(file: Path) -> dict[str, SafetensorsTensor]:
    """Read and check the header of one file.

    Raises:
        ModelError: a git-lfs pointer, or a header that is truncated or contradicts itself.
        UnsupportedError: a dtype that is not part of the format.
        OSError: the file cannot be read.

    """
    n_file = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(LFS_MARK))
        if start == LFS_MARK:
            raise ModelError(f"{file}: is a git-lfs pointer, not the weights: run `git lfs pull` in {file.parent}")
        if n_file < 8:
            raise ModelError(f"{file}: {n_file} bytes are not a safetensors file: download it again")
        n_header = int.from_bytes(start[:8], "little")
        if n_header > min(MAX_HEADER_BYTES, n_file - 8):
            raise ModelError(
                f"{file}: truncated or damaged: a header of {n_header} bytes in a file of {n_file}: download it again"
            )
        stream.seek(8)
        raw = stream.read(n_header)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: damaged header: {error}: download it again") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file}: damaged header: wanted an object, got {type(header).__name__}: download it again")
    header.pop("__metadata__", None)
    tensors = {name: _stored(file, name, entry, 8 + n_header, n_file) for name, entry in header.items()}
    _check_contiguous(file, list(tensors.values()), 8 + n_header, n_file)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raise ``ValueError`` for a duplicate key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{Counter(key for key, _ in pairs).most_common(1)[0][0]!r} occurs more than once")
    return found


def _stored(file: Path, name: str, entry: Any, data_start: int, n_file: int) -> SafetensorsTensor:
    where = f"{file}: tensor {name}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where}: damaged header: wanted dtype, shape and data_offsets") from error
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise UnsupportedError(
            f"{where}: stored as {reprlib.repr(dtype)}, which safetensors does not know: use the unquantized checkpoint"
        )
    numbers = [*shape, begin, end] if isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ModelError(
            f"{where}: damaged header: wanted at most {MAX_DIMENSIONS} sizes and two offsets, got shape "
            f"{reprlib.repr(shape)}, offsets {reprlib.repr(begin)} to {reprlib.repr(end)}: download it again"
        )
    tensor = SafetensorsTensor(name, dtype, tuple(shape), file, data_start + begin)
    if end - begin != tensor.n_bytes:
        raise ModelError(
            f"{where}: damaged header: {dtype} {shape} takes {tensor.n_bytes} bytes, "
            f"but its offsets {begin} to {end} span {end - begin}: download it again"
        )
    if data_start + end > n_file:
        raise ModelError(
            f"{where}: ends at byte {data_start + end}, the file has {n_file}: truncated, download it again"
        )
    return tensor


def _check_contiguous(file: Path, tensors: list[SafetensorsTensor], data_start: int, n_file: int) -> None:
    """Raise ``ModelError`` unless the tensors fill the data, one after the other."""
    position, before = data_start, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset_bytes, tensor.n_bytes)):
        if tensor.offset_bytes != position:
            wrong = "overlap" if tensor.offset_bytes < position else "leave a gap"
            raise ModelError(f"{file}: damaged header: {before} and {tensor.name} {wrong}: download it again")
        position, before = position + tensor.n_bytes, tensor.name
    if position != n_file:
        raise ModelError(
            f"{file}: damaged: its tensors end at byte {position}, the file has {n_file}: download it again"
        )
