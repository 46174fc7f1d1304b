"""The devices of PyTorch (extra ``torch``): whether they can be used here, and their memory.

torch is imported only when somebody asks about a GPU.
"""

from __future__ import annotations

import importlib.util

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


def free_device_bytes() -> int:
    """Return the free memory of the CUDA device, what PyTorch holds in reserve included."""
    import torch

    reserve = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + int(reserve)


def lacks_device_memory(n_bytes: int) -> str:
    """Return what is wanted and what there is when the CUDA device has less free memory, or an empty string."""
    free = free_device_bytes()
    if free >= n_bytes:
        return ""
    return f"{n_bytes / _GIB:.1f} GiB of memory on the device, {free / _GIB:.1f} GiB are free"
