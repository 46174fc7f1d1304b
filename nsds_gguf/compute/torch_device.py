"""Devices that PyTorch runs on (extra ``torch``): whether they can be used, their memory, and the ``auto`` device.

torch is imported only when a device of its is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from ..records import Model

if TYPE_CHECKING:
    from .torch_backend import TorchBackend

CUDA, CPU = "cuda", "cpu"  # PyTorch's names

_GIB = 2**30


def missing_torch() -> str:
    """Return why PyTorch cannot be used, or an empty string."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed; run: pip install 'nsds-gguf[torch]'"
    return ""


def missing_cuda() -> str:
    """Return why PyTorch cannot use a CUDA device, or an empty string."""
    if missing_torch():
        return missing_torch()
    import torch

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is a build without CUDA"
    return "" if torch.cuda.is_available() else "PyTorch finds no CUDA device"


def lacks_device_memory(n_bytes: int) -> str:
    """Return what is wanted and what there is when the CUDA device has less free memory, or an empty string."""
    import torch

    free = int(torch.cuda.mem_get_info()[0])
    if free >= n_bytes:
        return ""
    return f"{n_bytes / _GIB:.1f} GiB of memory on the device, {free / _GIB:.1f} GiB are free"


def open_cuda(model: Model, n_positions: int, n_threads: int) -> AbstractContextManager[TorchBackend]:
    """Open the backend on a CUDA device; see ``BackendEntry.open``."""
    return _open(CUDA, model, n_positions, n_threads)


def open_torch_cpu(model: Model, n_positions: int, n_threads: int) -> AbstractContextManager[TorchBackend]:
    """Open the backend on the CPU; see ``BackendEntry.open``."""
    return _open(CPU, model, n_positions, n_threads)


@contextmanager
def _open(device: str, model: Model, n_positions: int, n_threads: int) -> Iterator[TorchBackend]:
    from .torch_backend import open_torch

    with open_torch(device, model, n_positions, n_threads) as backend:
        yield backend
