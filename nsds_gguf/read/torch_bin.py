"""PyTorch's ``.bin`` files, read by torch (extra ``torch``): tensors only, memory-mapped, never code.

Such a file is a zip archive with a pickle, which may call any Python function. torch's ``weights_only`` unpickler
refuses all functions that do not build tensors; this module never loads without it.
"""

from __future__ import annotations

import pickle
import re
import reprlib
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError, UnsupportedError
from ..records import Float32, Rows
from .stored import StoredTensor

if TYPE_CHECKING:
    import torch

# Names of dtypes in torch and in safetensors.
_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip

# Exceptions of torch for damaged archives and pickles.
_DAMAGED = (
    RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, EOFError, struct.error,
)  # fmt: skip


_ZIP_MARK = b"PK\x03\x04"
_GLOBAL = re.compile(r"GLOBAL (\S+)")  # torch's message for a refused function


@dataclass(frozen=True)
class TorchFile:
    """A ``.bin`` file, mapped by torch at the first read of a tensor.

    It pickles as path and size: the process that unpickles it maps the file again.

    Attributes:
        path: the file.
        n_bytes: its size when opened.
    """

    path: Path
    n_bytes: int

    @cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors by name; raises as ``read_torch_file`` does."""
        return checked_tensors(self.path, load_tensors(self.path))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the mapping."""
        return {"path": self.path, "n_bytes": self.n_bytes}


@dataclass(frozen=True)
class TorchTensor(StoredTensor):
    """A tensor of a ``.bin`` file that torch maps."""

    archive: TorchFile

    def _matrix(self) -> torch.Tensor:
        n_bytes, wanted = self.file.stat().st_size, self.archive.n_bytes
        if n_bytes < wanted:  # accessing a mapped file that has shrunk kills the process
            raise ModelError(
                f"{self.where} can no longer be read: the file shrank from {wanted} to {n_bytes} bytes: run again when "
                "it is complete"
            )
        tensor = self.archive.tensors.get(self.name)
        if tensor is None or tensor.numel() != self.n_rows * self.n_cols:
            raise ModelError(f"{self.where} can no longer be read: the file was replaced: run again")
        return tensor.reshape(self.n_rows, self.n_cols)

    def values(self, rows: Rows, columns: slice) -> Float32:
        """Return the weights of some rows and columns as a fresh float32 matrix, finite or not."""
        import torch

        self.require_readable()
        wanted = rows if isinstance(rows, slice) else torch.from_numpy(rows)
        found: Float32 = self._matrix()[wanted][:, columns].to(torch.float32, copy=True).contiguous().numpy()
        return found

    def first_bytes(self, n_bytes: int) -> bytes:
        """Return at most ``n_bytes`` bytes of the values, from the first; works for any dtype."""
        import torch

        matrix = self._matrix()
        n_rows = -(-n_bytes // max(1, self.n_cols * matrix.element_size()))
        raw: NDArray[np.uint8] = matrix[:n_rows].contiguous().view(torch.uint8).numpy()
        return raw.tobytes()[:n_bytes]


def read_torch_file(file: Path) -> dict[str, TorchTensor]:
    """Map the tensors of one ``.bin`` file.

    Raises:
        ModelError: torch is not installed, or the file is damaged or holds more than tensors.
        UnsupportedError: the format before PyTorch 1.6.
        OSError: the file cannot be read.

    """
    with file.open("rb") as stream:
        start = stream.read(24)
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{file}: is a git-lfs pointer, not the weights: run `git lfs pull` in {file.parent}")
    if not start.startswith(_ZIP_MARK):
        if start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04")):  # a bare pickle, by its protocol
            raise UnsupportedError(
                f"{file}: has the format before PyTorch 1.6, which cannot be mapped: "
                "get the safetensors weights, or load and save it again with a newer PyTorch"
            )
        raise ModelError(f"{file}: truncated or damaged: not a PyTorch zip archive: download it again")
    archive = TorchFile(file, file.stat().st_size)
    return {name: _torch_tensor(archive, name, value) for name, value in archive.tensors.items()}


def load_tensors(file: Path) -> Any:
    """Unpickle a file with torch and ``weights_only``; raise as ``read_torch_file`` does."""
    try:
        import torch
    except ImportError as error:
        raise ModelError(
            f"{file}: PyTorch weights need torch: run `pip install 'nsds-gguf[torch]'`, or get the safetensors weights"
        ) from error
    try:
        with warnings.catch_warnings():  # torch's advice to the author of the file
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = _GLOBAL.search(str(error))
        what = f"calls {named[1]}, which could run any code" if named else "is not a pickle of tensors"
        raise ModelError(f"{file}: {what}: refused; get the safetensors weights") from error
    except _DAMAGED as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{file}: truncated or damaged: {reason}: download it again") from error


def checked_tensors(file: Path, loaded: Any) -> dict[str, torch.Tensor]:
    """Return the loaded tensors by name; raise ``ModelError`` for anything else in the file."""
    import torch

    if not isinstance(loaded, Mapping):
        raise ModelError(f"{file}: wanted tensors by name, got {type(loaded).__name__}: get the safetensors weights")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ModelError(
                f"{file}: {reprlib.repr(name)}: wanted a tensor with a name, got {type(value).__name__}: "
                "get the safetensors weights"
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise UnsupportedError(f"{file}: tensor {name}: wanted a plain tensor, got {value.layout} {value.dtype}")
    return {name: value.detach() for name, value in loaded.items()}


def _torch_tensor(archive: TorchFile, name: str, value: torch.Tensor) -> TorchTensor:
    dtype = str(value.dtype).removeprefix("torch.")
    return TorchTensor(name, _DTYPES.get(dtype, dtype), tuple(value.shape), archive.path, archive)
