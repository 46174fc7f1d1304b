"""safetensors files: headers checked before use, data memory-mapped, rows converted to float32 on reading.

Layout of a file (safetensors, README "Format"): 8 bytes little-endian length N of the header; N bytes of JSON
``{"name": {"dtype", "shape", "data_offsets": [begin, end]}, ..., "__metadata__": {...}}``; then the data, to which the
offsets are relative. The tensors fill the data without gaps, no name occurs twice (as the reference implementation
demands). Nothing is allocated or mapped on the word of a header that has not been checked.
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
from ..records import Float32

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_DIMENSIONS = 8  # twice what ggml knows; keeps the product of a shape short

_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_COUNTED_AT_ONCE = 1 << 20  # weights, 4 MiB as float32
_LFS_MARK = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: where it lies and how it is stored. ``shape`` is in numpy order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset_bytes: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the stored data."""
        return math.prod(self.shape) * _NUMPY_DTYPES[self.dtype].itemsize

    def map(self) -> NDArray[Any]:
        """Map the data read-only: ``(n_rows, n_cols)`` in the stored dtype (BF16 as uint16)."""
        n_cols = self.shape[-1] if self.shape else 1
        n_rows = math.prod(self.shape[:-1])
        try:
            return np.memmap(self.file, _NUMPY_DTYPES[self.dtype], "r", self.offset_bytes, (n_rows, n_cols))
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.file}: tensor {self.name} can no longer be read: {error}") from error

    def read_rows(self, index: slice | NDArray[np.intp]) -> Float32:
        """Return the rows of ``index`` as a fresh ``(n, n_cols)`` float32 array.

        Raises ``ModelError`` when the file has shrunk since it was opened, or a weight is NaN or infinite.
        """
        rows = to_float32(self.map()[index], self.dtype)
        if not np.isfinite(rows).all():
            raise self._not_finite()
        return rows

    def _not_finite(self) -> ModelError:
        """Return the error that counts what is not finite in the whole tensor."""
        n_nan = n_infinite = 0
        data = self.map()
        step = max(1, _COUNTED_AT_ONCE // data.shape[1])
        for start in range(0, len(data), step):
            rows = to_float32(data[start : start + step], self.dtype)
            n_nan += int(np.isnan(rows).sum())
            n_infinite += int(np.isinf(rows).sum())
        return ModelError(
            f"{self.file}: tensor {self.name}: {n_nan} NaN and {n_infinite} infinite of {data.size} weights; "
            "wanted finite numbers: the checkpoint is damaged, download it again"
        )


def to_float32(data: NDArray[Any], dtype: str) -> Float32:
    """Convert stored values to float32, exactly: BF16 is the upper half of a float32."""
    if dtype == "BF16":
        wide = data.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return data.astype(np.float32)


def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of ``model.safetensors`` or of all shards named by its index.

    Returns:
        The tensors by checkpoint name, in file order.

    Raises:
        ModelError: no weights, a missing shard, a git-lfs pointer, an index that leaves the folder, or a header
            that is truncated, contradicts itself or the index.
        UnsupportedError: weights in a format that is not read, or stored in a type that is not F32, F16 or BF16.

    """
    try:
        return _open_checkpoint(folder)
    except OSError as error:
        raise ModelError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error


def _open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() and not index.is_file():
        return read_header(single)
    if not index.is_file():
        raise _no_weights(folder)
    weight_map = _read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise ModelError(f"{folder / shard}: shard is missing; {index.name} names it: download it")
        for name, tensor in read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                where = weight_map.get(name, "no shard")
                raise ModelError(f"{folder / shard}: holds tensor {name}, but {index.name} places it in {where}")
            tensors[name] = tensor
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise ModelError(f"{index}: names {len(lost)} tensors that are in no shard, first {lost[0]}")
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read and check the header of one file; raises as ``open_checkpoint`` does."""
    n_file = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(_LFS_MARK))
        if start == _LFS_MARK:
            raise ModelError(f"{file}: is a git-lfs pointer, not the weights: run `git lfs pull` in {file.parent}")
        if n_file < 8:
            raise ModelError(f"{file}: {n_file} bytes are no safetensors file: download it again")
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
    """Return a JSON object as a dict; raises ``ValueError`` when a key occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{Counter(key for key, _ in pairs).most_common(1)[0][0]!r} occurs more than once")
    return found


def _stored(file: Path, name: str, entry: Any, data_start: int, n_file: int) -> StoredTensor:
    where = f"{file}: tensor {name}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where}: damaged header: wanted dtype, shape and data_offsets") from error
    if not isinstance(dtype, str) or dtype not in _NUMPY_DTYPES:
        raise UnsupportedError(
            f"{where}: stored as {reprlib.repr(dtype)}; wanted F32, F16 or BF16: use the unquantized checkpoint"
        )
    numbers = [*shape, begin, end] if isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ModelError(
            f"{where}: damaged header: wanted at most {MAX_DIMENSIONS} sizes and two offsets, got shape "
            f"{reprlib.repr(shape)}, offsets {reprlib.repr(begin)} to {reprlib.repr(end)}: download it again"
        )
    tensor = StoredTensor(name, dtype, tuple(shape), file, data_start + begin)
    if end - begin != tensor.n_bytes:
        raise ModelError(
            f"{where}: damaged header: {dtype} {shape} takes {tensor.n_bytes} bytes, "
            f"its offsets {begin} to {end} say {end - begin}: download it again"
        )
    if data_start + end > n_file:
        raise ModelError(
            f"{where}: ends at byte {data_start + end}, the file has {n_file}: truncated, download it again"
        )
    return tensor


def _check_contiguous(file: Path, tensors: list[StoredTensor], data_start: int, n_file: int) -> None:
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


def _read_index(index: Path) -> dict[str, str]:
    raw = index.read_bytes()
    if raw.startswith(_LFS_MARK):
        raise ModelError(f"{index}: is a git-lfs pointer: run `git lfs pull` in {index.parent}")
    try:
        items = dict(json.loads(raw)["weight_map"].items())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: damaged: wanted JSON with a weight_map: {error}: download it again") from error
    for name, shard in items.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise ModelError(
                f"{index}: places tensor {name} in {reprlib.repr(shard)}; wanted the name of a file in the same folder"
            )
    return items


def _no_weights(folder: Path) -> ModelError:
    other = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf") for path in folder.glob(pattern))
    if other:
        return UnsupportedError(f"{folder}: holds {other[0]} but no model.safetensors: get the safetensors weights")
    links = sorted(path for path in folder.glob("*.safetensors") if path.is_symlink() and not path.exists())
    if links:
        return ModelError(f"{links[0]}: link to a file that is missing: download it again")
    shards = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    if shards:
        return ModelError(f"{folder}: holds {shards[0]} but no model.safetensors.index.json: download the index")
    return ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json in it")
