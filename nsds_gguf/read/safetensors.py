"""safetensors files: headers checked before use, data memory-mapped, rows converted to float32 on reading.

Layout of a file (safetensors, README "Format"): 8 bytes little-endian length N of the header; N bytes of JSON
``{"name": {"dtype", "shape", "data_offsets": [begin, end]}, ..., "__metadata__": {...}}``; then the data, to which the
offsets are relative. Nothing is allocated or mapped on the word of a header that has not been checked.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError, UnsupportedError
from ..records import Float32

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation

_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
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
        """Return the rows of ``index`` as a fresh ``(n, n_cols)`` float32 array."""
        return to_float32(self.map()[index], self.dtype)


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
        header = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{file}: damaged header: {error}: download it again") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file}: damaged header: wanted an object, got {type(header).__name__}")
    header.pop("__metadata__", None)
    tensors = {name: _stored(file, name, entry, 8 + n_header, n_file) for name, entry in header.items()}
    _check_no_overlap(file, list(tensors.values()))
    return tensors


def _stored(file: Path, name: str, entry: Any, data_start: int, n_file: int) -> StoredTensor:
    where = f"{file}: tensor {name}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where}: damaged header entry: wanted dtype, shape and data_offsets") from error
    if dtype not in _NUMPY_DTYPES:
        raise UnsupportedError(f"{where}: stored as {dtype}; wanted F32, F16 or BF16: use the unquantized checkpoint")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ModelError(f"{where}: damaged header entry: shape {shape}, offsets {begin}..{end}")
    tensor = StoredTensor(name, dtype, tuple(shape), file, data_start + begin)
    if end - begin != tensor.n_bytes:
        raise ModelError(f"{where}: {dtype} {shape} takes {tensor.n_bytes} bytes, its header says {end - begin}")
    if data_start + end > n_file:
        raise ModelError(
            f"{where}: ends at byte {data_start + end}, the file has {n_file}: truncated, download it again"
        )
    return tensor


def _check_no_overlap(file: Path, tensors: list[StoredTensor]) -> None:
    ordered = sorted((tensor for tensor in tensors if tensor.n_bytes), key=lambda tensor: tensor.offset_bytes)
    for first, second in itertools.pairwise(ordered):
        if first.offset_bytes + first.n_bytes > second.offset_bytes:
            raise ModelError(f"{file}: damaged header: tensors {first.name} and {second.name} overlap")


def _read_index(index: Path) -> dict[str, str]:
    if index.open("rb").read(len(_LFS_MARK)) == _LFS_MARK:
        raise ModelError(f"{index}: is a git-lfs pointer: run `git lfs pull` in {index.parent}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = dict(weight_map.items())
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: damaged: wanted JSON with a weight_map: {error}") from error
    for name, shard in items.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise ModelError(f"{index}: places tensor {name} in {shard!r}; wanted a file name inside the folder")
    return items


def _no_weights(folder: Path) -> ModelError:
    other = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf") for path in folder.glob(pattern))
    if other:
        return UnsupportedError(f"{folder}: holds {other[0]} but no model.safetensors: get the safetensors weights")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        return ModelError(f"{folder}: holds {shards[0]} but no model.safetensors.index.json: download the index")
    return ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json in it")
